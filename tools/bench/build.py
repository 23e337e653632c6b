"""`tierstore bench build`: how near a build comes to merely copying the checkpoint.

Input: a size. Output: seconds of pairs (copy, build) over the same files in the same cache state, and their ratio. Both
sides end with everything synced to disk. Peak memory is that of the build, which runs in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from tierstore.errors import BudgetError, ConfigError
from tierstore.units import format_bytes

from ..synth import write_checkpoint
from .pairs import Options

SIZE_BYTES = 2 << 30
CACHE_STATES = ("warm", "cold")
BUILD_TIMEOUT_S = 3600
DISK_PER_SIZE = 2.1  # the checkpoint, and a copy or a store with its pages' padding
SPARE_DISK_BYTES = 256 << 20

_BUILD = """
import pathlib, sys, time
from engram_adapter import build_checkpoint
started = time.monotonic()
build_checkpoint(sys.argv[1], sys.argv[2])
seconds = time.monotonic() - started
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(seconds, int(status["VmHWM"].split()[0]) * 1024)  # not getrusage's peak: that begins with the parent's
"""


@dataclass(frozen=True)
class Result:
    """Seconds of every pair, by cache state of the checkpoint's files before each run."""

    checkpoint_bytes: int
    store_bytes: int
    copy_s: dict[str, list[float]]
    build_s: dict[str, list[float]]
    build_peak_bytes: int
    facts: dict[str, str] = field(default_factory=dict)  # how the command was run; so has every benchmark's result
    failed: str | None = None  # as every benchmark's result says; here what fails is raised

    def ratio(self, state: str) -> float:
        """Returns the build's throughput over the copy's: the median over pairs."""
        return statistics.median(c / b for c, b in zip(self.copy_s[state], self.build_s[state], strict=True))

    def table(self) -> Table:
        """Returns what is printed."""
        table = Table(
            "checkpoint's files", "cp and sync", "build", "build / cp, median of pairs", "lowest", "highest",
            title=f"build of {format_bytes(self.checkpoint_bytes)}; peak memory {format_bytes(self.build_peak_bytes)}",
        )  # fmt: skip
        for state in CACHE_STATES:
            rates = [
                format_bytes(self.checkpoint_bytes / statistics.median(seconds[state])) + "/s"
                for seconds in (self.copy_s, self.build_s)
            ]
            ratios = [c / b for c, b in zip(self.copy_s[state], self.build_s[state], strict=True)]
            table.add_row(state, *rates, f"{self.ratio(state):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for JSON."""
        return asdict(self) | {"ratio": {state: self.ratio(state) for state in CACHE_STATES}}


def run(folder: Path, options: Options) -> Result:
    """Measures pairs in each cache state, in a temporary folder under `folder`,
    over 2 GiB unless another size is given.

    Needs twice the size and a little: the checkpoint, and one copy or store of it at a time. Raises `BudgetError` where
    the disk has less, `ConfigError` where a copy or a build fails.
    """
    size_bytes, pairs = options.size_bytes or SIZE_BYTES, options.pairs
    check_room(folder, size_bytes)
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-build-") as name:
        checkpoint = Path(name) / "checkpoint"
        write_checkpoint(checkpoint, "deepseek_v41", table_bytes=size_bytes, file_bytes=max(size_bytes // 4, 1 << 20))
        files = [file for file in checkpoint.iterdir() if file.suffix == ".safetensors"]
        copy_s: dict[str, list[float]] = {state: [] for state in CACHE_STATES}
        build_s: dict[str, list[float]] = {state: [] for state in CACHE_STATES}
        peak_bytes = store_bytes = 0
        for _ in range(pairs):
            for state in CACHE_STATES:
                set_cache(files, state)
                copy_s[state].append(copy(files, Path(name) / "copy"))
                set_cache(files, state)
                seconds, peak, store_bytes = _build(checkpoint, Path(name) / "store")
                build_s[state].append(seconds)
                peak_bytes = max(peak_bytes, peak)
        return Result(sum(file.stat().st_size for file in files), store_bytes, copy_s, build_s, peak_bytes)


def check_room(folder: Path, size_bytes: int) -> None:
    needed_bytes, free_bytes = int(DISK_PER_SIZE * size_bytes) + SPARE_DISK_BYTES, shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise BudgetError(
            f"{folder}: a checkpoint of {format_bytes(size_bytes)} and its copy need {format_bytes(needed_bytes)} "
            f"({needed_bytes} bytes), the disk has {format_bytes(free_bytes)} free ({free_bytes} bytes); give a "
            f"smaller --size, or a --folder on another disk"
        )


def set_cache(files: list[Path], state: str) -> None:
    """Brings the files into the page cache, or out of it, after all earlier writes have reached the disk."""
    os.sync()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            if state == "cold":
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(fd, 1 << 24):
                    continue
        finally:
            os.close(fd)


def copy(files: list[Path], target: Path) -> float:
    """Copies with cp, then syncs each copy; returns the seconds."""
    target.mkdir()
    started = time.monotonic()
    run_program(["cp", *map(str, files), str(target)], "copying the checkpoint")
    for file in target.iterdir():
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def _build(checkpoint: Path, store: Path) -> tuple[float, int, int]:
    """Builds in a new process; returns seconds (without the interpreter's start), its peak memory,
    the store's bytes."""
    seconds, peak = run_program([sys.executable, "-c", _BUILD, str(checkpoint), str(store)], "building").split()
    store_bytes = sum(file.stat().st_size for file in store.rglob("*.shard"))
    shutil.rmtree(store)
    return float(seconds), int(peak), store_bytes


def run_program(command: list[str], what: str) -> str:
    """Runs a command and returns what it printed; raises `ConfigError` with the last
    line of its errors where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="backslashreplace", timeout=BUILD_TIMEOUT_S)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"it printed nothing, status {done.returncode}"])[-1]
        raise ConfigError(f"{what} failed: {words}; mend that and measure again")
    return done.stdout
