"""`tierstore bench serve`: lookups through a daemon's shared memory, beside the same lookups in a store of one's own.

Input: a table, of which a working set fits the budget: half of it static by a placement, half in the recency cache.
Output: rates of attached lookups beside those in process, of one process and of many; how even many clients fare; what
memory all take together; lookups by gRPC; and what `serve_changes` measures, of changes while clients look up. The
daemon is a process of its own, and so is each of many clients.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

import tierstore
from tierstore.errors import ConfigError
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen
from tierstore.units import format_bytes

from .. import stores
from ..pairs import Options, Result, p50, seconds_of_all
from ..stores import MadeStore
from . import changes as serve_changes
from . import remote
from .clients import Clients
from .launcher import Served, proportional_bytes
from .setting import Setting

SIZE_BYTES = 2 << 30
SET_FRACTION = 1 / 16  # of the table is the working set
DRAM_FACTOR = 2.75  # budget for each byte of the working set,
STATIC_FRACTION = 0.4  # of which so much is for the static half
DRAM_BYTES_MIN = 8 << 20
TOKENS, ONE_TOKEN_LOOKUPS = 2048, 2000
BATCHES_A_ROUND = 8
FILL_ROUNDS_MAX, FILL_PAUSE_S = 20, 0.2  # the daemon reads what attached lookups missed within that
HELD_SHARE_MIN = 0.95
CLIENTS, MANY_CLIENTS, OWN_STORES = 8, 64, 2
STRETCH_S, MANY_STRETCH_S = 1.0, 3.0
REMOTE_US_MAX, REMOTE_MB_PER_S_MIN = 1000.0, 600.0  # what lookups by gRPC are to keep to,
BARE_TIME_MAX, BARE_RATE_MIN = 1.5, 0.8  # beside bare gRPC, which sends as many bytes that nobody looked up
SECOND_FOLDER, SECOND_SEED = "second", 1  # of the version that is swapped in
MIB = 1 << 20
ATTACHED, OWN = "attached", "in process"


def run(folder: Path, options: Options) -> Result:
    """Measures a daemon and its clients. Needs twice the table's size on disk (2 GiB by default);
    both stay for the next run."""
    size_bytes = options.size_bytes or SIZE_BYTES
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES)
    second_folder = folder / stores.FOLDER / SECOND_FOLDER
    second = stores.make_store(second_folder, size_bytes // stores.ROW_BYTES, seed=SECOND_SEED)
    set_bytes = int(size_bytes * SET_FRACTION)
    dram_bytes = options.dram_bytes or max(int(set_bytes * DRAM_FACTOR), DRAM_BYTES_MIN)
    keys = stores.fresh_keys(np.random.default_rng(), set_bytes // (stores.ROWS_PER_TOKEN * stores.ROW_BYTES))
    result = Result(f"serve, {format_bytes(set_bytes)} of a table of {format_bytes(made.spec.table_bytes)}, all hits")
    with tempfile.TemporaryDirectory(dir=folder, prefix="tierstore-bench-") as work:
        setting = Setting(made, second, keys, dram_bytes, Path(work), options)
        with _half_placed(made, keys):
            serve_changes.measure_readiness(setting, result)
            with setting.serve("steady", "--listen", "127.0.0.1:0") as served:
                held = _measure_one_process(setting, served, result)
                _measure_together(setting, served, held, result)
                _measure_many(setting, served, held, result)
                _measure_remote(served, held, options, result)
            serve_changes.measure(setting, result)
        serve_changes.measure_shift(setting, result)
    result.facts |= {"DRAM budget, of the daemon and of each store in process": format_bytes(dram_bytes)}
    result.facts["load average at the end, on so many cores"] = (round(os.getloadavg()[0], 1), os.cpu_count())
    return result


@contextlib.contextmanager
def _half_placed(made: MadeStore, keys: np.ndarray) -> Iterator[None]:
    """Places the first half of the keys' entries; the next run begins without a placement again."""
    pairs = stores.key_pairs(keys[: len(keys) // 2])
    order_index, placed_keys = pairs[:, 0].astype(np.uint8), np.ascontiguousarray(pairs[:, 1])
    place_entries(made.path, {stores.TABLE: Chosen(order_index, placed_keys, STATIC_FRACTION)})
    try:
        yield
    finally:
        stores.unplace(made.path)


def _measure_one_process(setting: Setting, served: Served, result: Result) -> np.ndarray:
    """One process that has the store both ways; returns the keys that both hold."""
    tokens = setting.options.tokens or TOKENS
    with (
        tierstore.connect(served.socket) as attached,
        tierstore.open(setting.made.path, dram=setting.dram_bytes) as own,
    ):
        tables = {ATTACHED: attached[stores.TABLE], OWN: own[stores.TABLE]}
        held = _filled(setting, tables)
        generator, out, row = np.random.default_rng(), stores.rows_buffer(tokens), stores.rows_buffer(1)

        def drawn(count: int, tokens: int) -> list[np.ndarray]:
            return list(held[generator.integers(0, len(held), (count, tokens))])

        def compare(case: str, tokens: int, seconds_of: Callable[[tierstore.Table], float]) -> None:
            sides = {side: partial(seconds_of, table) for side, table in tables.items()}
            rows, rounds = tokens * stores.ROWS_PER_TOKEN, setting.options.pairs
            result.compare(case, "row", rows, sides, rounds, {OWN: 0.9}, subject=ATTACHED)

        misses = _misses(attached, own)
        compare("one token, p50, through Python", 1, lambda table: p50(table.lookup, drawn(ONE_TOKEN_LOOKUPS, 1), row))
        compare(
            f"{tokens:,} tokens",
            BATCHES_A_ROUND * tokens,
            lambda table: seconds_of_all(table.lookup, drawn(BATCHES_A_ROUND, tokens), out),
        )
        result.facts["keys that missed in one process's runs"] = _misses(attached, own) - misses
    return held


def _filled(setting: Setting, tables: Mapping[str, tierstore.Table]) -> np.ndarray:
    """Looks all keys up, checking their rows, until no table reads from disk any more;
    returns the keys that all hold."""
    in_memory = [tierstore.kernels.SOURCES.index(source) for source in ("static", "recency")]
    for _ in range(FILL_ROUNDS_MAX):
        for start in range(0, len(setting.keys), 512):
            part = setting.keys[start : start + 512]
            for table in tables.values():
                setting.made.check(part, table.lookup(part))
        held = np.ones(len(setting.keys), dtype=bool)
        for table in tables.values():
            held &= np.isin(table.locate(setting.keys), in_memory).all(axis=1)
        if held.all():
            break
        time.sleep(FILL_PAUSE_S)
    if held.mean() < HELD_SHARE_MIN:
        raise ConfigError(f"--dram {setting.dram_bytes}: {held.mean():.0%} of the working set is held; give more")
    return setting.keys[held]


def _misses(*all_stores: tierstore.Store) -> int:
    return sum(int(store.stats()["hits"]["nvme"]) for store in all_stores)


def _measure_together(setting: Setting, served: Served, held: np.ndarray, result: Result) -> None:
    """Attached processes together, beside as many stores in process as there are cores;
    and what memory the former take."""
    file, tokens = setting.save(held), setting.options.tokens or TOKENS
    misses = 0
    with (
        Clients(setting.made.path, file, CLIENTS, socket=str(served.socket)) as attached,
        Clients(setting.made.path, file, OWN_STORES, dram=setting.dram_bytes) as own,
    ):
        subject, other = f"{CLIENTS} {ATTACHED} processes", f"{OWN_STORES} processes, a store {OWN} each"

        def seconds_of(clients: Clients, batch: int) -> float:
            """Seconds of the whole host for one lookup."""
            nonlocal misses
            answers = clients.stretch(batch, STRETCH_S)
            misses += sum(answer["misses"] for answer in answers)
            return STRETCH_S / max(1, sum(answer["lookups"] for answer in answers))

        for batch in (1, tokens):
            sides = {subject: partial(seconds_of, attached, batch), other: partial(seconds_of, own, batch)}
            case = f"{'one token' if batch == 1 else f'{batch:,} tokens'}, all processes together"
            rows = batch * stores.ROWS_PER_TOKEN
            result.compare(case, "row", rows, sides, setting.options.pairs, {other: 0.9}, subject=subject)
        result.facts["keys that missed in runs of all processes together"] = misses
        taken = proportional_bytes([served.pid, *attached.pids])
    budget_bytes = served.stat().memory.budget_bytes
    case = f"shared memory of the daemon and {CLIENTS} clients (PSS), part of one budget"
    result.figure(case, "%", [100 * taken["Pss_Shmem"] / budget_bytes], bound=100.0)
    result.figure("the same with all else that these processes take", "MiB", [taken["Pss"] / MIB])
    result.figure("one budget", "MiB", [budget_bytes / MIB])


def _measure_many(setting: Setting, served: Served, held: np.ndarray, result: Result) -> None:
    """How even many clients fare that look up one token at a time."""
    shares, together = [], []
    with Clients(setting.made.path, setting.save(held), MANY_CLIENTS, socket=str(served.socket)) as clients:
        for _ in range(setting.options.pairs):
            lookups = [answer["lookups"] for answer in clients.stretch(1, MANY_STRETCH_S)]
            shares.append(min(lookups) * len(lookups) / max(1, sum(lookups)))
            together.append(sum(lookups) / MANY_STRETCH_S)
    case = f"{MANY_CLIENTS} clients of one token: "
    result.figure(f"{case}the slowest, part of their mean", "", shares, bound=0.5, at_least=True)
    result.figure(f"{case}together", "lookups/s", together)


def _measure_remote(served: Served, held: np.ndarray, options: Options, result: Result) -> None:
    """The daemon's own gRPC, over the loopback."""
    server = served.stat().remote
    assert server is not None, "it was started with --listen"
    url = f"grpc://{server.address}"
    tokens = options.tokens or TOKENS
    with remote.serving_bare() as bare:
        found = remote.measure(url, keys=held, tokens=tokens, bare=bare)
    case, mb_per_s = "gRPC over the loopback: ", [found["streamed_mb_per_s"]]
    result.figure(f"{case}one token, p50", "us", [found["one_token_p50_us"]], bound=REMOTE_US_MAX)
    result.figure(f"{case}batches of {tokens:,} tokens", "MB/s", mb_per_s, bound=REMOTE_MB_PER_S_MIN, at_least=True)
    result.figure(f"{case}one token, time to bare gRPC's", "x", [found["one_token_to_bare"]], bound=BARE_TIME_MAX)
    rate = [found["streamed_to_bare"]]
    result.figure(f"{case}batches, rate to bare gRPC's", "x", rate, bound=BARE_RATE_MIN, at_least=True)
