"""How much a small file may unfold to: a limit for compressed streams and encoded columns, which can be bombs.

Input: a file's size, and what came out of it so far. Output: none. Errors: `ConfigError` with both numbers.

Text compresses some 20 times at most, ids of real text fewer. What repeats without end compresses 30,000 times.
"""

from __future__ import annotations

from pathlib import Path

from tierstore.errors import ConfigError
from tierstore.units import format_bytes

FREE_BYTES = 64 << 20  # that any file may unfold to
RATIO_MAX = 256  # beyond that, of what it may hold for each byte on disk


class Unfolding:
    """Counts the bytes that came out of one file."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self._left = FREE_BYTES + RATIO_MAX * size

    def add(self, num_bytes: int) -> None:
        """Adds bytes that came out; raises `ConfigError` if they are too many."""
        self._left -= num_bytes
        if self._left < 0:
            most = FREE_BYTES + RATIO_MAX * self._size
            raise ConfigError(
                f"{self._path} has {format_bytes(self._size)} and unfolds to more than {format_bytes(most)}; if that "
                f"is meant, decompress it, or write its ids as .npy, and give that"
            )
