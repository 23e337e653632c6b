"""`tierstore stat`: how a daemon fares, once.

Flows in: a daemon's socket. Flows out: tables, or the record as JSON, whose keys are stable. Refuses what is no daemon.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from tierstore.daemon.client_socket import ask
from tierstore.daemon.record import SECTIONS, Record
from tierstore.errors import DaemonError

from .cli import console

FETCH_S_MAX = 10.0


def fetch_record(socket: Path) -> Record:
    """Asks the daemon at a socket for its stat record. Blocks for FETCH_S_MAX at most.

    Raises `DaemonError` where no daemon answers, it refuses, or its answer is of another release.
    """
    record: Record = ask(str(socket), {"do": "stat"}, timeout_s=FETCH_S_MAX)
    record.pop("ok", None)
    missing = [name for name in SECTIONS if name not in record]
    if missing:
        raise DaemonError(
            f"{socket}: the daemon's record has no {', '.join(missing)}; "
            "it is of another release: use the tierstore that the daemon runs"
        )
    return record


@click.command("stat")
@click.argument("socket", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON; the keys are stable, sizes are in bytes.")
def command(socket: Path, as_json: bool) -> None:
    """Say how the daemon at SOCKET fares: hit rates, latency, memory, epochs, clients.

    \b
    Example: tierstore stat /run/tierstore/v41.sock
    """
    record = fetch_record(socket)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    from .stat_tables import page_of

    console().print(page_of(record, None, time.time()))
