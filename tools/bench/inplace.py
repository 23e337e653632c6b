"""`tierstore bench inplace`: stores in place, beside reading the checkpoint once, and beside stores with shards.

Input: a size. Output: seconds of pairs (reading the files once, the build in place) from a dropped cache; what the
store takes beside the table; the rates of cold lookups in place over those of a store with shards of the same
checkpoint, for one plane (bf16) and for scales apart (V4.1's), which memory holds. Both stores get the same keys, never
asked for before, in turn. Errors: those of a build; `ConfigError` if a lookup gives other rows.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import tierstore
from engram_adapter import build_checkpoint
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.spec import KEY_MAX
from tierstore.store.table import Table
from tierstore.units import format_bytes

from ..synth import write_checkpoint
from . import page_cache
from .build import check_room, run_program
from .pairs import SUBJECT, Options, Result

SIZE_BYTES = 2 << 30
TOKENS = 1024
DRAM_FRACTION = 1 / 8  # of the table: memory then holds V4.1's scales, and next to nothing of what is asked for
READ_BYTES = 4 << 20
READING, SHARDS = "reading the files once", "a store with shards"
LEAST = {"one plane (bf16)": 0.9, "scales apart, in memory": 0.8}
SIDE_FRACTION_MAX = 0.0015  # of the table, of one plane
SHAPES: dict[str, tuple[str, str | None]] = {  # family, dtype of the tables
    "one plane (bf16)": ("qwen4_exp", "bf16"),
    "scales apart, in memory": ("deepseek_v41", None),
}

_BUILD = """
import sys, time
from engram_adapter import build_checkpoint
started = time.monotonic()
build_checkpoint(sys.argv[1], sys.argv[2], in_place=True)
print(time.monotonic() - started)
"""


def run(folder: Path, options: Options) -> Result:
    """Measures builds and cold lookups of both shapes, in a temporary folder under `folder`, 2 GiB each.

    Needs twice the size and a little. Raises `BudgetError` where the disk has less.
    """
    size_bytes = options.size_bytes or SIZE_BYTES
    check_room(folder, size_bytes)
    result = Result(f"in place, tables of {format_bytes(size_bytes)}")
    for shape, (family, dtype) in SHAPES.items():
        with tempfile.TemporaryDirectory(dir=folder, prefix="bench-inplace-") as name:
            checkpoint = Path(name) / "checkpoint"
            file_bytes = max(size_bytes // 4, 1 << 20)
            write_checkpoint(checkpoint, family, dtype=dtype, table_bytes=size_bytes, file_bytes=file_bytes)
            _measure_builds(Path(name), checkpoint, shape, options.pairs, result)
            _measure_lookups(Path(name), checkpoint, shape, options, result)
    return result


def _measure_builds(folder: Path, checkpoint: Path, shape: str, pairs: int, result: Result) -> None:
    files = [file for file in checkpoint.iterdir() if file.suffix == ".safetensors"]
    num_bytes = sum(file.stat().st_size for file in files)
    store = folder / "built-in-place"

    def build() -> float:
        page_cache.drop(files)
        shutil.rmtree(store, ignore_errors=True)
        return float(run_program([sys.executable, "-c", _BUILD, str(checkpoint), str(store)], "building in place"))

    def read() -> float:
        page_cache.drop(files)
        return _seconds_to_read(files)

    sides = {SUBJECT: build, READING: read}
    result.compare(f"{shape}: build in place", "MiB", num_bytes / (1 << 20), sides, pairs, {READING: 0.9})
    image = read_catalog(store)
    table_bytes = sum(layout.spec.table_bytes for layout in image.tables.values())
    share = sum(layout.store_bytes for layout in image.tables.values()) / table_bytes
    bound = SIDE_FRACTION_MAX if shape == next(iter(SHAPES)) else None
    result.figure(f"{shape}: what the store takes, of the table", "", [share], bound)


def _seconds_to_read(files: list[Path]) -> float:
    buffer = memoryview(bytearray(READ_BYTES))
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                continue
    return time.perf_counter() - started


def _measure_lookups(folder: Path, checkpoint: Path, shape: str, options: Options, result: Result) -> None:
    build_checkpoint(checkpoint, folder / "shards")
    image = read_catalog(folder / "shards")
    table_bytes = sum(layout.spec.table_bytes for layout in image.tables.values())
    dram_bytes = options.dram_bytes or int(table_bytes * DRAM_FRACTION)
    with contextlib.ExitStack() as stack:
        paths = {SUBJECT: folder / "built-in-place", SHARDS: folder / "shards"}
        stores = {side: stack.enter_context(tierstore.open(path, dram=dram_bytes)) for side, path in paths.items()}
        lookups = {side: _ColdLookups(store[next(iter(store))], options) for side, store in stores.items()}
        if not np.array_equal(lookups[SUBJECT].rows(), lookups[SHARDS].rows()):
            raise ConfigError(f"{checkpoint}: the two stores gave different rows; run tierstore verify on both")
        num_rows = lookups[SUBJECT].num_rows
        sides = {side: lookup.seconds for side, lookup in lookups.items()}
        result.compare(f"{shape}: cold lookups", "row", num_rows, sides, options.pairs, {SHARDS: LEAST[shape]})
        for side, store in stores.items():
            stats = store.stats()
            result.facts[f"{shape}: {side}: served by"] = stats["io"]
            result.facts[f"{shape}: {side}: reads for a missed key"] = round(
                stats["pages_read"] / max(stats["hits"]["nvme"], 1), 3
            )


class _ColdLookups:
    """Lookups of keys of its own in one store; those of two with one seed ask for the same keys."""

    def __init__(self, table: Table, options: Options) -> None:
        self._table, self._generator = table, np.random.default_rng(len(table.spec.orders))
        self._num_tokens = options.tokens or TOKENS
        self._out = np.ones((self._num_tokens, table.spec.num_heads, table.spec.row_bytes), dtype=np.uint8)
        self.num_rows = self._num_tokens * table.spec.num_heads

    def rows(self) -> np.ndarray:
        """Returns the rows of the next keys, in a buffer that the next call overwrites."""
        self._table.lookup(self._keys(), self._out)
        return self._out

    def seconds(self) -> float:
        """Returns how long the lookup of the next keys took."""
        keys = self._keys()
        started = time.perf_counter()
        self._table.lookup(keys, self._out)
        return time.perf_counter() - started

    def _keys(self) -> np.ndarray:
        shape = (self._num_tokens, len(self._table.spec.orders))
        return self._generator.integers(0, KEY_MAX, shape, dtype=np.int64, endpoint=True)
