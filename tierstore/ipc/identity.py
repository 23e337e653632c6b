"""Identities of users and processes, as the kernel shows them across namespaces.

Input: ids of users, groups and processes that the kernel noted. Output: whether an id names somebody, and words for it.
A user namespace shows every user that it does not map as one id, the overflow id (65534 by default). There, that id is
nobody's: it never equals the daemon's user, an allowed user or an administrator. A process of another PID namespace has
the id 0, which says nothing about whether it still runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

NUM_IDS = (1 << 32) - 1  # that a user namespace can map; -1 is not an id
OVERFLOW_ID = 65534  # the kernel's default, for machines that do not show it

Kind = Literal["uid", "gid"]
_num_forks = 0  # between the first process and this one, as far as Python made them


def _first_numbers(path: str, column: int) -> list[int]:
    """Returns one column of a file of /proc; nothing if it cannot be read."""
    try:
        return [int(line.split()[column]) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError, IndexError):
        return []


def unknown_id(kind: Kind) -> int | None:
    """Returns the id that stands for everybody whom this user namespace does not map; None if it maps all ids.

    If /proc does not say, the namespace is taken for one that does not map all: unknown never equals a known identity.
    """
    if sum(_first_numbers(f"/proc/self/{kind}_map", 2)) >= NUM_IDS:
        return None
    return next(iter(_first_numbers(f"/proc/sys/kernel/overflow{kind}", 0)), OVERFLOW_ID)


def known_ids(kind: Kind, ids: Iterable[int]) -> set[int]:
    """Returns those of the ids that name one user, or one group, and nobody else."""
    return set(ids) - {unknown_id(kind)}


def user_text(uid: int) -> str:
    """Returns words for a user id."""
    if uid == unknown_id("uid"):
        return f"user {uid} (any user whom this user namespace does not map)"
    return f"user {uid}"


def process_text(pid: int) -> str:
    """Returns words for a process id."""
    return f"process {pid}" if pid > 0 else "a process of another PID namespace"


def own_proc() -> bool:
    """Whether /proc shows the processes of this process's own PID namespace, so that its numbers mean ours."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def this_process() -> tuple[int, int]:
    """Returns what is another in every process that was forked off: its id, and how many forks lie behind it.

    The id alone is not: a process of id 1 that forks into a new PID namespace has a child of id 1.
    """
    return os.getpid(), _num_forks


def _forked() -> None:
    global _num_forks
    _num_forks += 1


os.register_at_fork(after_in_child=_forked)
