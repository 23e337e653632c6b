"""What ranks agree on before any of them changes something: a step, a commit, and where to resume.

Input: what this rank is about to do. Output: nothing, or the commit that all hold. Errors: the same on all ranks, and
before any has changed a row: `ValueError` for a gradient that is not finite on one of them, `RankError` for ranks that
would do different things, `BudgetError` if one has no room for a commit, `ConfigError` without a commit that all hold.

Each rank commits to its own catalog, at the same step; numbers may differ, since none is given twice. A rank begins a
commit once all ranks have the one before on their disks. So whenever they are killed, all hold the slowest's newest.
"""

from __future__ import annotations

import logging
import secrets
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

NO_ROOM, FAILED = 1, 2  # why a rank cannot commit
BUILT = -1  # instead of a step: the store as it was built

logger = logging.getLogger("tierstore.ranks")


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


def agree_on_step(ranks: Ranks, number: int, steps: Sequence[TableStep], error: Exception | None = None) -> None:
    """Returns once all ranks are about to take the same step. Blocks.

    error: Why this rank cannot, which the others hear; raised here.

    Raises:
        ValueError: A gradient of some rank is not finite. The same on all ranks.
        RankError: Ranks would step other tables, at other rates, or with gradients that were scaled differently.
    """
    bad = next((place for place, each in enumerate(steps) if each.bad_row is not None), -1)
    row = -1 if bad < 0 else steps[bad].bad_row
    tables = zlib.crc32(repr([(each.table, each.lr) for each in steps]).encode())
    scaled = zlib.crc32(b"".join(each.norms.tobytes() for each in steps))
    what = f"step {number} of the tables"
    came = ranks.counts(
        what, np.tile(np.array([bad, row, tables, scaled, error is not None], dtype=np.int64), (ranks.size, 1))
    )
    for place, bad_row in came[:, :2].tolist():
        if place >= 0:
            raise not_finite(steps[place].table, bad_row)
    refuse_failed(ranks, what, came[:, 4] != 0, error)
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


def agree_on_commit(ranks: Ranks, training: Training, step: int) -> str:
    """Returns once all ranks have the commit before on their disks, and room for this one. Blocks.

    What it returns is a text that this commit alone has, on all ranks (`together` of `Training.commit`).

    Raises:
        BudgetError: A rank has too little room; the same on all ranks, and training goes on.
        ConfigError: The commit before has this step or a later one, and rows have changed: ranks would not know, when
            they resume, which of the two they hold.
        RankError: Ranks would commit other steps, or one has not applied a step that the others have, or another
            cannot commit: what it raised is quoted, and nothing was committed.
    """
    what, applied, error = f"commit of step {step}", "", None
    try:
        applied = _prepared(training, step)
    except Exception as raised:  # the others wait: they must hear of it
        error = raised
    kind = NO_ROOM if isinstance(error, BudgetError) else FAILED if error is not None else 0
    numbers = np.array([kind, secrets.randbits(63), zlib.crc32(applied.encode())], dtype=np.int64)
    came = ranks.counts(what, np.tile(numbers, (ranks.size, 1)))
    if (came[:, 0] == FAILED).any():
        refuse_failed(ranks, what, came[:, 0] != 0, error)
    if came[:, 0].any():
        refusals = ranks.gather_objects(what, "" if error is None else str(error))
        raise BudgetError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(refusals) if text))
    if (came[:, 2] != came[0, 2]).any():
        listed = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(ranks.gather_objects(what, applied)))
        raise RankError(
            f"{what}: ranks have applied other numbers of steps, nothing was committed: {listed}. A step failed on "
            "some: start all ranks again, they resume from the newest commit that all hold",
            tuple(np.flatnonzero(came[:, 2] != came[ranks.rank, 2]).tolist()),
            what,
        )
    return "".join(f"{number:016x}" for number in came[:2, 1].tolist())


