"""`tierstore bench NAME... --against OTHER`: this build beside another one, in turn, on the same store and keys.

Input: the other build: a checkout whose extension is built, a folder of installed packages, or a virtual environment.
Output: for each case the median ratio of rates over pairs, with the interval of a sign test. A pair is two processes,
one of each build, that run `against_side.py`; which one is first changes from pair to pair. Errors: `ConfigError`: the
other build is not one, cannot read the store, or gives other rows.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tierstore
from engram_adapter import HashSpec
from tierstore.units import format_bytes

from .. import page_cache, stores
from ..pairs import Options, Result
from ..stores import MadeStore
from . import building, overlapping
from .builds import OTHER, THIS, Build, in_turn
from .ratios import compare
from .side import CASES

WHOLE_JOBS = {"overlap": overlapping.run, "build": building.run}  # they make what they measure on themselves
NAMES = (*CASES, *WHOLE_JOBS)
PAIRS = 15
SIZE_BYTES = 1 << 30
SET_FRACTION = 1 / 32  # of the table is the working set,
DRAM_FACTOR = 3  # and the budget so many times the set;
DRAM_FACTORS = {"serve": 8}  # of a daemon, more: it keeps a part for what it counts and changes
DRAM_BYTES_MIN, TOKENS_MIN = 8 << 20, 256
COLD_TOKENS = 16_384  # keys for one cold process: none comes twice in it
CHECKED_TOKENS = 64  # whose rows all builds must agree on
EFFORT = 1.0  # part of the calls of each case


def run(name: str, folder: Path, options: Options, other: Path) -> Result:
    """Measures the benchmark `name` of this build and of the one at `other`. Needs the table's size (1 GiB) on disk."""
    if name in WHOLE_JOBS:
        return WHOLE_JOBS[name](folder, options, other)
    made, token_ids, keys = _inputs(folder, options.size_bytes or SIZE_BYTES)
    set_bytes = len(keys) * stores.ROWS_PER_TOKEN * stores.ROW_BYTES
    dram_bytes = options.dram_bytes or max(DRAM_FACTORS.get(name, DRAM_FACTOR) * set_bytes, DRAM_BYTES_MIN)
    pairs = options.pairs
    with tempfile.TemporaryDirectory(dir=folder, prefix="tierstore-bench-") as work_name:
        work = Path(work_name).absolute()
        builds = {THIS: Build.this(work), OTHER: Build.at(other, work)}
        np.save(work / "token_ids.npy", token_ids)
        np.save(work / "keys.npy", keys)
        ask: dict[str, Any] = {
            "bench": name,
            "store": str(made.path.absolute()),
            "table": stores.TABLE,
            "layer": stores.LAYER,
            "keys": str(work / "keys.npy"),
            "token_ids": str(work / "token_ids.npy"),
            "dram_bytes": dram_bytes,
            "socket": str(work / "daemon.sock"),
            "checked_tokens": CHECKED_TOKENS,
            "effort": EFFORT,
        }
        found = _measured(name, builds, ask, made, pairs)
    result = Result(f"{name}, this build beside {other}, {pairs} pairs of processes")
    compare(result, found)
    result.facts |= {
        "table, working set, DRAM": ", ".join(map(format_bytes, (made.spec.table_bytes, set_bytes, dram_bytes))),
        "keys that missed in measured runs": {side: sum(f["missed"] for f in found[side]) for side in found},
    }
    return result


def _inputs(folder: Path, size_bytes: int) -> tuple[MadeStore, np.ndarray, np.ndarray]:
    """Returns a store with a hash, tokens drawn at random as one text, and the keys [N, O] of its n-grams."""
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES, np.arange(stores.V41_VOCAB, dtype=np.int32))
    num_tokens = max(TOKENS_MIN, int(size_bytes * SET_FRACTION) // (stores.ROWS_PER_TOKEN * stores.ROW_BYTES))
    token_ids = np.random.default_rng(0).integers(0, stores.V41_VOCAB, num_tokens, dtype=np.int64)
    with tierstore.open(made.path, dram=DRAM_BYTES_MIN, placement="none") as store:
        keys = HashSpec.from_store(store).keys(token_ids[None], stores.LAYER)
    return made, token_ids, np.asarray(keys).reshape(num_tokens, len(stores.ORDERS))


def _measured(
    name: str, builds: dict[str, Build], ask: dict[str, Any], made: MadeStore, pairs: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs each build once a pair; returns what each found, by side."""
    runs = dict.fromkeys(builds, 0)

    def one(side: str) -> dict[str, Any]:
        asked = ask | {"seed": runs[side]}
        runs[side] += 1
        if name == "cold":  # fresh keys for each process: a disk, or its host, remembers what it has just read
            np.save(ask["keys"], _cold_keys(ask["keys"]))
            page_cache.drop(made.files)
        return builds[side].measure(asked)

    return in_turn({side: partial(one, side) for side in builds}, pairs, ask["store"])


def _cold_keys(keys_file: str) -> np.ndarray:
    """Returns the keys whose rows are compared, and behind them keys that nobody has asked for."""
    first = np.load(keys_file)[:CHECKED_TOKENS]
    return np.concatenate([first, stores.fresh_keys(np.random.default_rng(), COLD_TOKENS)])
