"""`tierstore bench peers`: other ways to get the same rows, for the same tokens, in the same run.

Input: a working set that tierstore's caches hold whole. Output: the cost of a row by NumPy, torch, np.memmap on the
shards (all their pages mapped: the best that a map can do), LMDB, RocksDB, Redis and Mooncake. Every side is asked with
arrays and fills an array; its rows are checked before it is timed. Each peer runs in turn with tierstore alone, and is
gone before the next one starts, so that no server's threads disturb another's figures.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from tierstore.extras import install_command
from tierstore.units import format_bytes

from .. import page_cache, stores
from ..bare.mapped import MappedRows
from ..pairs import SUBJECT, Options, Result, seconds_of_all
from ..working_set import WorkingSet
from .servers import Mooncake, Redis
from .stores import Fetch, Lmdb, MissingPeerError, Peer, PeerRows, RocksDb, TunedRocksDb, opened

SIZE_BYTES = 1 << 30
SET_FRACTION = 1 / 8  # of the table is the working set
TOKENS = 128  # 3,072 rows
PEERS: tuple[type[Peer], ...] = (Lmdb, RocksDb, TunedRocksDb, Redis, Mooncake)
TARGETS = {"LMDB, a value a row": 25.0, "Redis, a value a row": 40.0, "RocksDB, a value a row": 80.0}
TARGETS["Mooncake EngramStore, loopback"] = 200.0


def run(folder: Path, options: Options) -> Result:
    """Measures every peer that is installed. Needs the table's size (1 GiB by default) on disk,
    and a third of it beside."""
    size_bytes = options.size_bytes or SIZE_BYTES
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES)
    page_cache.bring_in(made.files)
    result = Result("")
    with WorkingSet(made, int(size_bytes * SET_FRACTION), options.dram_bytes, threads=options.threads) as held:
        data = PeerRows(held.resident_rows(), len(held.keys))
        result.title = f"peers, {format_bytes(data.rows.nbytes)} of rows, {len(held.keys):,} tokens"
        tokens = options.tokens or TOKENS
        for name, fetches in _in_process(held, data, options.threads, result).items():
            _compare(name, fetches, held, tokens, options.pairs, result)
        for kind in PEERS:
            try:
                with (
                    tempfile.TemporaryDirectory(dir=folder, prefix="bench-peer-") as files,
                    opened(kind, Path(files), data) as peer,
                ):
                    _compare(peer.name, peer.fetches, held, tokens, options.pairs, result)
            except MissingPeerError as error:
                result.skipped[kind.name] = str(error)
        result.facts["threads"] = f"1 in Python; torch {options.threads}; servers their own"
        result.facts["share of the shards in the page cache"] = round(page_cache.residency(made.files), 4)
    return result


def _compare(name: str, fetches: dict[str, Fetch], held: WorkingSet, tokens: int, pairs: int, result: Result) -> None:
    """Checks that every side gives tierstore's rows, then lets them take turns."""
    out = stores.rows_buffer(tokens)

    def own(places: np.ndarray, out: np.ndarray) -> None:
        held.table.lookup(held.keys[places], out)

    def seconds(fetch: Fetch) -> float:
        return seconds_of_all(fetch, [held.draw(tokens)], out)

    sides = {SUBJECT: own} | fetches
    for fetch in sides.values():
        places = held.draw(tokens)
        out[:] = 1
        fetch(places, out)
        held.made.check(held.keys[places], out)
    rows, timed = tokens * stores.ROWS_PER_TOKEN, {side: partial(seconds, fetch) for side, fetch in sides.items()}
    result.compare(f"{name}, {rows:,} rows", "row", rows, timed, pairs, TARGETS, warm_up_rounds=3)


def _in_process(held: WorkingSet, data: PeerRows, threads: int, result: Result) -> dict[str, dict[str, Fetch]]:
    """Returns the sides that need no store: arrays in memory, and maps of the shards."""

    def numpy_rows(places: np.ndarray, out: np.ndarray) -> None:
        out[:] = data.rows[data.row_ids(places)]

    def memmap(random: bool) -> Fetch:
        mapped = MappedRows(held.made, random=random)
        mapped.touch()

        def fetch(places: np.ndarray, out: np.ndarray) -> None:
            row_ids = held.made.spec.row_ids(held.keys[places]).reshape(-1)
            mapped.rows(row_ids, out.reshape(-1, out.shape[-1]))

        return fetch

    found: dict[str, dict[str, Fetch]] = {"NumPy": {"NumPy fancy index": numpy_rows}}
    try:
        found["torch"] = _torch_fetches(data, threads)
    except ImportError:
        result.skipped["torch"] = f"not installed; {install_command('torch')}"
    return found | {"np.memmap": {"np.memmap, default": memmap(False), "np.memmap, MADV_RANDOM": memmap(True)}}


def _torch_fetches(data: PeerRows, threads: int) -> dict[str, Fetch]:
    import torch

    table = torch.from_numpy(data.rows)
    torch.set_num_threads(threads)

    def index_select(places: np.ndarray, out: np.ndarray) -> None:
        ids = torch.from_numpy(data.row_ids(places).reshape(-1))
        torch.index_select(table, 0, ids, out=torch.from_numpy(out.reshape(-1, out.shape[-1])))

    def embedding(places: np.ndarray, out: np.ndarray) -> None:
        rows = torch.nn.functional.embedding(torch.from_numpy(data.row_ids(places)), table)
        torch.from_numpy(out).copy_(rows)

    return {"torch index_select(out=)": index_select, "torch F.embedding": embedding}
