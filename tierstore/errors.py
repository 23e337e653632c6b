"""The errors of tierstore: few classes, chosen by what the caller can do about them.

Every message says what is wrong, where, both numbers, and what to do next. Wrong arguments (a dtype, a shape, a token
id outside the vocabulary, a key below -1) raise the built-in `TypeError` or `ValueError` instead.
"""

from __future__ import annotations


class TierStoreError(Exception):
    """The base of every error that tierstore raises by itself."""


class StoreNotReadyError(TierStoreError):
    """There is no finished store at that path, or it is closed: build it, resume the build, or open it again."""


class FormatError(TierStoreError):
    """A file is not what its name or its catalog record says: foreign, truncated, damaged, or of a newer format."""


class CorruptPageError(TierStoreError):
    """A page (or a placed entry) cannot be read whole with a matching checksum: `tierstore verify --repair`."""


class FingerprintMismatchError(TierStoreError):
    """The caller's hash is not the one the table was built with: every row would silently be a wrong one."""


class BudgetError(TierStoreError):
    """A budget is below what is needed, or memory or disk have less than was requested."""


class ConfigError(TierStoreError):
    """The checkpoint, an option or the environment does not fit the request: change it and call again."""


class DaemonError(TierStoreError):
    """The daemon could not be reached or refused; the store itself is unharmed."""


class RankError(TierStoreError):
    """Another rank did not come, left, or is elsewhere in its code: start all again, from the newest commit of all."""

    def __init__(self, message: str, ranks: tuple[int, ...] = (), waited_for: str = "", waited_s: float = 0.0) -> None:
        """ranks: Those it names, as far as they are known. waited_for: What this rank was in, and for how long."""
        super().__init__(message)
        self.ranks, self.waited_for, self.waited_s = ranks, waited_for, waited_s
