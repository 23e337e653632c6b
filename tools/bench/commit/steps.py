"""Steps of a training while a commit of it is written, beside steps while nothing is.

Input: a table of V4.1's layout, of which some rows are trained. Output: in each round, how many times its usual time a
step takes, its median. Errors: those of `open_training`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tierstore
from tierstore.training.training import Training

from .. import stores

TOKENS, ROWS_A_TOKEN = 2048, 24
USUAL_STEPS = 8
COMMIT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Slowdowns:
    """Of each round: median of a step beside a commit over the usual one's, by the clock and by its processor time."""

    wall: list[float]
    cpu: list[float]
    num_steps: list[int]  # beside the commit


def slowdowns(folder: Path, num_rows: int, num_trained: int, rounds: int) -> Slowdowns:
    """Measures steps on one thread, alone and while a commit is written. Blocks.

    num_trained: rows that the commits have, all of them in DRAM.
    """
    made = stores.make_store(folder, num_rows)
    rng = np.random.default_rng(0)
    found = Slowdowns([], [], [])
    dram = 2 * num_trained * 4 * (stores.DIM + 4) + (256 << 20)
    with tierstore.open_training(made.path, tierstore.RowWiseAdagrad(lr=0.01), dram=dram, at=0, threads=1) as training:
        trained = rng.permutation(made.spec.num_rows)[:num_trained]
        gradients = rng.standard_normal((TOKENS * ROWS_A_TOKEN, stores.DIM), dtype=np.float32)
        for number in range(rounds + 1):
            for start in range(0, num_trained, len(gradients)):  # all are dirty
                part = trained[start : start + len(gradients)]
                training[stores.TABLE].apply(part, gradients[: len(part)])
            usual = [_step(training, trained, gradients, rng) for _ in range(USUAL_STEPS)]
            ticket = training.commit(number)
            beside = [_step(training, trained, gradients, rng)]
            while not ticket.done():
                beside.append(_step(training, trained, gradients, rng))
            ticket.wait(COMMIT_TIMEOUT_S)
            if number:  # the first warms up
                found.wall.append(_ratio(beside, usual, 0))
                found.cpu.append(_ratio(beside, usual, 1))
                found.num_steps.append(len(beside))
    return found


def _ratio(beside: list[tuple[float, float]], usual: list[tuple[float, float]], clock: int) -> float:
    return statistics.median(step[clock] for step in beside) / statistics.median(step[clock] for step in usual)


def _step(
    training: Training, trained: np.ndarray, gradients: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """Gathers and updates the rows of a batch; returns the seconds, and those of the thread's processor time."""
    row_ids = trained[rng.integers(0, len(trained), len(gradients))]
    wall, cpu = time.perf_counter(), time.thread_time()
    training[stores.TABLE].gather(row_ids)
    training[stores.TABLE].apply(row_ids, gradients)
    return time.perf_counter() - wall, time.thread_time() - cpu
