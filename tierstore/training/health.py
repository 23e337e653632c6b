"""Whether a training can go on: the one flag that its tables, its writer and its prefetches share.

Input: reasons for which it cannot. Output: none. Errors: `StoreNotReadyError` with the first reason.
"""

from __future__ import annotations

import os

from ..errors import StoreNotReadyError


class Health:
    """Any thread may call; the first reason stays."""

    def __init__(self, what: str) -> None:
        """what: names the training in errors."""
        self.what = what
        self.broken: str | None = None
        self.is_closed = False
        self._process = os.getpid()

    def mark_broken(self, reason: str) -> None:
        """Refuses all that follows, with this reason."""
        self.broken = self.broken or reason

    def check(self) -> None:
        """Raises `StoreNotReadyError` if the training is closed, broken, or of another process."""
        self.check_whole()
        self.check_open()

    def check_whole(self) -> None:
        """Raises `StoreNotReadyError` if it is broken: for what goes on while it is being closed."""
        if self.broken is not None:
            raise StoreNotReadyError(
                f"{self.what} is broken: {self.broken}; close it and open it again: it goes on from its newest commit"
            )

    def check_open(self) -> None:
        """Raises `StoreNotReadyError` if it is closed, or of another process."""
        if self.is_closed:
            raise StoreNotReadyError(f"{self.what} is closed; open it again")
        if not self.is_of_this_process():
            raise StoreNotReadyError(
                f"{self.what} belongs to process {self._process}, which forked this one; use it there"
            )

    def is_of_this_process(self) -> bool:
        """Whether this is the process that opened the training, and not a child that it forked."""
        return os.getpid() == self._process
