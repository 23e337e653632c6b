"""The kernels about misses and the mailbox in NumPy: what a device does step by step, and nothing of how.

Same results as `kernels.gpu.misses` and `kernels.gpu.await_answer` document; a mailbox is an int64 view of its block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Step:
    """The device's words about its steps; see `kernels.gpu.misses.StepState`."""

    count: int = 0
    step: int = 0
    ready: int = 0
    posted: int = 0
    failed: int = 0
    num_batches: int = 0
    num_without_misses: int = 0


def collect_misses(keys: np.ndarray, places: np.ndarray, num_places: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the keys, int64 [M], and pairs, int32 [M], that are missed, by pair."""
    pairs = np.flatnonzero((keys >= 0) & ((places < 0) | (places >= num_places)))
    return keys.reshape(-1)[pairs], pairs.astype(np.int32)


def post_misses(state: Step, mailbox: np.ndarray, pairs_max: int) -> None:
    state.step += 1
    state.num_batches += 1
    state.posted = min(state.count, pairs_max)
    if state.count:
        mailbox[1], mailbox[0] = state.count, state.step
    else:
        state.ready = state.step
        state.num_without_misses += 1
    state.count = 0


def await_answer(state: Step, mailbox: np.ndarray) -> None:
    """The answer is there, or never comes."""
    if state.step in (state.ready, state.failed):
        return
    if mailbox[8] == state.step:
        state.ready = state.step
        failed = bool(mailbox[9] != 0)
    else:
        mailbox[16] = state.step
        failed = True
    if failed:
        state.failed = mailbox[18] = state.step
