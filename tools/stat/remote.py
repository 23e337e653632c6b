"""What `tierstore stat` says of a server of lookups by gRPC: what it serves, and how its own lookups and calls fare.

Input: a URL. Output: a record, or lines of it. A server shows clients of other hosts less than a daemon shows its
administrator: neither its memory nor who its clients are.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tierstore.daemon.record import ratio
from tierstore.printable import printable
from tierstore.units import format_bytes

from .words import share_text, short_count

FETCH_S_MAX = 10.0


def fetch_remote_record(url: str, token_file: Path | None, ca_file: Path | None) -> dict[str, Any]:
    """Asks a server what it serves, and for its counts. Blocks for FETCH_S_MAX at most.
    Raises what `connect_remote` raises."""
    from tierstore.remote import messages
    from tierstore.remote.channel import Connection
    from tierstore.remote.replies import decoded
    from tierstore.remote.wire import encode

    connection = Connection(url, token_file=token_file, ca_file=ca_file)
    try:
        until = time.monotonic() + FETCH_S_MAX
        reply = connection.unary("Describe", encode(messages.DescribeRequest()), until, patient=False)
        served = decoded(messages.Description, reply, url)
        reply = connection.unary("Stats", encode(messages.StatsRequest()), until, patient=False)
        stats = json.loads(decoded(messages.StatsReply, reply, url).json)
    finally:
        connection.close()
    return {"server": {"url": url, "store": served.name, "version": served.version, "build": served.build}, **stats}


def remote_lines(record: dict[str, Any]) -> list[str]:
    """Returns the record for people."""
    server, hits, remote = record["server"], record["hits"], record["remote"]
    lines = [
        f"{server['url']}: {server['store']}, generation {server['version']}, digest "
        f"{server['build'][:12] or 'not known'}",
        f"remote   {remote['calls']:,} calls, {remote['in_flight']:,} under way, {remote['errors']:,} failed, "
        f"{format_bytes(remote['bytes_sent'])} sent",
        f"lookups  {short_count(record['batches'])}, {short_count(record['keys'])} keys, hit rate "
        f"{share_text(ratio(hits['hbm'] + hits['dram'], record['keys']))}",
    ]
    for name, table in record["tables"].items():
        for order, tiers in table["orders"].items():
            keys = sum(tiers.values())
            rate = share_text(ratio(keys - tiers["nvme"], keys))
            lines.append(f"         {name}, order {order}: {short_count(keys)} keys, hit rate {rate}")
    lines.append("Its memory, epochs and clients: 'tierstore stat SOCKET' on its own host, or its metrics (--metrics)")
    return [printable(line) for line in lines]
