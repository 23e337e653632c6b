"""`tierstore swap`: has a daemon serve another version of its store, or the one before again.

Input: a daemon's socket, a store. Output: a line that says what was done, or JSON. Errors: what the daemon refuses
with.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from tierstore.errors import ConfigError

from .phases import Phases

SWAP_S = 3600.0
RECORD = ("version", "store", "warmed", "filled", "seconds")  # what --json prints of a daemon's answer


@click.command("swap")
@click.argument("socket", type=click.Path())
@click.argument("store", type=click.Path(path_type=Path), required=False)
@click.option("--rollback", is_flag=True, help="Serve the version before again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; the keys are stable.")
def command(socket: str, store: Path | None, rollback: bool, as_json: bool) -> None:
    """Have the daemon at SOCKET serve STORE in place of its own, for all clients, without stopping any.

    STORE must have the same tables, built with the same hash. What is asked for lately stays static; after that comes
    what a placement of STORE itself says, as far as there is room. The daemon remembers it: if it ends and is started
    again as before, it serves STORE.

    \b
    Example: tierstore swap /run/tierstore/v41.sock v41-next.tier
    """
    import msgspec

    from tierstore.ipc.client_socket import ask
    from tierstore.ipc.messages import RollbackRequest, SwapAnswer, SwapRequest

    if (store is None) != rollback:
        raise ConfigError("give the store to swap in, or --rollback, and not both")
    request = RollbackRequest() if store is None else SwapRequest(str(store.absolute()))
    with Phases({}, ends=False) as phases:  # the daemon does the work, and does not say how far it is
        phases("swapping", 0, None)
        done = ask(socket, request, SwapAnswer, timeout_s=SWAP_S)
    if as_json:
        values = msgspec.structs.asdict(done)
        click.echo(json.dumps({name: values[name] for name in RECORD}, indent=2))
        return
    click.echo(
        f"generation {done.version} is {done.store}: {done.warmed:,} entries were warm when clients moved, "
        f"{done.filled:,} more are now; {done.seconds:.1f} s"
    )
