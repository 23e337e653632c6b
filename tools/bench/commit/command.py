"""`tierstore bench commit`: what it costs to make the rows of a commit durable, and to find them again.

Input: 100,000 updated rows of 1,032 bytes among a million (256 float32 values, two numbers of state), or the rows of
--rows. Output: commits beside cp and a sync of as many bytes, one synced transaction of LMDB, and a synced batch of
RocksDB with its log; bytes that reached the device for each byte of a row; steps of a training while its commit is
written; opening a commit of ten million rows.

Every side is given the same rows in memory and ends with them durable. The device's counter counts neighbours, too:
read it on a quiet machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tierstore.formats.run import RunLayout
from tierstore.training.live import CommitRows
from tierstore.units import format_bytes

from ..pairs import SUBJECT, Options, Result
from .sides import COPY, LMDB, ROCKSDB, Commits, copied, lmdb_side, made_store, rocksdb_side, skippable
from .steps import slowdowns

ROWS = 1_000_000
UPDATED_FRACTION = 0.1
DIM, STATE_FLOATS = 256, 2  # 1,032 bytes
RESUMED_ROWS = 10_000_000
RESUMED_RUNS = 5
TARGETS = {COPY: 0.7, LMDB: 5, ROCKSDB: 1.3}
DEVICE_FRACTION_MAX = 1.05
RESUME_US_MAX = 1.0
STEP_SLOWDOWN_MAX = 1.25


def run(folder: Path, options: Options) -> Result:
    """Measures all of it, in a temporary folder. Needs some 8 GB of disk by default; blocks for minutes."""
    num_rows = options.rows[0] if options.rows else ROWS
    num_updated = max(1, int(num_rows * UPDATED_FRACTION))
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-commit-") as name:
        work = Path(name)
        rows = np.random.default_rng(0).random((num_updated, DIM + STATE_FLOATS), dtype=np.float32).view(np.uint8)
        result = Result(f"commits of {num_updated:,} rows of {rows.shape[1]:,} bytes among {num_rows:,}")
        _commits(work, num_rows, rows, options.pairs, result)
        _resume(work, RESUMED_ROWS * num_rows // ROWS, options.pairs, result)
    found = slowdowns(folder, num_rows, num_updated, options.pairs)
    result.figure("a step while a commit is written", "x its usual time", found.wall, STEP_SLOWDOWN_MAX)
    result.figure("the same, processor time of the step's thread", "x its usual time", found.cpu)
    result.facts["steps while a commit was written"] = ", ".join(map(str, found.num_steps))
    return result


def _commits(work: Path, num_rows: int, rows: np.ndarray, rounds: int, result: Result) -> None:
    """Adds the comparison of the sides, and what each wrote to the device."""
    layout = RunLayout("table", DIM, STATE_FLOATS, seed=1)
    commits = Commits(made_store(work / "store", layout), layout, num_rows)
    draw = np.random.default_rng(1)
    sides: dict[str, Callable[[np.ndarray], None]] = {SUBJECT: lambda ids: commits.commit(ids, rows)}
    sides[COPY] = copied(work, rows)
    for side, make in ((LMDB, lmdb_side), (ROCKSDB, rocksdb_side)):
        with skippable(side, result.skipped):
            sides[side] = make(work, num_rows, rows)
    device_bytes: dict[str, list[float]] = {side: [] for side in sides}

    def timed(side: str) -> float:
        ids = np.sort(draw.permutation(num_rows)[: len(rows)])
        device = _device_sectors(work)
        began = time.perf_counter()
        sides[side](ids)
        seconds = time.perf_counter() - began
        device_bytes[side].append((_device_sectors(work) - device) * 512 / rows.nbytes)
        return seconds

    result.compare(
        "commit",
        "row",
        len(rows),
        {side: (lambda side=side: timed(side)) for side in sides},  # type: ignore[misc]
        rounds,
        TARGETS,
    )
    for side, values in device_bytes.items():
        bound = DEVICE_FRACTION_MAX if side == SUBJECT else None
        result.figure(f"{side}: device, by its counter", "bytes a byte", values[1:], bound)
    result.facts["bytes of a commit"] = format_bytes(rows.nbytes)


def _resume(work: Path, num_rows: int, rounds: int, result: Result) -> None:
    """Adds what opening a commit takes, from its files: the place of every row."""
    layout = RunLayout("table", dim=4, state_floats=0, seed=1)
    commits = Commits(made_store(work / "touched", layout), layout, 0)
    part = -(-num_rows // RESUMED_RUNS)
    rows = np.zeros((part, layout.record_bytes), dtype=np.uint8)
    for number in range(RESUMED_RUNS):
        numbers = np.arange(number * part, min(num_rows, (number + 1) * part))
        commits.add(numbers * 40 + numbers % 37, rows[: len(numbers)])  # of a table of forty times as many rows
    commit = commits.publish()
    wall_us, cpu_us, index_bytes = [], [], 0
    for _ in range(rounds):
        commits.drop_cache()
        wall, cpu = time.perf_counter(), time.process_time()
        with CommitRows(commits.store, commit, layout, 40 * num_rows + 40) as opened:
            wall_us.append((time.perf_counter() - wall) / num_rows * 1e6)
            cpu_us.append((time.process_time() - cpu) / num_rows * 1e6)
            index_bytes = opened.places.num_bytes
    result.figure(f"opening a commit of {num_rows:,} rows, cold", "us a row", wall_us, RESUME_US_MAX)
    result.figure("the same, processor time", "us a row", cpu_us)
    result.figure("its index", "bytes a row", [index_bytes / num_rows])


def _device_sectors(path: Path) -> int:
    """Sectors of 512 bytes ever written to the device of a path; 0 if the system does not say."""
    device = path.stat().st_dev
    try:
        fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    except OSError:
        return 0
    return int(fields[6])
