"""The state of a `TableOptimizer`: which commit holds the tables, on this rank and on the others.

Input: a state, as `state_dict` made it, and a training. Output: the commit it names here. Errors: `FormatError` for
what is no such state; `ConfigError` if the training has not that very commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tierstore.errors import ConfigError, FormatError

from .exchange import Ranks
from .rank_agreement import agree_on_commit, resliced_commits

if TYPE_CHECKING:
    from tierstore import Training
    from tierstore.training.commits import Commit

STATE_FORMAT = 1
RANKS_STATE_FORMAT = 2  # with the commits of all ranks


def commit_of(training: Training, number: int) -> Commit | None:
    """Returns the commit of a number; None if the store does not keep it."""
    return next((commit for commit in training.commits if commit.number == number), None)


def checked_state(state: Any, num_groups: int) -> dict[str, Any]:
    """Returns a state of this class; raises `FormatError` for anything else."""
    types = {"format": int, "commit": int, "digest": str, "step": int, "param_groups": list}
    if not isinstance(state, Mapping) or any(not isinstance(state.get(name), kind) for name, kind in types.items()):
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise FormatError(f"{found} is no state of a TableOptimizer, which has {', '.join(types)}")
    if state["format"] not in (STATE_FORMAT, RANKS_STATE_FORMAT):
        raise FormatError(
            f"a TableOptimizer state of format {state['format']}; this version reads {STATE_FORMAT} and "
            f"{RANKS_STATE_FORMAT}"
        )
    of_ranks = [state.get(name) for name in ("commits", "digests")]
    if state["format"] == RANKS_STATE_FORMAT and not all(isinstance(each, list) for each in of_ranks):
        raise FormatError("a TableOptimizer state of ranks without their commits; load what state_dict returned")
    if len(state["param_groups"]) != num_groups:
        raise FormatError(f"a state of {len(state['param_groups'])} param groups for an optimizer of {num_groups}")
    return dict(state)


def check_commit(training: Training, state: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless the training has the very commit that a state names."""
    number = state["commit"]
    if number == 0:
        return
    commit = commit_of(training, number)
    if commit is None:
        kept = ", ".join(str(each.number) for each in training.commits) or "none"
        raise ConfigError(
            f"the checkpoint goes with commit {number} of {training.path}, step {state['step']}; the store keeps "
            f"commits {kept}: open the store of this checkpoint, or load one whose commit is kept (training.pin)"
        )
    if commit.step != state["step"]:
        raise ConfigError(
            f"the checkpoint is of step {state['step']}, commit {number} of {training.path} of step {commit.step}: "
            "dense weights and tables would be of different steps; load the checkpoint that was saved with it"
        )
    if commit.digest != state["digest"]:
        raise ConfigError(
            f"commit {number} of {training.path} has digest {commit.digest[:16]}, the checkpoint names "
            f"{state['digest'][:16]}: it was saved with another store, or with a run that was rolled back since"
        )


def committed_state(ranks: Ranks | None, training: Training, num_steps: int) -> dict[str, Any]:
    """Returns what a state says of the commit after `num_steps`. Commits if rows have changed; blocks until durable."""
    commit = commit_of(training, training.at)
    step_of_commit = 0 if commit is None else commit.step
    if training.has_changes or step_of_commit != num_steps:
        together = None if ranks is None else agree_on_commit(ranks, training, num_steps)
        commit = training.commit(num_steps, b"", together).wait()
    state = {
        "format": STATE_FORMAT,
        "commit": 0 if commit is None else commit.number,
        "digest": "" if commit is None else commit.digest,
        "step": 0 if commit is None else commit.step,
    }
    return state if ranks is None else state | {"format": RANKS_STATE_FORMAT} | commits_of_all(ranks, commit)


def commits_of_all(ranks: Ranks, commit: Commit | None) -> dict[str, Any]:
    """Returns what a state says of the commits of all ranks, the same on all of them. Blocks until all have theirs."""
    mine = [0, ""] if commit is None else [commit.number, commit.digest]
    of_all = ranks.gather_objects("state of the tables", mine)
    digests = [digest for _, digest in of_all]
    digest = hashlib.sha256("".join(digests).encode()).hexdigest() if commit is not None else ""
    return {"commit": of_all[0][0], "digest": digest, "commits": [number for number, _ in of_all], "digests": digests}


def own_state(state: dict[str, Any], training: Training, ranks: Ranks | None) -> dict[str, Any]:
    """Returns what a `TableOptimizer`'s state says of this rank's commit, of all that it says of those that saved it.

    Ranks and slices may be others than those: new slices name the commits that they were made of, and have them as
    commit 1. Raises `ConfigError` if these are not.
    """
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    numbers, digests = state.get("commits", [state["commit"]]), state.get("digests", [state["digest"]])
    held = {commit.number: commit for commit in training.commits}
    if len(digests) == size:
        own = state | {"commit": numbers[rank], "digest": digests[rank]}
        if numbers[rank] not in held or held[numbers[rank]].digest == digests[rank]:
            return own
    of_others = "digests" in state or len(digests) != size
    made_of = resliced_commits(training) if of_others and 1 in held and held[1].step == state["step"] else None
    if sorted(made_of or ()) == sorted(digests):
        return state | {"commit": 1, "digest": held[1].digest}
    if len(digests) == size:
        return own
    raise ConfigError(
        f"the checkpoint was saved by {len(digests)} ranks, here are {size}, and {training.path} was not made of their "
        f"commits of step {state['step']}: tierstore reslice their stores at that step, and open the new ones"
    )
