"""New files, written front to back out of parts, past the page cache, each synced before it has its name.

Input: `NewFile`s. Output: the files in a folder, and the SHA-256 of each. Errors: those of the parts; `OSError` of the
disk, which the caller names. Threads: each of `jobs` workers writes whole files (it reads, digests, and has a thread
write what is done); the calling thread reports progress.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...durable import replacing, sync_folder, write_all
from ...layout import UNIT_BYTES
from ...process.progress import OnProgress
from ...process.workers import joined_pool
from ..page_writer import PageWriter, writing
from .parts import Part, PartReader

CHUNK_BYTES = 4 << 20  # that a worker reads at once; with those that are written, 8 MiB a job
PROGRESS_SECONDS = 0.25


@dataclass(frozen=True)
class NewFile:
    """A file to write.

    name: relative to the folder. parts: its bytes, back to back. is_last: it is written when all others are durable.
    """

    name: str
    parts: tuple[Part, ...]
    is_last: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return sum(part.num_bytes for part in self.parts)


class StoppedError(Exception):
    """Another worker failed, or the caller was interrupted: the file is not wanted."""


@dataclass
class _Written:
    """Bytes written so far, and whether to give up. Writers: the workers, under the lock."""

    num_bytes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.num_bytes += num_bytes
        if self.stop.is_set():
            raise StoppedError


def write_files(
    folder: Path, files: Sequence[NewFile], jobs: int, on_progress: OnProgress | None = None
) -> dict[str, str]:
    """Writes files into a folder, `jobs` at once, those that are last one by one at the end. Blocks until all are
    durable.

    Returns:
        The SHA-256 (hex) of each file by name, of the bytes that were given to the disk.
    """
    written = _Written()
    total = sum(file.num_bytes for file in files)
    for name in sorted({str(Path(file.name).parent) for file in files}):
        (folder / name).mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    early = sorted((file for file in files if not file.is_last), key=lambda file: -file.num_bytes)
    with joined_pool(jobs, "tierstore-export") as pool:
        try:
            tasks = {pool.submit(_write_file, folder / file.name, file, written): file for file in early}
            _await(set(tasks), written, total, on_progress)
            digests |= {file.name: task.result() for task, file in tasks.items()}
            for file in files:
                if file.is_last:
                    task = pool.submit(_write_file, folder / file.name, file, written)
                    _await({task}, written, total, on_progress)
                    digests[file.name] = task.result()
        except BaseException:
            written.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for each in sorted({folder, *((folder / file.name).parent for file in files)}):
        sync_folder(each)
    return digests


def _await(pending: set[Future[str]], written: _Written, total: int, on_progress: OnProgress | None) -> None:
    while pending:
        finished, pending = wait(pending, timeout=PROGRESS_SECONDS, return_when=FIRST_EXCEPTION)
        for task in finished:
            task.result()
        if on_progress:
            on_progress(written.num_bytes, total)


def _write_file(path: Path, file: NewFile, written: _Written) -> str:
    """Writes one file; returns its SHA-256 (hex)."""
    sha256 = hashlib.sha256()
    shape = CHUNK_BYTES // UNIT_BYTES, UNIT_BYTES
    with replacing(path) as fd, writing(fd, shape) as writer, ExitStack() as stack:
        stream = _Stream(file.parts, stack)
        for byte_start in range(0, file.num_bytes, CHUNK_BYTES):
            data = writer.buffer().reshape(-1)[: min(CHUNK_BYTES, file.num_bytes - byte_start)]
            stream.fill(data)
            sha256.update(data.data)
            _write(writer, fd, data)
            written.add(len(data))
        stream.close()
        writer.finish()
    return sha256.hexdigest()


def _write(writer: PageWriter, fd: int, data: np.ndarray) -> None:
    """Writes whole units through the writer; what is left of the last chunk through the page cache."""
    whole = len(data) // UNIT_BYTES * UNIT_BYTES
    tail = data[whole:].tobytes()
    if whole:
        writer.write(data[:whole].reshape(-1, UNIT_BYTES))
    if tail:
        writer.finish()
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        write_all(fd, tail)


class _Stream:
    """The bytes of parts, back to back. Holds one reader open at a time, and closes it with the stack."""

    def __init__(self, parts: Sequence[Part], stack: ExitStack) -> None:
        self._waiting = list(parts)
        self._part: Part | None = None
        self._reader: PartReader | None = None
        self._at = 0  # in the part
        stack.callback(self._give_up)

    def fill(self, out: np.ndarray) -> None:
        """Fills out, contiguous uint8 [n], with the next bytes."""
        done = 0
        while done < len(out):
            if self._part is None or self._at == self._part.num_bytes:
                self.close()
                self._part, self._at = self._waiting.pop(0), 0
                self._reader = self._part.open()
            assert self._reader is not None
            step = min(len(out) - done, self._part.num_bytes - self._at)
            self._reader.read(self._at, out[done : done + step])
            self._at, done = self._at + step, done + step

    def close(self) -> None:
        """Ends the part that is read; raises `FormatError` if it has changed."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _give_up(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
