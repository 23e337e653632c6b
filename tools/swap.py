"""`tierstore swap`: has a daemon serve another version of its store, or the one before again."""

from __future__ import annotations

from pathlib import Path

import click

from tierstore.errors import ConfigError

SWAP_S = 3600.0


@click.command("swap")
@click.argument("socket", type=click.Path())
@click.argument("store", type=click.Path(path_type=Path), required=False)
@click.option("--rollback", is_flag=True, help="Serve the version before again.")
def command(socket: str, store: Path | None, rollback: bool) -> None:
    """Have the daemon at SOCKET serve STORE in place of its own, for all clients, without stopping any.

    STORE must have the same tables, built with the same hash. What is asked for lately stays static; after that comes what a
    placement of STORE itself says, as far as there is room. Restart the daemon with it, too, when you next do.

    \b
    Example: tierstore swap /run/tierstore/v41.sock v41-next.tier
    """
    from tierstore.daemon.client_socket import ask

    if (store is None) != rollback:
        raise ConfigError("give the store to swap in, or --rollback, and not both")
    asked = {"do": "rollback"} if store is None else {"do": "swap", "store": str(store.absolute())}
    done = ask(socket, asked, timeout_s=SWAP_S)
    click.echo(
        f"version {done['version']} is {done['store']}: {done['warmed']:,} entries were warm when clients moved, "
        f"{done['filled']:,} more are now; {done['seconds']:.1f} s"
    )
