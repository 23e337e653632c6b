"""What ranks agree on before any of them changes something: a step, a commit, and where to resume.

Input: what this rank is about to do. Output: nothing, or the commit that all hold. Errors: the same on all ranks, and
before any has changed a row: `ValueError` for a gradient that is not finite on one of them, `RankError` for ranks that
would do different things, `BudgetError` if one has no room for a commit, `ConfigError` without a commit that all hold.

Each rank commits to its own catalog, at the same number and step. A rank begins a commit once all ranks have the one
before on their disks. So whenever they are killed, all hold the newest commit of the slowest.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tierstore.errors import BudgetError, ConfigError, RankError
from tierstore.formats.catalog import read_catalog

from .exchange import Ranks

if TYPE_CHECKING:
    from tierstore import Training
    from tierstore.training.commits import Commit

logger = logging.getLogger("tierstore.ranks")

AtCommit = tuple[int, int]  # number and step; (0, 0) is the store as it was built
BUILT: AtCommit = (0, 0)


class TableStep(NamedTuple):
    """What one table is about to do."""

    table: str
    lr: float
    norms: np.ndarray  # float64 [blocks], as they were scaled
    bad_row: int | None  # whose gradient is not finite, of those of this rank


def not_finite(table: str, row: int | str) -> ValueError:
    """Returns the error of a step that is refused."""
    return ValueError(
        f"table {table}: the gradient of row {row} is not finite; no table was changed. Skip the step (zero_grad), as "
        "GradScaler does, and see where it comes from"
    )


def agree_on_step(ranks: Ranks, number: int, steps: Sequence[TableStep]) -> None:
    """Returns once all ranks are about to take the same step. Blocks.

    Raises:
        ValueError: A gradient of some rank is not finite. The same on all ranks.
        RankError: Ranks would step other tables, at other rates, or with gradients that were scaled differently.
    """
    bad = next((place for place, each in enumerate(steps) if each.bad_row is not None), -1)
    row = -1 if bad < 0 else steps[bad].bad_row
    tables = zlib.crc32(repr([(each.table, each.lr) for each in steps]).encode())
    scaled = zlib.crc32(b"".join(each.norms.tobytes() for each in steps))
    what = f"step {number} of the tables"
    came = ranks.counts(what, np.tile(np.array([bad, row, tables, scaled], dtype=np.int64), (ranks.size, 1)))
    for place, bad_row in came[:, :2].tolist():
        if place >= 0:
            raise not_finite(steps[place].table, bad_row)
    _check_equal(ranks, what, came[:, 2], str([(each.table, each.lr) for each in steps]), "the tables and their rates")
    _check_equal(ranks, what, came[:, 3], str([float(each.norms.sum()) for each in steps]), "the norms, once scaled,")


def _check_equal(ranks: Ranks, what: str, of_all: np.ndarray, mine: str, which: str) -> None:
    if (of_all == of_all[0]).all():
        return
    listed = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(ranks.gather_objects(what, mine)))
    raise RankError(
        f"{what}: {which} differ between ranks, no table was changed: {listed}. All ranks need the same loss scale, "
        "clipping and schedule",
        tuple(np.flatnonzero(of_all != of_all[ranks.rank]).tolist()),
        what,
    )


def agree_on_commit(ranks: Ranks, training: Training, step: int) -> None:
    """Returns once all ranks have the commit before on their disks, and room for this one. Blocks.

    Raises:
        BudgetError: A rank has too little room; the same on all ranks, and training goes on.
        RankError: Ranks would commit other steps, or hold other commits before.
    """
    refusal, before = "", -1
    try:
        before = training.prepare_commit()
    except BudgetError as error:
        refusal = str(error)
    what = f"commit of step {step}"
    numbers = np.array([bool(refusal), before], dtype=np.int64)
    came = ranks.counts(what, np.tile(numbers, (ranks.size, 1)))
    if came[:, 0].any():
        refusals = ranks.gather_objects(what, refusal)
        raise BudgetError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(refusals) if text))
    _check_equal(ranks, what, came[:, 1], str(before), "the commits before")


def resume_together(ranks: Ranks, training: Training) -> AtCommit:
    """Takes the training to the newest commit that all ranks hold, and drops what came later. Blocks.

    Returns that commit's number and step. Raises `ConfigError`, the same on all ranks, if there is no such commit, or
    rows have changed since.
    """
    held = {commit.number: commit.step for commit in training.commits}
    mine = [training.at, sorted(held.items()), training.has_changes]
    of_all = ranks.gather_objects("resume of the tables", mine)
    ats = [(at, dict(map(tuple, commits)).get(at, 0)) for at, commits, _ in of_all]
    if all(at == ats[0] for at in ats):
        return ats[0]
    chosen = _newest_of_all([[(number, step) for number, step in commits] for _, commits, _ in of_all])
    if chosen is None or any(changed for *_, changed in of_all):
        listed = "; ".join(f"rank {rank}: {commits or 'none'}, at {at}" for rank, (at, commits, _) in enumerate(of_all))
        raise ConfigError(
            f"ranks are at different commits, and {'rows have changed since' if chosen else 'none is held by all'}: "
            f"{listed} (number, step). Open all slices at one commit (at=), or start anew with at=0"
        )
    with ranks.whole("resume of the tables"):
        if training.at != chosen[0]:
            logger.warning(
                "rank %d of %d: not all ranks hold commit %d of %s; it goes back to commit %d, step %d",
                ranks.rank, ranks.size, training.at, training.path, *chosen,
            )  # fmt: skip
            training.rollback(chosen[0])
        ranks.counts("the tables have gone back", np.zeros((ranks.size, 0), dtype=np.int64))
    return chosen


def _newest_of_all(held: list[list[AtCommit]]) -> AtCommit | None:
    """Returns the newest commit that every rank holds.

    The store as it was built is one, as long as no rank has forgotten its first commit: what came before it, others may
    have forgotten too.
    """
    common = set.intersection(*map(set, held))
    if all(not commits or min(commits)[0] == 1 for commits in held):
        common.add(BUILT)
    return max(common, default=None)


def digests_of_all(ranks: Ranks, commit: Commit | None) -> tuple[list[str], str]:
    """Returns the digests of a commit on all ranks, by rank, and one of them all. Blocks until all have it."""
    digests = ranks.gather_objects("state of the tables", "" if commit is None else commit.digest)
    return digests, hashlib.sha256("".join(digests).encode()).hexdigest() if commit is not None else ""


def own_state(state: dict[str, Any], training: Training, ranks: Ranks | None) -> dict[str, Any]:
    """Returns what a `TableOptimizer`'s state says of this rank's commit, by the digests of all ranks that saved it.

    Ranks and slices may be others than those that saved it: new slices name the commits that they were made of, and
    have them as commit 1. Raises `ConfigError` if these are not.
    """
    digests = state.get("digests", [state["digest"]])
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    commit = next((each for each in training.commits if each.number == state["commit"]), None)
    if len(digests) == size and (commit is None or commit.digest == digests[rank]):
        return state | {"digest": digests[rank]}
    origin = read_catalog(training.path, may_be_initial=True).origin.get("resliced", {})
    first = next((each for each in training.commits if each.number == 1), None)
    if first is not None and sorted(origin.get("commits", ())) == sorted(digests) and first.step == state["step"]:
        return state | {"commit": 1, "digest": first.digest}
    if len(digests) == size:
        return state | {"digest": digests[rank]}
    raise ConfigError(
        f"the checkpoint was saved by {len(digests)} ranks, here are {size}, and {training.path} was not made of their "
        f"commits of step {state['step']}: tierstore reslice their stores at that step, and open the new ones"
    )
