"""A worker process from its parent's side: it has a limit of memory and of time, and its end has a name.

Input: a program of `workers/`, requests. Output: its answers, a message at a time.
Errors: `FormatError` naming the file if the library finds it damaged, or if the worker dies or does not answer in time;
`BudgetError` if it needs more memory than it may take; `ConfigError` for what it refuses; `OSError` as it saw it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from tierstore.errors import BudgetError, ConfigError, FormatError, TierStoreError
from tierstore.units import format_bytes

from .workers import worker_messages

MEMORY_BYTES = 640 << 20  # beyond what its library takes when loaded
ANSWER_S = 300.0  # without a byte of an answer
PIPE_BYTES = 1 << 20
LAST_WORDS_BYTES = 4096  # of what it printed, for the message
# One thread, and one heap, which keeps what is freed: fresh pages for each batch took a fifth of a worker's time.
# Blocks beyond 32 MiB, the most that glibc takes for it, go back at once, since address space is what is limited.
_ENVIRONMENT = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "ARROW_IO_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_LEFT_OUT = {"PYTHONSAFEPATH"}  # workers import from their own folder


def _allocate(num_bytes: int) -> np.ndarray:
    return np.empty(num_bytes, dtype=np.uint8)  # not written before it is filled


class _Space:
    """Memory for bodies that are not kept: fresh pages for each took longer than reading them from the pipe."""

    def __init__(self) -> None:
        self._bytes = _allocate(0)

    def allocate(self, num_bytes: int) -> np.ndarray:
        """Returns memory that the next call returns again."""
        if len(self._bytes) < num_bytes:
            self._bytes = _allocate(num_bytes)
        return self._bytes[:num_bytes]


class _Words(NamedTuple):
    """What errors say of a worker that dies (cause, remedy), gives no answer (late), or lacks memory (smaller)."""

    cause: str
    remedy: str
    late: str
    smaller: str


_WORDS = {
    "column_worker": _Words(
        "the file is damaged",
        "copy it again, or write it in smaller row groups or batches",
        "copy the file again, or try it on a disk that answers",
        "write it in smaller row groups or batches, or take out its longest documents",
    ),
    "text_worker": _Words(
        "a text in it, or in an input that follows, ends the tokenizer",
        "trace the inputs one by one to find it, and leave it out, or update tokenizers",
        "trace the inputs one by one to find the text that takes so long, and leave it out",
        "take out its longest documents, or give a smaller tokenizer",
    ),
    "chat_worker": _Words(
        "a chat in it ends the chat template",
        "take out its longest chats, or correct the template",
        "its chat template has a loop without end, or a chat is very long: correct the template, or take that out",
        "take out its longest chats, or correct the template",
    ),
}


class WorkerProcess:
    """One worker, started when it is first asked; use it with `with`, which ends it. One thread at a time."""

    def __init__(self, program: str, *, memory_bytes: int = MEMORY_BYTES, answer_s: float = ANSWER_S) -> None:
        """program: the name of a file of `workers/`."""
        self._program = Path(worker_messages.__file__).with_name(f"{program}.py")
        self._memory_bytes, self.answer_s, self._words = memory_bytes, answer_s, _WORDS[program]
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def ask(self, path: Path, head: Mapping[str, Any], body: Any = b"") -> Iterator[tuple[dict[str, Any], memoryview]]:
        """Sends a request about a file and yields the answers. Blocks, `answer_s` without a byte at most.

        The body of an answer is overwritten by the next one. Left before its end, the worker is ended with it. What was
        raised is what the module says.
        """
        space = _Space()
        self.send(path, head, body)
        complete = False
        try:
            while True:
                answer, data = self.receive(path, space.allocate)
                if complete := bool(answer.get("end")):
                    return
                yield answer, data
        except TierStoreError:
            complete = self._process is not None  # it named an error and waits for the next request
            raise
        finally:
            if not complete:
                self.close()

    def send(self, path: Path, head: Mapping[str, Any], body: Any = b"") -> None:
        """Sends a request about a file; starts the worker if need be. Blocks while the worker is busy."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            worker_messages.send(process.stdin.fileno(), dict(head), (body,))
        except BrokenPipeError as error:
            raise self._died(path) from error

    def receive(
        self, path: Path, allocate: Callable[[int], np.ndarray] = _allocate
    ) -> tuple[dict[str, Any], memoryview]:
        """Returns the next answer of a request about a file; raises the error that it names.

        allocate: memory for so many bytes of a body, uint8.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)

        def read(view: memoryview) -> int:
            if not poll.poll(self.answer_s * 1000):
                raise TimeoutError
            return os.readv(fd, [view])

        try:
            answer, data = worker_messages.receive(read, allocate)
        except EOFError as error:
            raise self._died(path) from error
        except TimeoutError as error:
            self.close()
            raise FormatError(
                f"{path}: the process that reads it gave no answer in {self.answer_s:.0f} s and was ended; "
                f"{self._words.late}"
            ) from error
        if "error" in answer:
            raise self._error(path, answer)
        return answer, data

    def _start(self) -> subprocess.Popen[bytes]:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, str(self._program), str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={name: value for name, value in os.environ.items() if name not in _LEFT_OUT} | _ENVIRONMENT,
            bufsize=0,
            process_group=0,  # Ctrl-C is for the parent, which ends this one
        )
        self._widen(self._process)
        return self._process

    @staticmethod
    def _widen(process: subprocess.Popen[bytes]) -> None:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # the user's pipes may have a lower limit
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def _died(self, path: Path) -> TierStoreError:
        """Returns the error for a worker that is gone; ends what is left of it."""
        assert self._process is not None
        assert self._stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        status = self._process.poll()
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
        words = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.close()
        if words and "ModuleNotFoundError" in words[-1]:
            return ConfigError(f"{path}: {words[-1]}")
        how = f"status {status}" if status is None or status >= 0 else _signal_name(-status)
        last = f"; {words[-1]:.300}" if words else ""
        return FormatError(
            f"{path}: the process that reads it ended ({how}{last}); {self._words.cause}, or needs more than the "
            f"{format_bytes(self._memory_bytes)} that the process may take: {self._words.remedy}"
        )

    def _error(self, path: Path, answer: Mapping[str, Any]) -> Exception:
        kind, text = answer["error"], str(answer.get("text", ""))
        if kind == "row":
            return ConfigError(f"{path}: {text}; take that out, or name another field with --field")
        if kind == "memory":
            return BudgetError(
                f"{path}: more than the {format_bytes(self._memory_bytes)} that the process which reads it may take "
                f"({text:.300}); {self._words.smaller}"
            )
        if kind == "system":
            return OSError(int(answer["errno"]), os.strerror(int(answer["errno"])), str(path))
        if kind == "template":
            return ConfigError(
                f"{path}: the chat template refuses it ({text:.300}); take it out, or name a field of text"
            )
        return FormatError(f"{path} is damaged, or not what it begins like ({text:.300}); copy it again")

    def kill(self) -> None:
        """Ends the worker while another thread waits for it, which then gets an error; that one closes it."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Ends the worker, whatever it does. Closing twice is harmless."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.wait()
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
