"""Drives the yardstick, a C program that does only the work that a lookup cannot do without (bare.c).

Input: lists of ranges or of keys. Output: the seconds that the program measured itself, a list at a time, so that its
runs can be interleaved with ours. It is compiled on first use, into a cache folder, by the machine's own compiler, for
this machine alone. Errors: `ConfigError` without a C compiler, and for each error that the program answers.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from tierstore.errors import ConfigError

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-Wall", "-Wextra", "-pthread", "-fno-math-errno")
COMPILE_TIMEOUT_S = 120
ANSWER_TIMEOUT_S = 600
STOP_TIMEOUT_S = 10
SOURCES = sorted(Path(__file__).parent.glob("bare*.[ch]"))


def compiled(cache: Path | None = None) -> Path:
    """Returns the program, compiled now where the cache has none of these sources, flags and machine.
    Blocks a second or two.

    cache: by default `tierstore` in $XDG_CACHE_HOME or ~/.cache. Raises `ConfigError` where there is no compiler,
    or it fails.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise ConfigError(f"no C compiler ({', '.join(COMPILERS)}) is there to make the bare loop; apt-get install gcc")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tierstore"
    identity = hashlib.sha256("\0".join([compiler, *FLAGS, _cpu_flags()]).encode())
    for source in SOURCES:
        identity.update(source.read_bytes())
    program = cache / f"bare-{identity.hexdigest()[:16]}"
    if program.exists():
        return program
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / "bare"
        command = [
            compiler,
            *FLAGS,
            *(str(source) for source in SOURCES if source.suffix == ".c"),
            "-lm",
            "-o",
            str(made),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        if result.returncode:
            raise ConfigError(f"{compiler} cannot compile the bare loop: {result.stderr.strip()[:500]}")
        made.rename(program)
    return program


def _cpu_flags() -> str:
    """Returns what this processor can do: a program made with -march=native must not be run by another."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return ""


class BareLoop:
    """The program at work in one mode. One thread drives it; use it in a `with`."""

    def __init__(self, *arguments: str | int) -> None:
        """Starts it: ("uring", depth, "direct", files...), ("willneed", window, files...), ("entries", bytes,
        n, threads), ("train", rule, dim, rows, threads)."""
        self._folder = tempfile.TemporaryDirectory(prefix="tierstore-bare-")
        command = [str(compiled()), *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    @classmethod
    def uring(cls, files: Sequence[Path], depth: int = 128, *, direct: bool = True) -> BareLoop:
        """Returns a loop of io_uring reads, with O_DIRECT or through the page cache."""
        return cls("uring", depth, "direct" if direct else "buffered", *map(str, files))

    @classmethod
    def willneed(cls, files: Sequence[Path], window: int = 64) -> BareLoop:
        """Returns a loop of WILLNEED, `window` batches of 1,024 ranges ahead, and pread."""
        return cls("willneed", window, *map(str, files))

    @classmethod
    def entries(cls, entry_bytes: int, pairs: np.ndarray, threads: int = 1) -> BareLoop:
        """Returns a loop that copies entries out of a table filled with pairs, int64 [N, 2] of (order index, key)."""
        loop = cls("entries", entry_bytes, len(pairs), threads)
        loop._send_list("fill", pairs, 2)
        return loop

    @classmethod
    def train(cls, rule: str, dim: int, num_rows: int, threads: int = 1) -> BareLoop:
        """Returns a loop of steps of "sgd", "row_wise_adagrad" or "lazy_adam" on rows in memory that begin as zeros."""
        return cls("train", rule, dim, num_rows, threads)

    def load(self, items: np.ndarray) -> None:
        """Gives it the list to work off: int64 [N, 3] of (file, byte offset, bytes), [N, 2] of (order index, key),
        or [N, 1] of row ids."""
        self._send_list("load", items, items.shape[1])

    def run(self, group: int = 0) -> list[float]:
        """Works off the list once, `group` items at a time (0: all at once); returns the seconds of each group."""
        return [int(ns) / 1e9 for ns in self._command(f"go {group}")]

    def cpu_seconds(self) -> float:
        """Returns the processor time that the program has taken so far, the kernel's on its behalf included."""
        (ns,) = self._command("cpu")
        return int(ns) / 1e9

    def output(self) -> np.ndarray:
        """Returns what the last run put out, uint8."""
        path = Path(self._folder.name) / "out"
        self._command(f"dump {path}")
        return np.fromfile(path, dtype=np.uint8)

    def close(self) -> None:
        """Ends the program and waits for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> BareLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send_list(self, command: str, items: np.ndarray, width: int) -> None:
        assert items.ndim == 2
        assert items.shape[1] == width
        path = Path(self._folder.name) / command
        items.astype("<i8", copy=False).tofile(path)
        (count,) = self._command(f"{command} {path}")
        assert int(count) == len(items)

    def _command(self, text: str) -> list[str]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> list[str]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(ANSWER_TIMEOUT_S):
                raise ConfigError(
                    f"the bare loop has not answered for {ANSWER_TIMEOUT_S} s; the disk has stopped answering"
                )
        status, *words = self._process.stdout.readline().decode().split() or ["ended"]
        if status != "ok":
            raise ConfigError(
                f"the bare loop: {' '.join([status, *words])}; run it on a machine and disk that allow this"
            )
        return words
