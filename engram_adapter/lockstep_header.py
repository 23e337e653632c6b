"""The header that goes before each rank's answers in a lock-step lookup: whether it could answer, and of which version.

Input: a rank's store and what answers. Output: headers, and what all ranks conclude from them, which is the same on
each. Errors: this rank's own, `RankError` for those of others, `StoreNotReadyError` for versions that do not agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tierstore.errors import StoreNotReadyError
from tierstore.tiers.engine import in_one_version

if TYPE_CHECKING:
    from tierstore import Store

FINE, FAILED, OTHER_IDS = 0, 1, 2  # OTHER_IDS: its forward is not of the ids that were prefetched
HEADER = np.dtype([("status", "<i8"), ("build", "V32")])  # build: `Store.common_build`
HEADER_BYTES = HEADER.itemsize


@dataclass(frozen=True)
class Answered:
    """How a rank's answers went. header: HEADER [1]. error: why they failed."""

    header: np.ndarray
    error: Exception | None


def answered(store: Store, answer: Callable[[], object], what: str, status: int = FINE) -> Answered:
    """Calls answer until one version of the store has answered all of it. status: not FINE, and it is not called."""
    header = np.zeros(1, dtype=HEADER)
    header["status"] = status
    if status != FINE:
        return Answered(header, None)

    def act() -> str:
        answer()
        return store.common_build

    try:
        header["build"] = bytes.fromhex(in_one_version(store, act, what))
    except Exception as error:  # the others wait: they must hear of it
        return failed(error)
    return Answered(header, None)


def failed(error: Exception) -> Answered:
    """Returns what a rank that has no answers sends."""
    header = np.zeros(1, dtype=HEADER)
    header["status"] = FAILED
    return Answered(header, error)


def write_headers(header: np.ndarray, sent: np.ndarray, send_bytes: Sequence[int]) -> None:
    """Writes a header before the answers to each rank in sent, uint8 [bytes]; send_bytes: to each."""
    for start in np.cumsum([0, *send_bytes[:-1]]):
        sent[start : start + HEADER_BYTES] = header.view(np.uint8)


def read_headers(answers: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the headers before the answers of each rank, uint8 [bytes] each: HEADER [W]."""
    return np.concatenate([of_rank[:HEADER_BYTES] for of_rank in answers]).view(HEADER)


def agree(headers: np.ndarray) -> bool:
    """Returns whether all ranks answered from one version of slices of one checkpoint."""
    return bool((headers == headers[0]).all())


def of_versions(what: str, headers: np.ndarray, tries: int) -> StoreNotReadyError:
    """Returns the error of ranks that do not answer from one version."""
    builds = [bytes(header["build"]).hex()[:12] for header in headers]
    listed = ", ".join(f"rank {rank} from {build}" for rank, build in enumerate(builds))
    return StoreNotReadyError(
        f"{what}: ranks answered from different versions or checkpoints (digests: {listed}"
        f"{f'; {tries} times' if tries > 1 else ''}); publish on every rank, or swap every rank's daemon, then look up "
        f"again"
    )
