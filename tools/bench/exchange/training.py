"""Training over two ranks: steps of ours beside the same with duplicates sent, and TorchRec's; bytes on the wire.

Input: two stores of the slices of a table, one for each side that writes. Output: seconds of steps, forward, backward
and row-wise Adagrad, of batches that repeat rows as text does; bytes that ranks send to each other, to those of the
distinct rows. Before anything is timed, ours and the side with duplicates take the same steps, and must have the same
rows. Gradients are given: no model is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tierstore
from tierstore.errors import ConfigError

from .. import stores
from ..pairs import SUBJECT, Result
from ..train.work import LR, Batches
from . import rank_group
from .duplicates import DuplicatesSent
from .wire import Wire

if TYPE_CHECKING:
    from engram_adapter.exchange import Ranks

TOKENS = 2_048
DUPLICATES, TORCHREC = "duplicates sent", "TorchRec"
TARGETS = {DUPLICATES: 1.4, TORCHREC: 3.0}
BYTES_BOUND = 1.03  # of the distinct rows, both ways
CHECKED_STEPS = 3


def measure(paths: list[list[Path]], tokens: int | None, pairs: int, threads: int, result: Result) -> None:
    """Adds steps and bytes. Blocks. paths: for either side, the stores of the ranks' slices."""
    given = {
        "paths": [list(map(str, each)) for each in paths], "tokens": tokens or TOKENS, "pairs": pairs,
        "threads": threads,
    }  # fmt: skip
    found = rank_group.run("training", given)
    case = f"training over {len(paths[0])} ranks, {tokens or TOKENS:,} tokens each, row-wise Adagrad"
    rank_group.add(result, case, "reference", found["references"], found["steps"], TARGETS)
    result.figure("bytes that ranks send, to those of distinct rows, both ways", "", found["bytes"], BYTES_BOUND)
    if found["torchrec"]:
        result.skipped[TORCHREC] = found["torchrec"]


def work(ranks: Ranks, given: Mapping[str, Any]) -> dict[str, Any]:
    """Is a rank."""
    from . import torchrec_side

    with ExitStack() as stack:
        trainings = []
        for side in given["paths"]:
            path = Path(side[ranks.rank])
            dram_bytes = 12 * stores.find_store(path).spec.own_rows * stores.DIM + (64 << 20)
            rule = tierstore.RowWiseAdagrad(LR)
            trainings.append(stack.enter_context(tierstore.open_training(path, rule, dram=dram_bytes, at=0)))
        ours, starts, num_rows = _step_of_ours(ranks, trainings[0])
        batches = Batches(num_rows, int(given["tokens"]), generator=np.random.default_rng(ranks.rank))
        duplicates = DuplicatesSent(ranks, trainings[1], stores.TABLE, starts)
        _check(ours, duplicates.step, batches)
        sides: dict[str, Callable[[], object]] = {
            SUBJECT: lambda: ours(batches.draw(), batches.gradients),
            DUPLICATES: lambda: duplicates.step(batches.draw(), batches.gradients),
        }
        missing = ""
        try:
            torchrec = torchrec_side.step_of(num_rows, stores.DIM)
            sides[TORCHREC] = lambda: torchrec(batches.draw(), batches.gradients)
        except ImportError as error:
            missing = f"{error}: {torchrec_side.INSTALL}"
        return {
            "steps": rank_group.compare(ranks, sides, int(given["pairs"])),
            "bytes": [_bytes_of(ranks, ours, batches, starts) for _ in range(int(given["pairs"]))],
            "references": batches.references * ranks.size,
            "torchrec": missing,
        }


def _step_of_ours(ranks: Ranks, training: Any) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], Any, int]:
    """Returns a step over ranks, the first row of each rank's slice, and the table's rows."""
    import torch

    from engram_adapter import TableOptimizer, TrainableRows

    rows = TrainableRows(training, stores.TABLE, groups="batch", process_group=ranks, reduction="sum")
    optimizer = TableOptimizer([rows])
    spec = training[stores.TABLE].spec
    starts = np.array(ranks.gather_objects("first rows", spec.row_start), dtype=np.int64)

    def step(row_ids: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        optimizer.zero_grad()
        values = rows(torch.from_numpy(row_ids))
        values.backward(torch.from_numpy(gradients))
        optimizer.step()
        found: np.ndarray = values.detach().numpy()
        return found

    return step, starts, spec.num_rows


def _check(ours: Callable[..., np.ndarray], other: Callable[..., np.ndarray], batches: Batches) -> None:
    """Raises `ConfigError` unless both sides have nearly the same rows after each step: sums are of another order.

    Random bytes are rows of any float, NaN among them.
    """
    for _ in range(CHECKED_STEPS):
        row_ids = batches.draw()
        pair = ours(row_ids, batches.gradients), other(row_ids, batches.gradients)
        if not np.allclose(*pair, atol=1e-4, equal_nan=True):
            raise ConfigError("bench exchange: two ways of training have different rows; run the tests of ranks")


def _bytes_of(ranks: Ranks, step: Callable[..., object], batches: Batches, starts: np.ndarray) -> float:
    """Returns what all ranks send in a step, to the bytes of the distinct rows that are of other ranks, both ways."""
    wire, row_ids = Wire(ranks), batches.draw()
    with wire.counted():
        step(row_ids, batches.gradients)
    distinct = np.unique(row_ids)
    others = int((np.searchsorted(starts, distinct, side="right") - 1 != ranks.rank).sum())
    of_ranks = ranks.gather_objects("bytes", [wire.num_bytes, 2 * others * batches.dim * 4])
    return float(sum(each[0] for each in of_ranks) / max(1, sum(each[1] for each in of_ranks)))