def _prepared(training: Training, step: int) -> str:
    """Returns how many steps each table has taken, as text, once this rank can commit."""
    training.prepare_commit()
    before = _line_of(training)
    if before and before[-1].step >= step and training.has_changes:
        raise ConfigError(f"step {step}: the commit before is of step {before[-1].step}; over ranks, steps must ascend")
    return str({name: table.num_steps for name, table in training.tables.items()})


def resume_together(ranks: Ranks, training: Training) -> None:
    """Takes the training to the newest commit that all ranks hold, and drops what came later. Blocks.

    Raises `ConfigError`, the same on all ranks, if there is no such commit, rows have changed since, or slices were
    made of other commits (`tierstore reslice`).
    """
    line = _line_of(training)
    steps = [commit.step for commit in line]
    of_all = ranks.gather_objects("resume of the tables", [steps, training.has_changes, resliced_commits(training)])
    if any(origin != of_all[0][2] for *_, origin in of_all):
        raise ConfigError("ranks have slices of other commits: reslice all of them at once, and open those")
    held = [of_rank for of_rank, *_ in of_all]
    if all(of_rank[-1:] == held[0][-1:] for of_rank in held):
        return
    chosen = _newest_of_all(held)
    if chosen is None or any(changed for _, changed, _ in of_all):
        listed = "; ".join(f"rank {rank}: steps {of_rank or 'none'}" for rank, of_rank in enumerate(held))
        raise ConfigError(
            f"ranks are at different commits, and {'none is held by all' if chosen is None else 'rows have changed'}: "
            f"{listed}. Open all slices at commits of one step (at=), or start anew with at=0"
        )
    with ranks.whole("resume of the tables"):
        if (steps[-1] if steps else BUILT) != chosen:
            number = next((commit.number for commit in line if commit.step == chosen), 0)
            logger.warning(
                "rank %d of %d: not all ranks hold commit %d of %s; it goes back to commit %d, step %d",
                ranks.rank, ranks.size, training.at, training.path, number, max(chosen, 0),
            )  # fmt: skip
            training.rollback(number)
        ranks.counts("the tables have gone back", np.zeros((ranks.size, 0), dtype=np.int64))


def _line_of(training: Training) -> list[Commit]:
    """Returns the commits that led to where the training is, oldest first: later ones, and those of a line that was
    left and pinned, are not of it. Along a line, steps ascend."""
    line: list[Commit] = []
    for commit in reversed(training.commits):
        if commit.number <= training.at and (not line or commit.step < line[-1].step):
            line.append(commit)
    return line[::-1]


def _newest_of_all(held: list[list[int]]) -> int | None:
    """Returns the newest step of which every rank has a commit; BUILT for the store as it was built; else None.

    A rank without a commit is behind the others by one at most: then theirs is their first.
    """
    common = set.intersection(*map(set, held))
    if not common and any(not steps for steps in held) and all(len(steps) <= 1 for steps in held):
        return BUILT
    return max(common, default=None)


def resliced_commits(training: Training) -> Any:
    """Returns the digests of the commits that a store's first commit was made of, or None."""
    return read_catalog(training.path, may_be_initial=True).origin.get("resliced", {}).get("commits")


def refuse_failed(ranks: Ranks, what: str, is_failed: np.ndarray, own: Exception | None) -> None:
    """Raises what `refusal_of` returns. Blocks on an exchange of words if any rank failed."""
    refusal = refusal_of(ranks, what, is_failed, own)
    if refusal is not None:
        raise refusal


def refusal_of(ranks: Ranks, what: str, is_failed: np.ndarray, own: Exception | None) -> Exception | None:
    """Returns why this rank goes no further if any rank failed, bool [W], which all ranks know: its own error, or one
    that names the others'. None if none failed; else blocks on an exchange of their words.
    """
    if not is_failed.any():
        return None
    texts = ranks.gather_objects(f"errors of {what}", "" if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        return own
    others = tuple(map(int, np.flatnonzero(is_failed)))
    return RankError(
        f"{what}: rank {ranks.rank} goes no further, because other ranks could not: "
        f"{'; '.join(f'rank {rank}: {texts[rank]}' for rank in others)}",
        ranks=others,
        waited_for=what,
    )
