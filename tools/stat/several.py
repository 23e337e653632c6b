"""What `tierstore stat` says of several servers of lookups by gRPC: each by itself, and whether they are one store.

Input: addresses, as `tierstore.connect` takes them in a list. Output: a record, or lines of it. Errors: none; a server
that does not answer, and slices that are not one store, are named in the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tierstore.errors import TierStoreError
from tierstore.printable import printable

from .remote import FETCH_S_MAX, fetch_remote_record, remote_lines


def fetch_several(addresses: Sequence[str], token_file: Path | None, ca_file: Path | None) -> dict[str, Any]:
    """Asks every server and replica for its record, and all together for a store. Blocks, FETCH_S_MAX for each at most.

    Returns:
        servers: Their records; of one that fails {"server": {"url": URL}, "error": TEXT}. together: "rows" that each
        address has of every table, "common_build" and "error", which is None if they are one store.
    """
    from tierstore.remote.client import connect_remote

    servers = []
    for url in (url for address in addresses for url in address.split("|")):
        try:
            servers.append(fetch_remote_record(url, token_file, ca_file))
        except (TierStoreError, TimeoutError) as error:
            servers.append({"server": {"url": url}, "error": str(error)})
    together: dict[str, Any] = {"rows": {}, "common_build": "", "error": None}
    try:
        with connect_remote(addresses, token_file=token_file, ca_file=ca_file, timeout_s=FETCH_S_MAX) as store:
            slices = store.stats()["server"]["slices"]
            together |= {"rows": {each["url"]: each["rows"] for each in slices}, "common_build": store.common_build}
    except (TierStoreError, TimeoutError) as error:
        together["error"] = str(error)
    return {"servers": servers, "together": together}


def several_lines(record: dict[str, Any]) -> list[str]:
    """Returns the record for people."""
    lines = []
    for server in record["servers"]:
        failed = server.get("error")
        lines += remote_lines(server) if failed is None else [f"{server['server']['url']}: does not answer: {failed}"]
        lines.append("")
    together = record["together"]
    if together["error"] is not None:
        lines.append(f"together: not one store: {together['error']}")
    else:
        lines.append(f"together: one store at one version, common digest {together['common_build'][:12]}")
        for url, tables in together["rows"].items():
            parts = ", ".join(f"{name} {start:,} to {end:,}" for name, (start, end) in tables.items())
            lines.append(f"         {url}: rows of {parts}")
    return [printable(line) for line in lines]
