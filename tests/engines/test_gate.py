"""The gate of the engines' plug-ins: another version, other parameters or other rows are refused by name."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.tiny_store import DIM, build_tiny, tiny_hash

import tierstore
from engram_adapter.engines.gate import EngineMismatchError, check_attributes, check_signatures, check_version
from engram_adapter.engines.tables import (
    SAMPLE_BYTES,
    ExpectedTable,
    check_rows,
    matching_table,
    rows_at,
    sample_offsets,
)

TESTED = ("0.32", "0.34")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("some_engine")
    monkeypatch.setitem(sys.modules, "some_engine", module)
    return module


@pytest.mark.parametrize("version", ["0.32", "0.32.0", "0.33.0+cpu", "0.33.7.post1"])
def test_a_tested_version_passes(engine: ModuleType, version: str) -> None:
    engine.__version__ = version
    assert check_version("some_engine", TESTED) == version


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "0.33.0rc1", "0.33.1.dev7+gabc", "dev"])
def test_a_version_that_was_not_tested_is_refused_by_name(engine: ModuleType, version: str) -> None:
    engine.__version__ = version
    with pytest.raises(EngineMismatchError) as error:
        check_version("some_engine", TESTED)
    for part in ("some_engine", version, "0.32 up to and without 0.34", "set strict to false"):
        assert part in str(error.value)


def test_a_forced_version_is_tried_with_a_warning(engine: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    engine.__version__ = "0.40.0"
    with caplog.at_level(logging.WARNING, "tierstore"):
        assert check_version("some_engine", TESTED, forced=True) == "0.40.0"
    assert "forced: some_engine 0.40.0" in caplog.text


@pytest.mark.usefixtures("engine")
def test_an_engine_without_a_version_is_refused() -> None:
    with pytest.raises(EngineMismatchError, match="some_engine unknown"):
        check_version("some_engine", TESTED)


class Layer:
    def lookup(self, ids: object, out: object, *more: object, late: int = 0, **rest: object) -> None: ...

    @staticmethod
    def free(one: int) -> None: ...


def test_parameters_as_expected_pass() -> None:
    check_signatures(Layer, {"lookup": ["ids", "out", "*more", "late", "**rest"], "free": ["one"]}, "engine 1")
    check_attributes(Layer, ["lookup", "free"], "engine 1")


def test_other_parameters_are_refused_with_both_sides() -> None:
    with pytest.raises(EngineMismatchError, match=r"Layer\.free takes \(one\), tierstore was written for \(one, two\)"):
        check_signatures(Layer, {"free": ["one", "two"]}, "engine 1")
    with pytest.raises(EngineMismatchError, match=r"engine 1: .*Layer\.gone is missing"):
        check_signatures(Layer, {"gone": []}, "engine 1")
    with pytest.raises(EngineMismatchError, match="Layer has no gone, lost"):
        check_attributes(Layer, ["lookup", "gone", "lost"], "engine 1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExpectedTable, np.ndarray]:
    spec = tiny_hash()
    path, rows = build_tiny(tmp_path_factory.mktemp("tiny"), spec, "bf16", seed=1)
    table = rows["layers.1"]
    return path, ExpectedTable("layers.1", len(table), DIM, 2 * DIM, ("bf16",), spec.fingerprint(1)), table


def test_the_same_table_matches(tiny: tuple[Path, ExpectedTable, np.ndarray]) -> None:
    path, expected, rows = tiny
    with tierstore.open(path, dram="4MiB") as store:
        table = matching_table(store, expected, "model.layers.1")
        offsets = sample_offsets(len(rows), 0, len(rows), 2 * DIM)
        assert len(offsets) > 16
        check_rows(table, offsets, rows[offsets], 0, "model.layers.1")
        check_rows(table, offsets, rows[offsets, 10:], 10, "model.layers.1")


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("name", "layers.7"),
        ("num_rows", 5),
        ("dim", DIM + 1),
        ("row_bytes", 1),
        ("codecs", ("fp8_e4m3",)),
        ("fingerprint", "0" * 64),
    ],
)
def test_another_table_is_refused_by_what_differs(
    tiny: tuple[Path, ExpectedTable, np.ndarray], field: str, other: object
) -> None:
    path, expected, _ = tiny
    wanted = ExpectedTable(**{**expected.__dict__, field: other})
    with tierstore.open(path, dram="4MiB") as store, pytest.raises(EngineMismatchError) as error:
        matching_table(store, wanted, "model.layers.1.engram")
    shown = other[0] if isinstance(other, tuple) else str(other)
    assert "model.layers.1.engram" in str(error.value)
    assert shown in str(error.value)
    assert "build the store from the checkpoint" in str(error.value)


def test_rows_of_another_checkpoint_are_refused(tiny: tuple[Path, ExpectedTable, np.ndarray]) -> None:
    path, expected, rows = tiny
    with tierstore.open(path, dram="4MiB") as store:
        table = matching_table(store, expected, "model.layers.1")
        ids = np.arange(0, 40, 4)
        with pytest.raises(EngineMismatchError, match=r"row 0 of table layers\.1 .*10 of 10 compared rows differ"):
            check_rows(table, ids, np.roll(rows, 1, axis=0)[ids], 0, "model.layers.1")


def test_a_checkpoint_in_parts_is_sampled_as_a_whole() -> None:
    whole = sample_offsets(10_000, 0, 10_000, 100)
    parts = [sample_offsets(10_000, start, 2_500, 100) + start for start in range(0, 10_000, 2_500)]
    assert np.concatenate(parts).size >= 32
    assert set(np.concatenate(parts)) <= set(range(10_000))
    assert abs(len(whole) - np.concatenate(parts).size) <= 4


def test_of_a_large_table_few_rows_are_compared() -> None:
    num_rows, row_bytes = 400_000_000, 160
    offsets = sample_offsets(num_rows, 0, num_rows, row_bytes)
    assert len(offsets) == -(-num_rows * row_bytes // SAMPLE_BYTES)
    assert np.diff(offsets).min() > 0
    assert offsets.max() < num_rows


def test_rows_of_a_mapped_file_are_read_without_the_pages_around_them(tmp_path: Path) -> None:
    path = tmp_path / "table"
    rows = np.random.default_rng(1).integers(0, 256, (1 << 18, 64), dtype=np.uint8)
    rows.tofile(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = np.memmap(path, dtype=np.uint8, mode="r", shape=rows.shape)
        before = cached_pages(file.fileno(), rows.nbytes)
        offsets = np.arange(77, 1 << 18, 1 << 13)
        assert np.array_equal(rows_at(mapped[3:], offsets), rows[3:][offsets])
        if before == 0:  # a file system in memory keeps its pages
            assert cached_pages(file.fileno(), rows.nbytes) <= 2 * len(offsets)


def cached_pages(file: int, num_bytes: int) -> int:
    """Pages of a file that are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with mmap.mmap(file, num_bytes, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        pages = ctypes.create_string_buffer(-(-num_bytes // mmap.PAGESIZE))
        assert libc.mincore(view.ctypes.data, num_bytes, pages) == 0
        del view
    return sum(byte & 1 for byte in pages.raw)
