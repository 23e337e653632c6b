"""Lookups by gRPC over the loopback: latency of one token, and bytes of rows a second of streamed batches.

Flows in: the URL of a running server, or nothing: then a store of V4.1's rows is made under a folder and served by a process of
its own, all of it in DRAM, so that what is measured is the way and not the disk. Flows out: medians. Where the store is ours, rows
are compared with it before anything is timed.

    python -m tierstore.tools.bench.remote --folder /mnt/nvme
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from tierstore.daemon.remote_client import connect_remote
from tierstore.errors import DaemonError

from . import stores
from .stores import MadeStore

SIZE_BYTES = 1 << 30
TOKENS = 2048
WARM_UP = 20
START_TIMEOUT_S, STOP_TIMEOUT_S = 120, 30
TARGETS = {"one_token_p50_us": 1000.0, "streamed_mb_per_s": 600.0}  # at most, at least

_SERVER = """
import sys, tierstore
from tierstore.daemon.remote_server import RemoteServer

with tierstore.open(sys.argv[1], dram=int(sys.argv[2])) as store:
    server = RemoteServer(store, "127.0.0.1:0")
    print(server.address, flush=True)
    sys.stdin.read()
    server.close()
"""


def measure(
    url: str, *, table: str | None = None, tokens: int = TOKENS, lookups: int = 2000, batches: int = 40, **access: Any
) -> dict[str, float]:
    """Returns one token's p50 and p99 in us, and MB (10^6 bytes) of rows a second of batches: median and best. Blocks.

    table: the first one where it is None. access: the token_file and ca_file of `connect_remote`.
    """
    with connect_remote(url, **access) as store:
        asked = store[table or next(iter(store.tables))]
        spec, generator = asked.spec, np.random.default_rng(0)
        key_end = spec.num_rows if spec.is_plain else 2**63 - 1

        def draw(num_tokens: int) -> np.ndarray:
            return generator.integers(0, key_end, (num_tokens, len(spec.orders)), dtype=np.int64)

        ones = _seconds(asked, [draw(1) for _ in range(lookups + WARM_UP)])
        many = _seconds(asked, [draw(tokens) for _ in range(batches + WARM_UP)])
    batch_bytes = tokens * spec.num_heads * spec.row_bytes
    return {
        "one_token_p50_us": statistics.median(ones) * 1e6,
        "one_token_p99_us": sorted(ones)[int(len(ones) * 0.99)] * 1e6,
        "streamed_mb_per_s": batch_bytes / statistics.median(many) / 1e6,
        "streamed_best_mb_per_s": batch_bytes / min(many) / 1e6,
        "batch_bytes": float(batch_bytes),
    }


def _seconds(table: Any, batches: list[np.ndarray]) -> list[float]:
    """Returns the seconds of each lookup but the first WARM_UP."""
    spec = table.spec
    out = np.ones((len(batches[0]), spec.num_heads, spec.row_bytes), dtype=np.uint8)
    seconds = []
    for keys in batches:
        started = time.perf_counter()
        table.lookup(keys, out)
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


@contextlib.contextmanager
def serving(made: MadeStore) -> Iterator[str]:
    """Serves a store from a process of its own, all in DRAM; yields its URL."""
    command = [sys.executable, "-c", _SERVER, str(made.path), str(made.spec.table_bytes * 5 // 4 + (64 << 20))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        address = server.stdout.readline().strip()
        if not address:
            raise DaemonError(f"the server of {made.path} did not start; its words are above")
        yield f"grpc://{address}"
    finally:
        server.stdin.close()
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def check(url: str, made: MadeStore) -> None:
    """Raises `ConfigError` where a served store gives other rows than were built."""
    keys = stores.fresh_keys(np.random.default_rng(1), TOKENS)
    with connect_remote(url) as store:
        made.check(keys, store[stores.TABLE].lookup(keys))


@click.command("remote")
@click.argument("url", required=False)
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Where the store is made.")
@click.option("--tokens", type=click.IntRange(min=1), default=TOKENS, show_default=True, help="Of a batch.")
def main(url: str | None, folder: Path, tokens: int) -> None:
    """Measure lookups by gRPC of the server at URL, or of one that is started here."""
    if url is not None:
        click.echo(json.dumps(measure(url, tokens=tokens), indent=2))
        return
    made = stores.make_store(folder, SIZE_BYTES // stores.ROW_BYTES)
    with serving(made) as url:
        check(url, made)
        click.echo(json.dumps(measure(url, tokens=tokens), indent=2))


if __name__ == "__main__":
    main()
