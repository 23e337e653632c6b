"""Ranks of a test: a function in W processes, which talk over gloo on the loopback and meet at a file.

Input: a function of the rank, a closure too. Output: what it returns on each rank, or the exception it ends with.
Errors: `AssertionError` if a rank takes longer than the limit, or dies by a signal that the test did not ask for.

Ranks are forks of one process that has imported torch and has no thread yet: a start costs 30 ms, not 3 s.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 60.0


class RankFailure(Exception):
    """What a rank raised, as text: `kind` is the class's name, `details` its attributes that are plain."""

    def __init__(self, kind: str, message: str, details: dict[str, Any], trace: str) -> None:
        super().__init__(f"{kind}: {message}\n{trace}")
        self.kind, self.message, self.details = kind, message, details

    def __reduce__(self) -> Any:
        return RankFailure, (self.kind, self.message, self.details, str(self))


def start_ranks(work: Callable[[int], Any], size: int, folder: Path) -> list[int]:
    """Starts the ranks; returns their process ids. `folder` is of these ranks alone: they meet there."""
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _run(work, rank, size, folder)
        children.append(child)
    return children


def _run(work: Callable[[int], Any], rank: int, size: int, folder: Path) -> None:
    """In the child: never returns."""
    status = 1
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
        try:
            result: Any = work(rank)
        except BaseException as error:
            plain = {
                name: each for name, each in vars(error).items() if isinstance(each, str | int | float | tuple | list)
            }
            result = RankFailure(type(error).__name__, str(error), plain, traceback.format_exc())
        (folder / f"result{rank}.new").write_bytes(pickle.dumps(result))
        os.replace(folder / f"result{rank}.new", folder / f"result{rank}")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def await_ranks(children: list[int], limit_s: float = LIMIT_S) -> list[int]:
    """Waits for processes to end; returns their exit statuses, a signal's as its negative. Kills late ones."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + limit_s
    try:
        while len(statuses) < len(children):
            for child in children:
                if child not in statuses:
                    found, status = os.waitpid(child, os.WNOHANG)
                    if found:
                        statuses[child] = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < until, f"ranks took longer than {limit_s:g} s; ended: {statuses}"
            time.sleep(0.002)
    finally:
        for child in children:
            if child not in statuses:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    return [statuses[child] for child in children]


def outcomes_of(folder: Path, size: int) -> list[Any]:
    """What each rank returned, a `RankFailure` for an exception; None for a rank that left nothing."""
    files = [folder / f"result{rank}" for rank in range(size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def run_ranks(work: Callable[[int], Any], size: int, folder: Path, limit_s: float = LIMIT_S) -> list[Any]:
    """Runs a function on all ranks; returns what each returned. Raises the `RankFailure` that came first, if any."""
    statuses = await_ranks(start_ranks(work, size, folder), limit_s)
    assert statuses == [0] * size, f"ranks ended with {statuses}"
    outcomes = outcomes_of(folder, size)
    failures = [outcome for outcome in outcomes if isinstance(outcome, RankFailure)]
    if failures:  # ranks that only wait for another come last
        raise min(failures, key=lambda failure: (failure.kind == "RankError", "left" in failure.message))
    return outcomes
