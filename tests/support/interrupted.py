"""Interrupts at a chosen line of the training's own files, and which of a store's files they left open."""

from __future__ import annotations

import contextlib
import gc
import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import tierstore

TRACED = str(Path(tierstore.__file__).parent / "training")


class Interrupted:
    """Raises at the n-th line that the training's own files, or others, run in this thread.

    Not where a `with` ends: Python names its line once more before it calls `__exit__`, and runs no signal handler
    there.
    """

    def __init__(self, number: int, error: type[BaseException], traced: str | tuple[str, ...] = TRACED) -> None:
        """traced: What the names of the files begin with."""
        self.traced = traced
        self.left, self.error, self.was_raised = number, error, False
        self._entered = set[tuple[int, int]]()

    def __enter__(self) -> Interrupted:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(self.traced):
            return None
        if event == "call":  # a frame that ended may have had its id, and may have left its `with` by `return`
            self._entered = {at for at in self._entered if at[0] != id(frame)}
        if event == "line" and not self._ends_with(frame):
            self.left -= 1
            if self.left == 0:
                self.was_raised = True
                raise self.error("at " + frame.f_code.co_name)
        return self._trace

    def _ends_with(self, frame: FrameType) -> bool:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        at = (id(frame), frame.f_lineno)
        if not line.startswith("with "):
            return False
        self._entered ^= {at}
        return at not in self._entered


def open_files(store: Path) -> list[str]:
    """Returns which files of a store this process has open."""
    gc.collect()
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(file for file in found if file.startswith(f"{store}/training"))
