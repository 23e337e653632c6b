"""Lookups of single pairs by the compiled engine: whatever does not fit is refused, as `submit` refuses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.shapes import ENTRY_BYTES, POISON

import tierstore

GOOD: dict[str, Any] = {
    "index": 0,
    "keys": np.arange(4),
    "pairs": np.arange(4, dtype=np.int32),
    "out": np.full((4, ENTRY_BYTES), POISON, dtype=np.uint8),
}


@pytest.fixture
def engine(built: Path) -> Iterator[Any]:
    with tierstore.open(built, dram="600KiB") as store:
        yield store._engine._engine


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


BAD = {
    "no such table": {"index": 3},
    "a key below -1": {"keys": np.array([0, 1, -2, 3])},
    "a pair below 0": {"pairs": np.array([0, 1, -1, 3], dtype=np.int32)},
    "fewer pairs": {"pairs": np.arange(3, dtype=np.int32)},
    "wide pairs": {"pairs": np.arange(4)},
    "narrow keys": {"keys": np.arange(4, dtype=np.int32)},
    "keys of tokens": {"keys": np.arange(4).reshape(2, 2)},
    "strided keys": {"keys": np.arange(8)[::2]},
    "strided pairs": {"pairs": np.arange(8, dtype=np.int32)[::2]},
    "a short buffer": {"out": np.zeros((3, ENTRY_BYTES), dtype=np.uint8)},
    "short entries": {"out": np.zeros((4, 319), dtype=np.uint8)},
    "a strided buffer": {"out": np.zeros((4, 640), dtype=np.uint8)[:, ::2]},
    "a buffer that cannot be written": {"out": read_only(np.zeros((4, ENTRY_BYTES), dtype=np.uint8))},
    "no array": {"keys": [0, 1, 2, 3]},
    "a plain table's row that there is not": {
        "index": 2,
        "keys": np.array([33, 0, 0, 0]),
        "out": np.zeros((4, 24), np.uint8),
    },
}


VALUES = {"a key below -1", "a pair below 0", "a plain table's row that there is not"}  # seen when they are looked up


@pytest.mark.parametrize("bad", BAD)
def test_pairs_that_do_not_fit_are_refused_and_not_counted(engine: Any, bad: str) -> None:
    arguments = GOOD | BAD[bad]
    before = arguments["out"].copy()
    with pytest.raises(ValueError, match="pair"):
        engine.submit_pairs(*arguments.values())
    assert engine.counters()["batches"] == 0
    assert not any(count for table in engine.counters()["tables"] for counts in table for count in counts)
    if bad not in VALUES:
        np.testing.assert_array_equal(arguments["out"], before)


def test_pairs_of_a_plain_table_are_rows_whatever_their_place(engine: Any) -> None:
    out = np.full((3, 24), POISON, dtype=np.uint8)
    pairs = np.array([2**31 - 1, 5, 0], dtype=np.int32)
    assert engine.submit_pairs(2, np.array([32, -1, 0]), pairs, out) is None
    whole = np.full((3, 1, 24), 0x5A, dtype=np.uint8)
    assert engine.lookup(2, np.array([[32], [-1], [0]]), whole)
    np.testing.assert_array_equal(out, whole[:, 0])
