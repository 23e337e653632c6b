"""`tierstore stat`: how a daemon fares, once.

Input: a daemon's socket, or URLs of servers of lookups by gRPC. Output: tables, or the record as JSON, whose keys
are stable. Errors: `DaemonError` if no daemon answers there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from tierstore.daemon.record import StatRecord
from tierstore.errors import ConfigError
from tierstore.ipc.client_socket import ask
from tierstore.ipc.messages import StatRequest
from tierstore.ipc.socket_file import starting_state

from ..cli import console

FETCH_S_MAX = 10.0
STARTING_S_MAX = 1.0  # a daemon that is warming its tiers answers nobody: it notes beside the socket how far it is


def fetch_record(socket: Path) -> StatRecord:
    """Asks the daemon at a socket for its stat record. Blocks for FETCH_S_MAX at most.

    Raises `DaemonError` if no daemon answers, it refuses, or its answer is of another release.
    """
    timeout_s = STARTING_S_MAX if starting_state(socket) else FETCH_S_MAX
    return ask(str(socket), StatRequest(), StatRecord, timeout_s=timeout_s)


@click.command("stat")
@click.argument("addresses", metavar="SOCKET|URL...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; the keys are stable, sizes are in bytes.")
@click.option("--token-file", type=click.Path(path_type=Path), help="Of a URL: the file with the server's token.")
@click.option("--ca-file", type=click.Path(path_type=Path), help="Of grpcs://: PEM of who signed the certificate.")
def command(addresses: tuple[str, ...], as_json: bool, token_file: Path | None, ca_file: Path | None) -> None:
    """Say how the daemon at SOCKET fares: hit rates, latency, memory, epochs, clients.

    Of a server of lookups by gRPC, at a URL: what it serves, hit rates, and calls. Of several URLs, besides, whether
    they are slices of one store at one version; the exit status is 1 if not.

    \b
    Example: tierstore stat /run/tierstore/v41.sock
             tierstore stat grpcs://10.0.0.7:7443 --token-file token
             tierstore stat grpcs://a:7443 grpcs://b:7443 --token-file token
    """
    address = addresses[0]
    if len(addresses) > 1 or ("://" in address and "|" in address):
        _print_several(addresses, token_file, ca_file, as_json=as_json)
        return
    if "://" in address:
        _print_remote(address, token_file, ca_file, as_json=as_json)
        return
    if token_file is not None or ca_file is not None:
        raise ConfigError(f"{address}: --token-file and --ca-file are for a URL, grpc://HOST:PORT; leave them out")
    record = fetch_record(Path(address))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(record)).decode())
        return
    from .tables import page_of

    console().print(page_of(record, None, time.time()))


def _print_remote(url: str, token_file: Path | None, ca_file: Path | None, *, as_json: bool) -> None:
    from .remote import fetch_remote_record, remote_lines

    record = fetch_remote_record(url, token_file, ca_file)
    click.echo(json.dumps(record, indent=2) if as_json else "\n".join(remote_lines(record)))


def _print_several(addresses: Sequence[str], token_file: Path | None, ca_file: Path | None, *, as_json: bool) -> None:
    for address in addresses:
        if "://" not in address:
            raise ConfigError(f"{address}: of several addresses, all must be URLs, grpc://HOST:PORT; ask for it alone")
    from .several import fetch_several, several_lines

    record = fetch_several(addresses, token_file, ca_file)
    click.echo(json.dumps(record, indent=2) if as_json else "\n".join(several_lines(record)))
    if record["together"]["error"] is not None:
        raise SystemExit(1)
