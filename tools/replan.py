"""`tierstore replan`: has a daemon replan now, from the traffic that it saw."""

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

    done = ask(socket, {"do": "replan"}, timeout_s=REPLAN_S)
    click.echo(
        f"{done['entered']:,} entries became static and {done['left']:,} made way, in {done['steps']} steps and "
        f"{done['seconds']:.1f} s"
    )
