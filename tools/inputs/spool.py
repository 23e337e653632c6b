"""Temporary copies of inputs that cannot be read where they lie: a pipe, and files whose readers seek, compressed.

Input: bytes as they come. Output: a path to read them by. Errors: those of whoever reads the pipe or the file;
`BudgetError` if the disk is full. Errors about a copy name what it was copied from.

A copy has no name on disk: it is gone with this process, however that ends. It lies beside the trace, whose disk must
have room for about as much anyway.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from tierstore.causes import naming
from tierstore.errors import ConfigError, TierStoreError

from .byte_streams import read_chunks
from .token_input import FileIdentity, file_identity

STANDARD_INPUT = Path("-")
HELD_MAX = 64  # copies of compressed files: each takes a descriptor, of which a process may have 1,024
_READ_BYTES = 1 << 20
_OPEN_ALREADY = ("/dev/fd/", "/proc/self/fd/")  # what shells give for <(command)


class Spool:
    """Holds copies; use it with `with`, which drops them. One thread."""

    def __init__(self, folder: Path) -> None:
        """folder: where the copies lie."""
        self._folder = folder
        self._files: dict[Path, IO[bytes]] = {}
        self._shown: dict[str, str] = {}  # what stands in messages for the path of a copy
        self._held: dict[tuple[Path, str], Path] = {}  # copies by compressed file and codec, until they are read
        self._seen: dict[tuple[Path, str], FileIdentity] = {}  # of those files, when they were copied first

    def is_pipe(self, path: Path) -> bool:
        """Whether a path stands for something open already, that can be read once and from its start only."""
        if path == STANDARD_INPUT:
            return True
        return str(path).startswith(_OPEN_ALREADY) and path.exists() and not path.is_file() and not path.is_dir()

    def copy_of_pipe(self, path: Path) -> Path:
        """Returns a copy of what comes out of a pipe. Blocks until its writer is done."""
        shown = "standard input" if path == STANDARD_INPUT else str(path)
        with open(0 if path == STANDARD_INPUT else path, "rb", closefd=path != STANDARD_INPUT) as pipe:
            if pipe.isatty():
                raise ConfigError("standard input is a terminal; pipe something into it, or give files")
            return self.copy(iter(lambda: pipe.read(_READ_BYTES), b""), shown)

    def copy(self, chunks: Iterable[bytes], shown: str) -> Path:
        """Returns the path of a copy of bytes. shown: what stands for it in messages."""
        with naming(f"a copy of {shown}", self._folder, writing=True):
            file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed with this)
            path = Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
            self._files[path] = file
        self._shown[str(path)] = shown
        for chunk in chunks:
            with naming(f"a copy of {shown}", self._folder, writing=True):
                file.write(chunk)
        with naming(f"a copy of {shown}", self._folder, writing=True):
            file.flush()
        return path

    @contextlib.contextmanager
    def unfolded(self, path: Path, codec: str, *, hold: bool = False) -> Iterator[Path]:
        """Gives the path of a copy of what a compressed file holds, for as long as the body takes; its errors name the
        file. Blocks on the disk.

        hold: it is wanted again, by the same arguments. Of HELD_MAX files the copy is held until then; others are
        copied once more, and `ConfigError` is raised if somebody wrote to them meanwhile.
        """
        key, now = (path, codec), file_identity(path)
        copy = self._held.pop(key, None)
        if copy is None:
            if not hold and self._seen.get(key, now) != now:
                raise ConfigError(f"{path} was changed while it was read; trace it again once it is whole")
            copy = self.copy((data for data, _ in read_chunks(path, codec)), str(path))
        try:
            with self.naming_sources():
                yield copy
            if hold:
                self._seen[key] = now
            if hold and len(self._held) < HELD_MAX:
                self._held[key] = copy
        finally:
            if self._held.get(key) != copy:
                del self._shown[str(copy)]
                self._files.pop(copy).close()

    @contextlib.contextmanager
    def naming_sources(self) -> Iterator[None]:
        """Has errors of the body name what a copy was made from."""
        try:
            yield
        except (TierStoreError, ValueError) as error:
            error.args = tuple(self._renamed(argument) for argument in error.args)
            raise
        except OSError as error:
            error.filename = self._renamed(error.filename)
            raise

    def _renamed(self, text: object) -> object:
        if isinstance(text, str):
            for path, shown in sorted(self._shown.items(), reverse=True):  # .../fd/50 before .../fd/5
                text = text.replace(path, shown)
        return text

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._files.popitem()[1].close()
