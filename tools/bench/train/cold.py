"""Steps whose rows lie on the disk: ours beside torch on a mapped file and the bare reads; and what a prefetch leaves.

Input: a store larger than the budget; every step's rows were not touched before. Output: comparisons by the wall. Sides
draw rows of their own, equally many distinct ones. Before each run the sides that use the page cache have it dropped.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tierstore
from tierstore.training.optimizers import RowWiseAdagrad
from tierstore.training.training import Training

from .. import page_cache, stores
from ..bare.loops import BareLoop
from ..pairs import SUBJECT, Options, Result, interleave
from ..stores import MadeStore
from .work import LR, ROWS_PER_TOKEN, Batches

TOKENS = 256
DRAM_BYTES = 512 << 20
RANDOM, DEFAULT, BARE = "torch, mapped, MADV_RANDOM", "torch, mapped, default advice", "bare loop"
TARGETS = {RANDOM: 4.0, DEFAULT: 25.0, BARE: 0.85}
COMPUTE_TIMES = 1.5  # how much longer than the reads the model computes
STALL_FRACTION = 0.05


def measure(folder: Path, made: MadeStore, options: Options, result: Result) -> None:
    """Adds cold steps and prefetched ones. Blocks on the disk."""
    tokens = options.tokens or TOKENS
    batches = Batches(made.spec.num_rows, tokens)
    with (
        tierstore.open_training(made.path, RowWiseAdagrad(LR), dram=options.dram_bytes or DRAM_BYTES, at=0) as training,
        BareLoop.uring(made.files) as loop,
        _mapped_file(folder, made.spec.num_rows) as file,
    ):
        sides: dict[str, Callable[[], float]] = {
            SUBJECT: partial(_cold_step, training, batches),
            BARE: partial(_bare_reads, loop, made, batches),
        }
        try:
            import torch  # noqa: F401

            sides[RANDOM] = partial(_mapped_step, file, made.spec.num_rows, batches, mmap.MADV_RANDOM)
            sides[DEFAULT] = partial(_mapped_step, file, made.spec.num_rows, batches, mmap.MADV_NORMAL)
        except ImportError:
            result.skipped[RANDOM] = "torch is not installed"
        result.compare(
            "cold step, rows touched for the first time", "reference", batches.references, sides, options.pairs, TARGETS
        )
        _prefetched(training, batches, options, result)


def _fresh_rows(batches: Batches) -> np.ndarray:
    """Returns distinct row ids that hardly anybody has touched, int64 [references]."""
    return batches.generator.choice(batches.num_rows, batches.references, replace=False)


def _step(training: Training, batches: Batches, row_ids: np.ndarray) -> float:
    table, started = training[stores.TABLE], time.perf_counter()
    table.gather(row_ids)
    table.apply(row_ids, batches.gradients)
    return time.perf_counter() - started


def _cold_step(training: Training, batches: Batches) -> float:
    return _step(training, batches, _fresh_rows(batches))


def _bare_reads(loop: BareLoop, made: MadeStore, batches: Batches) -> float:
    """The pages of as many rows, read and not looked at."""
    layout = made.layout
    pages = np.unique(_fresh_rows(batches) // layout.rows_per_page)
    shard, page = np.divmod(pages, layout.pages_per_shard)
    loop.load(np.stack([shard, page * layout.page_bytes, np.full_like(page, layout.page_bytes)], axis=1))
    return sum(loop.run())


@contextmanager
def _mapped_file(folder: Path, num_rows: int) -> Iterator[Path]:
    """A file of float32 rows, written out: a hole would be read without the disk."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="tierstore-bench-") as file:
        block = np.random.default_rng(0).random((1 << 14, stores.DIM), dtype=np.float32)
        for start in range(0, num_rows, len(block)):
            file.write(block[: min(len(block), num_rows - start)].tobytes())
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def _mapped_step(file: Path, num_rows: int, batches: Batches, advice: int) -> float:
    """A step of torch's sparse SGD, the least that torch has, on a weight that is a map of the file."""
    import torch

    row_ids = torch.from_numpy(_fresh_rows(batches))
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())  # pages that the last step changed cannot be dropped else
    page_cache.drop([file])
    weight = np.memmap(file, dtype=np.float32, mode="r+", shape=(num_rows, stores.DIM))
    base: Any = weight.base
    base.madvise(advice)
    embedding = torch.nn.Embedding(num_rows, stores.DIM, sparse=True, _weight=torch.from_numpy(weight))
    optimizer = torch.optim.SGD(embedding.parameters(), lr=LR)
    gradients = torch.from_numpy(batches.gradients)
    started = time.perf_counter()
    embedding(row_ids).backward(gradients)
    optimizer.step()
    return time.perf_counter() - started


def _prefetched(training: Training, batches: Batches, options: Options, result: Result) -> None:
    """The step after a prefetch and a long enough computation, beside the same step on rows in DRAM."""
    read_s = float(np.median([_cold_step(training, batches) for _ in range(3)]))
    warm = _fresh_rows(batches)
    _step(training, batches, warm)

    def after_prefetch() -> float:
        row_ids = _fresh_rows(batches)
        ticket = training.prefetch({stores.TABLE: row_ids})
        time.sleep(COMPUTE_TIMES * read_s)  # the model computes, on another device
        seconds = _step(training, batches, row_ids)
        ticket.wait(60)
        return seconds

    sides = {"prefetched": after_prefetch, "warm": lambda: _step(training, batches, warm)}
    found = interleave(sides, options.pairs)
    whole = [COMPUTE_TIMES * read_s + warm_s for warm_s in found["warm"]]
    stalls = [(ours - warm_s) / of for ours, warm_s, of in zip(found["prefetched"], found["warm"], whole, strict=True)]
    case = f"stall of a step with prefetch, {ROWS_PER_TOKEN * batches.tokens:,} rows, of a step's time"
    result.figure(case, "fraction", stalls, STALL_FRACTION)
