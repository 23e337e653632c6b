"""Text through several processes that tokenize, each on one thread; the order of documents is kept.

Input: documents in parts. Output: `Piece`s in order, in bounded memory: a batch for each process, and one waiting.
Errors: those of `WorkerProcess`: a text that ends the tokenizer is named by its file.
"""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tierstore.errors import FormatError
from tierstore.process.workers import joined_pool

from .ids import Piece
from .processes import WorkerProcess
from .text import TextPart, batches_of, joined_piece

JOBS_MAX = 256
JOBS_DEFAULT_MAX = 16  # each holds a tokenizer, some 150 MB
MEMORY_BYTES = 2 << 30  # of addresses: reading the JSON of a large vocabulary takes several times its size
SMALL_TEXT_BYTES = 8 << 20  # is tokenized before processes have started


def default_jobs(text_bytes: int) -> int:
    """Returns how many processes a text of so many bytes is given: 0 for this one."""
    if text_bytes < SMALL_TEXT_BYTES:
        return 0
    return max(1, min(len(os.sched_getaffinity(0)), JOBS_DEFAULT_MAX))


class Tokenizing:
    """Processes that tokenize; use it with `with`, which ends them. One thread at a time."""

    def __init__(self, tokenizer: Tokenizer, jobs: int, path: Path) -> None:
        """path: of the tokenizer, for errors about it."""
        self._text, self._path = tokenizer.to_str().encode(), path
        self._workers = [WorkerProcess("text_worker", memory_bytes=MEMORY_BYTES) for _ in range(jobs)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._loaded: set[int] = set()  # of workers, by their place; each is used by one thread at a time

    def pieces(self, parts: Iterable[tuple[Path, TextPart]], bos: int | None) -> Iterator[Piece]:
        """Yields the tokens of documents in batches; `bos`, if given, stands before each document. Blocks."""
        waiting: deque[tuple[list[TextPart], Future[list[np.ndarray]]]] = deque()
        with joined_pool(len(self._workers), "tierstore-tokenize") as pool:
            try:
                for paths, batch in batches_of(parts):
                    waiting.append((batch, pool.submit(self._encoded, paths[0], [part.text for part in batch])))
                    if len(waiting) > len(self._workers):
                        batch, future = waiting.popleft()
                        yield joined_piece(batch, future.result(), bos)
                while waiting:
                    batch, future = waiting.popleft()
                    yield joined_piece(batch, future.result(), bos)
            except BaseException:
                for _, future in waiting:
                    future.cancel()
                for worker in self._workers:  # ends what their threads wait for
                    worker.kill()
                raise

    def _encoded(self, path: Path, texts: list[str]) -> list[np.ndarray]:
        """Returns the ids of each text, in a thread of the pool. path: of the first text, for errors."""
        worker = self._idle.get()
        try:
            place = self._workers.index(worker)
            if place not in self._loaded:
                for _ in worker.ask(self._path, {"do": "load"}, self._text):
                    pass
                self._loaded.add(place)
            data = [text.encode() for text in texts]
            request = {"do": "encode", "bytes": [len(each) for each in data]}
            (_, body), *_ = list(worker.ask(path, request, b"".join(data)))
        except BaseException:
            self._loaded.clear()
            raise
        finally:
            self._idle.put(worker)
        counts = np.frombuffer(body, dtype=np.int64, count=len(texts))
        ids = np.frombuffer(body, dtype=np.int32, offset=counts.nbytes)
        if int(counts.sum()) != len(ids) or (counts < 0).any():
            raise FormatError(f"{path}: the tokenizer's process answered {len(ids)} ids for {counts.sum()}; run again")
        return np.split(ids, np.cumsum(counts)[:-1])

    def __enter__(self) -> Tokenizing:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()
