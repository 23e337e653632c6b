"""Lookups by gRPC over the loopback: latency of one token, and bytes of rows a second of streamed batches.

Input: the URL of a running server, or nothing: then a store of V4.1's rows is made under a folder and served by a
process of its own, all of it in DRAM, so that what is measured is the way and not the disk. Output: medians; where the
server is ours, also those of bare gRPC, which sends equally many bytes in turn with it, and rows are checked before
anything is timed.

    python -m tierstore.tools.bench.serve.remote --folder /mnt/nvme
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from tierstore.errors import DaemonError
from tierstore.remote.answers import CHUNK_BYTES
from tierstore.remote.client import connect_remote
from tierstore.store.table import Table

from .. import stores
from ..stores import MadeStore

SIZE_BYTES = 1 << 30
TOKENS = 2048
ROUNDS, ONES, BATCHES, WARM_UP = 9, 200, 5, 2
STARTS = 4096  # of batches, drawn beforehand: what draws them is not timed
STOP_TIMEOUT_S = 30
RATIOS = {"one_token_to_bare": "one_token_p50_us", "streamed_to_bare": "streamed_mb_per_s"}  # and what they are of
Side = Callable[[int], object]  # looks so many tokens up

_BARE = """
import os, sys, grpc
from concurrent.futures import ThreadPoolExecutor

data = os.urandom(1 << 20)

def chunks(request, context):
    for size in map(int, request.split()):
        yield data[:size]

bare = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_send_message_length", -1)])
handlers = {"Chunks": grpc.unary_stream_rpc_method_handler(chunks)}
handlers["One"] = grpc.unary_unary_rpc_method_handler(lambda request, context: data[: int(request)])
bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
port = bare.add_insecure_port("127.0.0.1:0")
bare.start()
"""
_BARE_ALONE = f"""{_BARE}
print(f"127.0.0.1:{{port}}", flush=True)
sys.stdin.read()
bare.stop(None)
"""
_SERVER = f"""{_BARE}
import tierstore
from tierstore.remote.server import RemoteServer

with tierstore.open(sys.argv[1], dram=int(sys.argv[2])) as store:
    server = RemoteServer(store, "127.0.0.1:0")
    print(server.address, f"127.0.0.1:{{port}}", flush=True)
    sys.stdin.read()
    server.close()
