"""The placed part of `tierstore bench trace`: what a profile of one text predicts, and what another text then shows.

Input: text to profile and text to run, V4.1's hash, a table of the asked size. Output: predicted and measured hit rates
by order for each DRAM budget, beside an LRU warmed on the profiled text and a static set alone, in the same bytes; NVMe
reads with packed entries and without; how fast a store opens warm. Batches are of consecutive tokens; a key that
repeats within its batch counts as a miss each time, on every side.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tierstore
from engram_adapter import HashSpec, token_profile
from tierstore import kernels
from tierstore.decisions.item_statistics import OrderSplit
from tierstore.decisions.plan import INDEX_ENTRY_BYTES
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.layout import record_bytes
from tierstore.offline.place import place_plan
from tierstore.offline.ranked_items import ItemRanking
from tierstore.store.embedded import Embedded

from . import real_text, stores
from .pairs import Comparison, Grid, Options, Result, interleave
from .stores import MadeStore

BUDGETS = (256 << 20, 512 << 20, 1 << 30)
BATCH_TOKENS = 1024
LRU_WARM_TOKENS = 3_000_000  # of the profiled text, the last ones: many times what the caches here hold
READ_BYTES = 8 << 20
ALIGNMENT_BYTES = 4096
OPEN = "opening warm"
SEQUENTIAL = "bare sequential read"


@dataclass(frozen=True)
class Run:
    """One text's keys through a store. rates: hits by order and in all; very_stream: the same, simulated beforehand."""

    rates: np.ndarray
    very_stream: np.ndarray
    reads_per_token: float
    record: dict[str, Any]


def run_placed(folder: Path, options: Options, size_bytes: int, result: Result) -> None:
    """Profiles, plans, places and runs; adds grids and figures to `result`. Blocks, minutes."""
    training, held_out = real_text.load_split()
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES, training.token_map)
    image = read_catalog(made.path)
    spec = HashSpec.from_catalog(image)
    keys = _keys_of(spec, held_out.documents)
    budgets = options.budgets or BUDGETS
    with tempfile.TemporaryDirectory(dir=folder, prefix="tierstore-bench-") as work:
        seconds, profile = _profile(made.path, training, Path(work))
        tokens = sum(map(len, training.documents))
        result.figure("profile: counting and curves", "tokens/s", [tokens / seconds])
        runs = {dram_bytes: _planned_run(made, profile, dram_bytes, 0, keys) for dram_bytes in budgets}
        _add_rates(result, spec, runs, made, profile, training.documents, keys)
        _add_opening(result, made, budgets[-1], options)
        _add_reads(result, made, profile, budgets[0], runs[budgets[0]], keys)
    _add_cold_start(result, spec, training.documents, keys, budgets[0])
    stores.unplace(made.path)
    result.facts["profiled and run"] = f"{training.source}; {held_out.source}, {len(keys):,} tokens"


