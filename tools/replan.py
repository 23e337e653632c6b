"""`tierstore replan`: has a daemon replan now, from the traffic that it saw.

Input: a daemon's socket. Output: a line that says what was done, or JSON. Errors: what the daemon refuses with.
"""

from __future__ import annotations

import json

import click

from .phases import Phases

REPLAN_S = 600.0
RECORD = ("entered", "left", "steps", "seconds")  # what --json prints of a daemon's answer


@click.command("replan")
@click.argument("socket", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(socket: str, as_json: bool) -> None:
    """Have the daemon at SOCKET replan its static set now, from what was asked for lately.

    \b
    Example: tierstore replan /run/tierstore/v41.sock
    """
    import msgspec

    from tierstore.ipc.client_socket import ask
    from tierstore.ipc.messages import ReplanAnswer, ReplanRequest

    with Phases({}, ends=False) as phases:  # the daemon does the work, and does not say how far it is
        phases("replanning", 0, None)
        done = ask(socket, ReplanRequest(), ReplanAnswer, timeout_s=REPLAN_S)
    if as_json:
        values = msgspec.structs.asdict(done)
        click.echo(json.dumps({name: values[name] for name in RECORD}, indent=2))
        return
    click.echo(
        f"{done.entered:,} entries became static and {done.left:,} made way, "
        f"in {done.steps} steps and {done.seconds:.1f} s"
    )
