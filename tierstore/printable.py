"""Text from files that is safe to print: names in checkpoints, stores and traces may hold what a terminal obeys.

Input: any text. Output: the same with each control character escaped, and a stream that does so to all that is written.
Errors: none.

Escaped are the control characters of ASCII and Latin-1, line separators, and what reorders or hides the text around it.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

_OBEYED = (
    "\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
_EVERYWHERE = re.compile(f"[{_OBEYED}]")
_WITHIN_LINES = re.compile(f"(?![\n\t])[{_OBEYED}]")


def printable(text: str, *, lines: bool = False) -> str:
    """Returns `text` with control characters as Python writes them in a string: "a\\x1b[2J".

    Args:
        text: A name or a path, or with `lines` all that is to be printed.
        lines: Whether line ends and tabs are ours, and stay.
    """
    return (_WITHIN_LINES if lines else _EVERYWHERE).sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class PrintableStream:
    """A stream of text that escapes control characters on their way to another, `stream`, which does all else."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes `text`, its control characters escaped; returns its length."""
        self.stream.write(printable(text, lines=True))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Writes all of `lines`, as `write` does."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