bare.stop(None)
"""


def measure(
    url: str, *, tokens: int = TOKENS, keys: np.ndarray | None = None, bare: str | None = None, **access: Any
) -> dict[str, float]:
    """Returns one token's p50 in us, and MB (10^6 bytes) of rows a second of batches, of the first table:
    medians. Blocks.

    keys: int64 [N, O], to draw from; None: from all there are. bare: the address of a server of bare gRPC, whose
    figures are then returned too, and medians over rounds of ours to them: time to time, rate to rate. access: as
    `connect_remote` takes it.
    """
    with connect_remote(url, **access) as store, contextlib.ExitStack() as stack:
        table = next(iter(store.tables.values()))
        token_bytes = table.spec.num_heads * table.spec.row_bytes
        sides: dict[str, Side] = {"": _side(table, tokens, keys)}
        if bare is not None:
            sides["bare_"] = stack.enter_context(_bare_side(bare, token_bytes))
        figures: dict[str, list[float]] = {}
        for number in range(WARM_UP + ROUNDS):
            for name, look_up in sides.items():
                one = statistics.median(_seconds(look_up, 1, ONES)) * 1e6
                rate = tokens * token_bytes / statistics.median(_seconds(look_up, tokens, BATCHES)) / 1e6
                if number >= WARM_UP:
                    figures.setdefault(f"{name}one_token_p50_us", []).append(one)
                    figures.setdefault(f"{name}streamed_mb_per_s", []).append(rate)
    if bare is not None:
        for ratio, name in RATIOS.items():
            pairs = zip(figures[name], figures[f"bare_{name}"], strict=True)
            figures[ratio] = [ours / bares for ours, bares in pairs]
    return {name: statistics.median(values) for name, values in figures.items()}


def _seconds(look_up: Side, tokens: int, times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        look_up(tokens)
        seconds.append(time.perf_counter() - started)
    return seconds


def _side(table: Table, tokens_max: int, drawn_from: np.ndarray | None) -> Side:
    """Lookups of keys that are drawn once, from all there are where none are given,
    and lie in another order each time."""
    spec, generator = table.spec, np.random.default_rng(0)
    key_end = spec.num_rows if spec.is_plain else 2**63 - 1
    if drawn_from is None:
        keys = generator.integers(0, key_end, (64 * tokens_max, len(spec.orders)), dtype=np.int64)
    else:
        keys = drawn_from[generator.integers(0, len(drawn_from), 64 * tokens_max)]
    out = np.ones((tokens_max, spec.num_heads, spec.row_bytes), dtype=np.uint8)
    starts = itertools.cycle(generator.integers(0, len(keys) - tokens_max, STARTS).tolist())

    def look_up(tokens: int) -> object:
        start = next(starts)
        return table.lookup(keys[start : start + tokens], out[:tokens])

    return look_up


@contextlib.contextmanager
def _bare_side(address: str, token_bytes: int) -> Iterator[Side]:
    """Equally many bytes by bare gRPC, in messages of the same size; nobody looks at them."""
    import grpc

    options = [("grpc.max_receive_message_length", -1), ("SingleThreadedUnaryStream", 1)]
    with grpc.insecure_channel(address, options) as channel:
        one, chunks = channel.unary_unary("/bare/One"), channel.unary_stream("/bare/Chunks")

        def look_up(tokens: int) -> object:
            if tokens == 1:
                return one(str(token_bytes).encode())
            whole, rest = divmod(tokens * token_bytes, CHUNK_BYTES)
            return sum(map(len, chunks(" ".join(map(str, [CHUNK_BYTES] * whole + [rest])).encode())))

        yield look_up


@contextlib.contextmanager
def serving(made: MadeStore) -> Iterator[tuple[str, str]]:
    """Serves a store from a process of its own, all in DRAM; yields its URL, and the address of bare gRPC beside it."""
    dram_bytes = made.spec.table_bytes * 5 // 4 + (64 << 20)
    with _process(_SERVER, str(made.path), str(dram_bytes)) as (address, bare):
        yield f"grpc://{address}", bare


@contextlib.contextmanager
def serving_store(path: Path, dram_bytes: int) -> Iterator[str]:
    """Serves a store from a process of its own; yields its URL."""
    with _process(_SERVER, str(path), str(dram_bytes)) as (address, _):
        yield f"grpc://{address}"


@contextlib.contextmanager
def serving_bare() -> Iterator[str]:
    """Serves bare gRPC from a process of its own; yields its address."""
    with _process(_BARE_ALONE) as (address,):
        yield address


@contextlib.contextmanager
def _process(source: str, *arguments: str) -> Iterator[list[str]]:
    """A process that prints addresses when it serves; yields them."""
    command = [sys.executable, "-c", source, *arguments]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        addresses = server.stdout.readline().split()
        if not addresses:
            raise DaemonError("a server to measure did not start; its words are above")
        yield addresses
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
@click.option("--tokens", type=click.IntRange(min=2), default=TOKENS, show_default=True, help="Of a batch.")
def main(url: str | None, folder: Path, tokens: int) -> None:
    """Measure lookups by gRPC of the server at URL, or of one that is started here."""
    if url is not None:
        click.echo(json.dumps(measure(url, tokens=tokens), indent=2))
        return
    made = stores.make_store(folder, SIZE_BYTES // stores.ROW_BYTES)
    with serving(made) as (url, bare):
        check(url, made)
        click.echo(json.dumps(measure(url, tokens=tokens, bare=bare), indent=2))


if __name__ == "__main__":
    main()
