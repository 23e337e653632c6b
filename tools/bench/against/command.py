"""`tierstore bench NAME... --against OTHER`: this build beside another one, in turn, on the same store and keys.

Input: the other build: a checkout whose extension is built, a folder of installed packages, or a virtual environment.
Output: for each case the median ratio of rates over pairs, with the interval of a sign test. A pair is two processes,
one of each build, that run `against_side.py`; which one is first changes from pair to pair. Errors: `ConfigError`: the
other build is not one, cannot read the store, or gives other rows.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tierstore
from engram_adapter import HashSpec
from tierstore.errors import ConfigError
from tierstore.units import format_bytes

from .. import page_cache, stores
from ..pairs import Comparison, Grid, Options, Result, interleave
from ..stores import MadeStore
from .side import CASES

NAMES = tuple(CASES)
PAIRS = 15
SIZE_BYTES = 1 << 30
SET_FRACTION = 1 / 32  # of the table is the working set,
DRAM_FACTOR = 3  # and the budget so many times the set;
DRAM_FACTORS = {"serve": 8}  # of a daemon, more: it keeps a part for what it counts and changes
DRAM_BYTES_MIN, TOKENS_MIN = 8 << 20, 256
COLD_TOKENS = 16_384  # keys for one cold process: none comes twice in it
CHECKED_TOKENS = 64  # whose rows all builds must agree on
EFFORT = 1.0  # part of the calls of each case
RATE_MIN = 0.97
CONFIDENCE = 0.95
TIMEOUT_S = 600
THIS, OTHER = "this build", "the other"


@dataclass(frozen=True)
class Build:
    """A build of tierstore: the interpreter that runs it, and the folder that it is imported from,
    if it needs one."""

    python: str
    folder: Path | None
    cwd: Path

    @classmethod
    def this(cls, cwd: Path) -> Build:
        """The build that this process runs."""
        return cls(sys.executable, Path(tierstore.__file__).absolute().parents[1], cwd)

    @classmethod
    def at(cls, path: Path, cwd: Path) -> Build:
        """The build at `path`: a virtual environment, or a folder with the package in it. Raises `ConfigError`."""
        python = path / "bin" / "python"
        if python.exists():
            return cls(str(python.absolute()), None, cwd)
        if not (path / "tierstore" / "__init__.py").is_file():
            raise ConfigError(
                f"--against {path}: there is neither tierstore/__init__.py nor bin/python in it; give a checkout whose "
                f"extension is built (python setup.py build_ext --inplace), a folder of installed packages, or a "
                f"virtual environment"
            )
        return cls(sys.executable, path.absolute(), cwd)

    def measure(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Runs one process of this build and returns what it found. Blocks.
        Raises `ConfigError` with its last words."""
        source = Path(__file__).with_name("side.py").read_text()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if self.folder is not None:
            environment["PYTHONPATH"] = str(self.folder)
        command = [self.python, "-c", source, json.dumps(ask)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.cwd, env=environment, timeout=TIMEOUT_S, check=False
        )
        if done.returncode:
            words = "\n".join(done.stderr.strip().splitlines()[-6:])
            raise ConfigError(f"{self.folder or self.python}: bench {ask['bench']} failed in this build:\n{words}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        package = Path(found["build"]["package"])
        if self.folder is not None and package.parent.resolve() != self.folder.resolve():
            raise ConfigError(f"{self.folder}: its Python imports tierstore from {package.parent} instead")
        return found


def run(name: str, folder: Path, options: Options, other: Path) -> Result:
    """Measures the benchmark `name` of this build and of the one at `other`. Needs the table's size (1 GiB) on disk."""
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
    _compare(result, found)
    result.facts |= {
        "table, working set, DRAM": ", ".join(map(format_bytes, (made.spec.table_bytes, set_bytes, dram_bytes))),
        "keys that missed in measured runs": {side: sum(f["missed"] for f in found[side]) for side in found},
    } | {f"{side} is": found[side][0]["build"] for side in found}
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
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in builds}

    def one(side: str) -> float:
        asked = ask | {"seed": len(found[side])}
        if name == "cold":  # fresh keys for each process: a disk, or its host, remembers what it has just read
            np.save(ask["keys"], _cold_keys(ask["keys"]))
            page_cache.drop(made.files)
        found[side].append(builds[side].measure(asked))
        return 0.0

    interleave({side: partial(one, side) for side in builds}, pairs, warm_up_rounds=1)
    found = {side: of_side[1:] for side, of_side in found.items()}
    checksums = {side: {one["checksum"] for one in of_side} for side, of_side in found.items()}
    if len(set.union(*checksums.values())) > 1:
        raise ConfigError(f"{ask['store']}: the two builds give other rows for the same keys: {checksums}")
    return found


def _cold_keys(keys_file: str) -> np.ndarray:
    """Returns the keys whose rows are compared, and behind them keys that nobody has asked for."""
    first = np.load(keys_file)[:CHECKED_TOKENS]
    return np.concatenate([first, stores.fresh_keys(np.random.default_rng(), COLD_TOKENS)])


def _compare(result: Result, found: dict[str, list[dict[str, Any]]]) -> None:
    lines = []
    result.skipped |= {case: why for of_side in found.values() for case, why in of_side[0]["skipped"].items()}
    for case in [case for case in found[THIS][0]["seconds"] if case in found[OTHER][0]["seconds"]]:
        seconds = {side: [one["seconds"][case] for one in of_side] for side, of_side in found.items()}
        comparison = Comparison(case, "token", 1, seconds, {OTHER: RATE_MIN}, THIS)
        result.comparisons.append(comparison)
        ratios = comparison.ratios(OTHER)
        low, high = median_interval(ratios)
        faster = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}"
        lines.append([case, f"{comparison.ratio(OTHER):.3f}", f"{low:.3f}", f"{high:.3f}", faster])
    title = f"rate of this build / the other's: median, and its {CONFIDENCE:.0%} interval by the sign test"
    result.grids.append(Grid(title, ["case", "median", "low", "high", "this build is faster in"], lines))


def median_interval(values: list[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns an interval that holds the median of what `values` are drawn from, whatever its shape.

    The k-th value from either end, k as large as the binomial distribution with p = 1/2 allows (the sign test turned
    around); of fewer than six values, lowest and highest, which hold it less surely.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1 - confidence:
            break
        k += 1
    k = max(1, k)
    return ordered[k - 1], ordered[n - k]
