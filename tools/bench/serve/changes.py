"""Changes of a daemon while its clients look up: replans, swaps, its death and return, and how well replans follow the
traffic.

Input: the setting of `serve`. Output: figures: how long each change takes, what the slowest lookup of a client took
meanwhile beside its usual p99, and hit rates before and after the traffic shifts to other keys, beside those of a plan
made for the new traffic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import tierstore
from tierstore.decisions.replan import Entries, fresh_choice
from tierstore.decisions.shared_budget import DEFAULT_STATIC_FRACTION
from tierstore.errors import DaemonError
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen

from .. import page_cache, stores
from ..pairs import Result
from ..stores import MadeStore
from .clients import Clients
from .launcher import Served

if TYPE_CHECKING:
    from .setting import Setting

GIB = 1 << 30
STARTS_MAX = 3
WATCHERS = 2
QUIET_S = 2.0
ATTACH_WAIT_S, ATTACH_POLL_S = 60.0, 0.002
SHIFT_DRAM_FRACTION, SHIFT_DRAM_BYTES_MIN = 1 / 64, 8 << 20  # of the table
SHIFT_ENTRIES_FACTOR = 8  # bytes of all entries that are asked for, for each byte of the budget
SHIFT_TABLE_FRACTION = 1 / 2  # of the table, at most
SHIFT_TOKENS = 40_000  # between two replans
ZIPF_EXPONENT = 1.0
BATCH_TOKENS = 512
FIRST_REPLANS = 2
REPLANS = "after one replan", "after two replans"


def measure_readiness(setting: Setting, result: Result) -> None:
    """Starts daemons with a cold page cache: how long until they serve, and at what rate their tiers come to be.

    Memory that a virtual machine has not touched before comes several times more slowly than what it has:
    see the extremes.
    """
    ready_s, rates = [], []
    for _ in range(min(STARTS_MAX, setting.options.pairs)):
        page_cache.drop([*setting.made.files, *setting.made.path.glob("placements/*")])
        with setting.serve("start") as served:
            ready_s.append(served.ready_s)
            rates.append(served.stat().memory.used_bytes / served.warmed_s / GIB)
    result.figure("from the daemon's start to its first answer", "s", ready_s)
    result.figure("warming: the tiers' memory made, their static part read", "GiB/s", rates)


def measure(setting: Setting, result: Result) -> None:
    """Replans, swaps, kills and restarts a daemon whose clients look up one token after the other."""
    made = setting.made
    with (
        setting.serve("changes") as served,
        Clients(made.path, setting.save(setting.keys), WATCHERS, socket=str(served.socket)) as clients,
    ):
        quiet = _watched(clients, lambda: time.sleep(QUIET_S))
        result.figure("one token while nothing changes, p99", "us", _each(quiet, "p99_s"))
        result.figure("one token while nothing changes, slowest", "us", _each(quiet, "max_s"))
        replan: dict[str, Any] = {}
        _add_slowest(result, "a replan", _watched(clients, lambda: replan.update(served.ask("replan"))))
        steps = max(1, replan["steps"])
        result.figure("a step of a replan", "ms", [1e3 * replan["seconds"] / steps])
        result.facts["entries and steps of that replan"] = (replan["entered"], replan["steps"])
        swaps: list[dict[str, Any]] = []

        def ask(request: dict[str, str]) -> None:
            swaps.append(served.ask(**request))

        requests = {"do": "swap", "store": str(setting.second.path)}, {"do": "rollback"}
        for version, request in zip((setting.second, made), requests, strict=True):
            page_cache.drop(version.files)
            watched = _watched(clients, partial(ask, request))
            _add_slowest(result, f"a {request['do']}", watched)
            _check(version, served, setting.keys)
        result.figure("a swap, until all clients moved", "s", [swap["seconds"] for swap in swaps])
        result.facts["entries warm when clients moved, and filled in afterwards"] = [
            (swap["warmed"], swap["filled"]) for swap in swaps
        ]
        _measure_return(served, clients, result)
        _check(made, served, setting.keys)


def _check(made: MadeStore, served: Served, keys: np.ndarray) -> None:
    with tierstore.connect(served.socket) as store:
        for start in range(0, len(keys), BATCH_TOKENS):
            part = keys[start : start + BATCH_TOKENS]
            made.check(part, store[stores.TABLE].lookup(part))


def _watched(clients: Clients, change: Callable[[], Any]) -> list[dict[str, Any]]:
    with clients.watch() as answers:
        change()
    return answers


def _each(answers: list[dict[str, Any]], name: str) -> list[float]:
    return [1e6 * answer[name] for answer in answers]


def _add_slowest(result: Result, change: str, answers: list[dict[str, Any]]) -> None:
    result.figure(f"one token during {change}, p99", "us", _each(answers, "p99_s"))
    result.figure(f"one token during {change}, slowest", "us", _each(answers, "max_s"))
    misses = sum(answer["misses"] for answer in answers) / max(1, sum(answer["lookups"] for answer in answers))
    result.facts[f"keys that missed during {change}, a lookup"] = round(misses, 4)


def _measure_return(served: Served, clients: Clients, result: Result) -> None:
    """Kills the daemon and starts it again, while its clients look up."""
    attached_s = 0.0

    def killed_and_back() -> None:
        nonlocal attached_s
        served.kill()
        served.start()
        started = time.perf_counter()
        while served.stat().clients.attached < WATCHERS:
            if time.perf_counter() > started + ATTACH_WAIT_S:
                raise DaemonError(f"clients are not attached again within {ATTACH_WAIT_S} s; see the lines above")
            time.sleep(ATTACH_POLL_S)
        attached_s = time.perf_counter() - started

    watched = _watched(clients, killed_and_back)
    result.figure("the daemon killed and started: until it serves", "s", [served.ready_s])
    result.figure("from then until all clients are attached again", "s", [attached_s])
    _add_slowest(result, "the daemon's absence and return", watched)


def measure_shift(setting: Setting, result: Result) -> None:
    """Shifts the traffic to other keys, and replans: hit rates,
    beside those of a placement made for the new traffic."""
    made, spec = setting.made, setting.made.spec
    dram_bytes = max(int(spec.table_bytes * SHIFT_DRAM_FRACTION), SHIFT_DRAM_BYTES_MIN)
    set_bytes = min(SHIFT_ENTRIES_FACTOR * dram_bytes, int(spec.table_bytes * SHIFT_TABLE_FRACTION))
    num_tokens = set_bytes // (stores.ROWS_PER_TOKEN * stores.ROW_BYTES)
    page_cache.bring_in(made.files)
    traffic = _Traffic(num_tokens)
    socket = setting.work / "shift.sock"
    options = ("--replan", "off", "--io", "mmap")  # hit rates are what counts, not how misses are read
    with Served(made.path, socket, dram_bytes, *options) as served:
        rates = _rates_by_replans(served, traffic)
        (num_slots,) = served.stat().epochs.static_slots.values()
    chosen = fresh_choice(traffic.counted(), num_slots)
    place_entries(made.path, {stores.TABLE: Chosen(chosen.order_index, chosen.keys, DEFAULT_STATIC_FRACTION)})
    try:
        with Served(made.path, socket, dram_bytes, *options) as served:
            fresh = _rate_when_warm(served, traffic)
    finally:
        stores.unplace(made.path)
    for when, rate in {**rates, "with a plan made for the new traffic": fresh}.items():
        result.figure(f"hit rate {when}", "%", [100 * rate])
    for replans in REPLANS:
        part = 100 * rates[replans] / fresh
        result.figure(f"{replans}, part of that of such a plan", "%", [part], bound=90.0, at_least=True)


def _rates_by_replans(served: Served, traffic: _Traffic) -> dict[str, float]:
    with tierstore.connect(served.socket, io="mmap") as store:
        for _ in range(FIRST_REPLANS):
            traffic.hit_rate(store)
            served.ask("replan")
        rates = {"before the traffic shifts": traffic.hit_rate(store)}
        traffic.shift()
        rates["while it shifts"] = traffic.hit_rate(store)
        for replans in REPLANS:
            served.ask("replan")
            rates[replans] = traffic.hit_rate(store)
    return rates


def _rate_when_warm(served: Served, traffic: _Traffic) -> float:
    with tierstore.connect(served.socket, io="mmap") as store:
        traffic.hit_rate(store)
        return traffic.hit_rate(store)


class _Traffic:
    """Tokens asked for by Zipf's law: the k-th of them k ** ZIPF_EXPONENT times as seldom as the first."""

    def __init__(self, num_tokens: int) -> None:
        self._generator = np.random.default_rng()
        self._keys = stores.fresh_keys(self._generator, num_tokens)
        weights = np.arange(1, num_tokens + 1) ** -ZIPF_EXPONENT
        self._ends = np.cumsum(weights) / weights.sum()
        self._counts = np.zeros(num_tokens, dtype=np.uint32)
        self._out = stores.rows_buffer(BATCH_TOKENS)

    def shift(self) -> None:
        """Gives every rank to another token, and counts anew."""
        self._keys = self._keys[self._generator.permutation(len(self._keys))]
        self._counts[:] = 0

    def hit_rate(self, store: tierstore.Store) -> float:
        """Looks SHIFT_TOKENS tokens up, and returns the share of their keys that hit."""
        ranks = np.searchsorted(self._ends[:-1], self._generator.random(SHIFT_TOKENS))
        self._counts += np.bincount(ranks, minlength=len(self._keys)).astype(np.uint32)
        misses = int(store.stats()["hits"]["nvme"])
        for start in range(0, SHIFT_TOKENS, BATCH_TOKENS):
            part = self._keys[ranks[start : start + BATCH_TOKENS]]
            store[stores.TABLE].lookup(part, self._out[: len(part)])
        misses = int(store.stats()["hits"]["nvme"]) - misses
        return 1 - misses / (SHIFT_TOKENS * self._keys.shape[1])

    def counted(self) -> Entries:
        """Returns what was looked up since the last shift, exactly."""
        pairs = stores.key_pairs(self._keys)
        order_index, keys = pairs[:, 0].astype(np.uint8), np.ascontiguousarray(pairs[:, 1])
        return Entries(order_index, keys, np.repeat(self._counts, self._keys.shape[1]))