def _keys_of(spec: HashSpec, documents: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([spec.keys(document[None], stores.LAYER)[0] for document in documents])


def _profile(store: Path, text: real_text.RealText, work: Path) -> tuple[float, tierstore.Profile]:
    trace = text.write_trace(work / "text.trace")
    started = time.perf_counter()
    profile = token_profile(store, trace, output=work / "text.profile")
    return time.perf_counter() - started, profile


def _planned_run(
    made: MadeStore, profile: tierstore.Profile, dram_bytes: int, nvme_bytes: int, keys: np.ndarray
) -> Run:
    plan = tierstore.plan(made.path, profile, dram_bytes, 0, nvme_bytes, batch_tokens=BATCH_TOKENS)
    (record,) = plan.to_dict()["groups"]
    record["short"] = dict(zip(("low", "high"), plan.groups[0].interval(len(keys)), strict=True))
    made_placement = place_plan(made.path, plan)
    if made_placement is None:
        raise ConfigError(f"--dram {dram_bytes}: the plan places nothing there; give more, or a larger --size")
    placed = made_placement.placement
    record["placement_bytes"], record["placed"] = placed.num_bytes, placed.tables[stores.TABLE]
    out = stores.rows_buffer(BATCH_TOKENS)
    with tierstore.open(made.path, dram=dram_bytes) as store:
        table = store[stores.TABLE]
        very_stream = _simulated(table, store.stats()["placement"]["recency_sets"][stores.TABLE], keys)
        for start in range(0, len(keys), BATCH_TOKENS):
            part = keys[start : start + BATCH_TOKENS]
            table.lookup(part, out[: len(part)])
            if start % (BATCH_TOKENS * 100) == 0:
                made.check(part, out[: len(part)])
        stats = store.stats()
    orders = stats["tables"][stores.TABLE]["orders"].values()
    nvme, total = (np.array([sum(of.values()) if every else of["nvme"] for of in orders]) for every in (False, True))
    reads = (stats["pages_read"] + stats["entries_read"]) / len(keys)
    return Run(_with_all(total - nvme, total), very_stream, reads, record)


def _simulated(table: tierstore.Table, num_sets: int, keys: np.ndarray) -> np.ndarray:
    """What this very stream will hit: which keys are static, and the cache's own code over the others."""
    static = table.explain(keys) == "static"
    hits = static.reshape(-1) | _recency_hits(np.where(static, -1, keys), num_sets)
    return _rates_of(hits.reshape(keys.shape))


def _recency_hits(keys: np.ndarray, num_sets: int) -> np.ndarray:
    num_orders = keys.shape[1]
    order_index = np.tile(np.arange(num_orders, dtype=np.uint8), len(keys))
    ends = np.append(np.arange(BATCH_TOKENS, len(keys), BATCH_TOKENS), len(keys)) * num_orders
    return kernels.simulate_cache(order_index, keys.reshape(-1), ends, num_sets)


def _rates_of(hits: np.ndarray) -> np.ndarray:
    return _with_all(hits.sum(axis=0), np.full(hits.shape[1], len(hits)))


def _with_all(hits: np.ndarray, accesses: np.ndarray) -> np.ndarray:
    return np.append(hits / accesses, hits.sum() / accesses.sum())


def _add_rates(
    result: Result,
    spec: HashSpec,
    runs: dict[int, Run],
    made: MadeStore,
    profile: tierstore.Profile,
    training: list[np.ndarray],
    keys: np.ndarray,
) -> None:
    warm = _keys_of(spec, _last_documents(training, LRU_WARM_TOKENS))
    lru = _lru_rates(warm, keys, [size // (stores.ENTRY_BYTES + 16) for size in runs])
    columns = ["DRAM", "", *(f"order {order}" for order in stores.ORDERS), "all"]
    lines: list[list[Any]] = []
    for (dram_bytes, run), lru_rates in zip(runs.items(), lru, strict=True):
        static = _static_rates(made, profile, dram_bytes, keys)
        record = run.record
        shown = {
            "measured": run.rates,
            "predicted, this very stream": run.very_stream,
            "predicted from the profile": np.array(list(record["hit_rate"].values())),
            "its 95 % interval, as the plan prints it: low": np.array(list(record["low"].values())),
            "high": np.array(list(record["high"].values())),
            "for a stream as short as this one: low": np.array(list(record["short"]["low"].values())),
            "high, so short": np.array(list(record["short"]["high"].values())),
            "LRU warmed on the profiled text": lru_rates,
            "static alone": static,
        }
        name = f"{dram_bytes >> 20} MiB"
        lines += [[name, what, *(round(float(rate), 4) for rate in rates)] for what, rates in shown.items()]
        off = np.abs(run.rates - run.very_stream).max() * 100
        result.figure(f"{name}: measured off predicted for the very stream", "points", [off], 1.0)
        outside = max(record["low"]["all"] - run.rates[-1], run.rates[-1] - record["high"]["all"], 0.0) * 100
        result.figure(f"{name}: measured outside the 95 % interval", "points", [outside], 0.0)
        wide = max(record["hit_rate"]["all"] - record["low"]["all"], record["high"]["all"] - record["hit_rate"]["all"])
        result.figure(f"{name}: interval, either side", "points", [wide * 100], 6.0)
        for what, rates in (("LRU", lru_rates), ("static alone", static)):
            better = float(run.rates[-1] - rates[-1]) * 100
            result.figure(f"{name}: better than {what}", "points", [better], 2.0, at_least=True)
        placed = record["placed"]
        over = 1 - placed.num_entries * placed.entry_bytes / (record["placement_bytes"] - placed.index_bytes)
        result.figure(f"{name}: placement beyond entries and index", "%", [over * 100], 2.0)
    result.grids.append(Grid(f"hit rates, batches of {BATCH_TOKENS:,} tokens", columns, lines))


def _last_documents(documents: list[np.ndarray], num_tokens: int) -> list[np.ndarray]:
    ends = np.cumsum([len(document) for document in reversed(documents)])
    return documents[-(int(np.searchsorted(ends, num_tokens)) + 1) :]


def _lru_rates(warm: np.ndarray, keys: np.ndarray, capacities: list[int]) -> list[np.ndarray]:
    """Hit rates of `keys` in caches that keep what was used last, after `warm`: exact stack distances."""
    both = np.concatenate([warm, keys])
    salted = both ^ (np.arange(both.shape[1]) * np.int64(0x1E3779B97F4A7C15))  # orders apart
    _, items = np.unique(salted, return_inverse=True)
    items = items.reshape(-1)
    # Within its batch a key does not profit from itself, as in the store:
    # it shares the fate of the first access to it there.
    batch = np.arange(len(both)).repeat(both.shape[1]) // BATCH_TOKENS
    _, first, place = np.unique(batch * (items.max() + 1) + items, return_index=True, return_inverse=True)
    distances = kernels.stack_distances(items)[first][place.reshape(-1)]
    ours = distances.reshape(both.shape)[len(warm) :]
    return [_rates_of((ours >= 0) & (ours < capacity)) for capacity in capacities]


def _static_rates(made: MadeStore, profile: tierstore.Profile, dram_bytes: int, keys: np.ndarray) -> np.ndarray:
    plan = tierstore.plan(made.path, profile, dram_bytes, batch_tokens=BATCH_TOKENS, fractions=(0.0,))
    num_entries = int(dram_bytes / (record_bytes(stores.ENTRY_BYTES) + INDEX_ENTRY_BYTES))
    with profile.open() as reader:
        order_index, items = ItemRanking(reader, plan.rankings[0]).first(num_entries)
    placed = profile.mapping.keys_of(items, order_index, stores.TABLE)
    hits = [np.isin(keys[:, order], placed[order_index == order]) for order in range(keys.shape[1])]
    return _rates_of(np.stack(hits, axis=1))


def _add_opening(result: Result, made: MadeStore, dram_bytes: int, options: Options) -> None:
    """How fast the store opens with the current placement, beside a bare read of as many bytes of the same file."""
    image = read_catalog(made.path)
    assert image.epoch is not None
    file = made.path / image.placements[image.epoch].file
    lookups: list[float] = []
    loaded = [0]

    def opening() -> float:
        started = time.perf_counter()
        with tierstore.open(made.path, dram=dram_bytes) as store:
            seconds = time.perf_counter() - started
            loaded[0] = store.stats()["placement"]["static_bytes"]
            lookups.append(_first_beside_later(store))
        return seconds

    def bare() -> float:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        buffer = np.empty(READ_BYTES + ALIGNMENT_BYTES, dtype=np.uint8)
        start = -buffer.ctypes.data % ALIGNMENT_BYTES
        view = buffer[start : start + READ_BYTES].data
        try:
            started = time.perf_counter()
            for at in range(0, loaded[0], READ_BYTES):
                os.preadv(fd, [view[: min(READ_BYTES, loaded[0] - at)]], at)
            return time.perf_counter() - started
        finally:
            os.close(fd)

    seconds = interleave({OPEN: opening, SEQUENTIAL: bare}, options.pairs)
    case = f"opening with {loaded[0] >> 20} MiB placed"
    result.comparisons.append(Comparison(case, "KiB", loaded[0] / 1024, seconds, {SEQUENTIAL: 0.7}, subject=OPEN))
    result.figure("first lookup of placed keys after opening, to later ones", "times", lookups)


def _first_beside_later(store: tierstore.Store) -> float:
    """Seconds of the first lookup of 2,048 tokens of placed keys over the median of ten later ones of others."""
    assert isinstance(store._backing, Embedded)
    placed = store._backing._placed
    assert placed is not None
    part = placed.placement.tables[stores.TABLE]
    rng = np.random.default_rng(0)
    tokens = np.full((11, 2048, len(stores.ORDERS)), -1, dtype=np.int64)
    for order, index in enumerate(part.indexes):
        buckets = np.fromfile(placed.path, np.uint8, index.num_bytes, offset=index.byte_start).view(
            kernels.INDEX_BUCKET
        )
        there = buckets["keys"][(buckets["keys"] >= 0) & (buckets["places"] < part.num_entries // 2)]
        tokens[:, :, order] = rng.choice(there, tokens.shape[:2])
    out = stores.rows_buffer(2048)
    seconds = []
    for keys in tokens:
        started = time.perf_counter()
        store[stores.TABLE].lookup(keys, out)
        seconds.append(time.perf_counter() - started)
    return seconds[0] / statistics.median(seconds[1:])


def _add_reads(
    result: Result,
    made: MadeStore,
    profile: tierstore.Profile,
    dram_bytes: int,
    without: Run,
    keys: np.ndarray,
) -> None:
    """NVMe reads a token where every n-gram that was counted twice or more is packed, beside without."""
    num_packed = _num_counted_twice(profile)
    nvme_bytes = num_packed * record_bytes(stores.ENTRY_BYTES)
    packed = _planned_run(made, profile, dram_bytes, nvme_bytes, keys)
    fewer = (1 - packed.reads_per_token / without.reads_per_token) * 100
    case = f"NVMe reads a token, {dram_bytes >> 20} MiB"
    result.figure(f"{case}, without packed entries", "reads", [without.reads_per_token])
    result.figure(f"{case}, {num_packed:,} packed", "reads", [packed.reads_per_token])
    result.figure(f"{case}: fewer", "%", [fewer], 25.0, at_least=True)


def _num_counted_twice(profile: tierstore.Profile) -> int:
    """N-grams of all orders that occurred twice or more, held-out documents included."""
    split = OrderSplit(profile.header)
    with profile.open() as reader:
        blocks = itertools.chain((split.add(*block) for block in reader.items()), [None])
        parts = (part for block in blocks for part in (split.end() if block is None else block))
        return sum(int(np.count_nonzero(sums.sum(axis=1) >= 2)) for _, _, _, sums in parts)


def _add_cold_start(
    result: Result, spec: HashSpec, training: list[np.ndarray], keys: np.ndarray, dram_bytes: int
) -> None:
    """With nothing placed: hits after as many tokens as fill the cache, beside hits after a long stream;
    same text after both."""
    warm = _keys_of(spec, _last_documents(training, LRU_WARM_TOKENS))
    num_sets = dram_bytes // (256 + 8 * stores.ENTRY_BYTES)
    fill = max(1, num_sets * 8 // keys.shape[1])
    rates = []
    for before in (warm[-fill:], warm):
        hits = _recency_hits(np.concatenate([before, keys]), num_sets).reshape(-1, keys.shape[1])
        rates.append(_rates_of(hits[len(before) :])[-1])
    case = f"nothing placed, {dram_bytes >> 20} MiB: hits after {fill:,} tokens, to those after {len(warm):,}"
    result.figure(case, "%", [rates[0] / rates[1] * 100], 90.0, at_least=True)
