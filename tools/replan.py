"""`tierstore replan`: has a daemon replan now, from the traffic that it saw.

Input: a daemon's socket. Output: a line that says what was done. Errors: what the daemon refuses with.
"""

from __future__ import annotations

import click

REPLAN_S = 600.0


@click.command("replan")
@click.argument("socket", type=click.Path())
def command(socket: str) -> None:
    """Have the daemon at SOCKET replan its static set now, from what was asked for lately.

    \b
    Example: tierstore replan /run/tierstore/v41.sock
    """
    from tierstore.ipc.client_socket import ask
    from tierstore.ipc.messages import ReplanAnswer, ReplanRequest

    done = ask(socket, ReplanRequest(), ReplanAnswer, timeout_s=REPLAN_S)
    click.echo(
        f"{done.entered:,} entries became static and {done.left:,} made way, "
        f"in {done.steps} steps and {done.seconds:.1f} s"
    )
