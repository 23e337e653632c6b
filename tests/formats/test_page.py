"""Pages: their geometry, and the seeds that keep tables and checkpoints apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tierstore import CorruptPageError
from tierstore.formats.page import check_pages, page_seed, seal_pages
from tierstore.layout import PageShape
from tierstore.spec import ROW_BYTES_MAX, TableSpec


@pytest.mark.parametrize(
    ("row_bytes", "page_bytes", "rows_per_page"),
    [
        (264, 4096, 15),
        (320, 4096, 12),
        (160, 4096, 25),
        (256, 4096, 15),
        (84, 4096, 48),
        (1, 4096, 4080),
        (4080, 4096, 1),
    ],
)
def test_known_rows_take_known_pages(row_bytes: int, page_bytes: int, rows_per_page: int) -> None:
    assert PageShape.of_rows(row_bytes) == PageShape(page_bytes, rows_per_page, row_bytes)


@pytest.mark.parametrize(
    "row_bytes", [1, 100, 512, 1365, 2048, 3000, 4081, 5000, 10240, 33000, 65536, 100_000, ROW_BYTES_MAX]
)
def test_a_page_is_the_smallest_that_wastes_at_most_a_tenth(row_bytes: int) -> None:
    shape = PageShape.of_rows(row_bytes)
    waste = {u * 4096: 1 - (u * 4096 - 16) // row_bytes * row_bytes / (u * 4096) for u in range(1, 65)}
    frugal = [size for size, part in waste.items() if part <= 0.1]
    assert shape.page_bytes == (min(frugal) if frugal else min(waste, key=lambda size: (waste[size], size)))
    assert shape.rows_per_page == (shape.page_bytes - 16) // row_bytes >= 1


def spec(**changes: object) -> TableSpec:
    return dataclasses.replace(TableSpec.plain("layers.1", 100, 264, "raw", 264), **changes)


@pytest.mark.parametrize(
    ("other", "digest"),
    [
        (spec(name="layers.2"), "a"),
        (spec(fingerprint="0" * 64), "a"),
        (spec(codec="fp8_e4m3_e8m0x32", dim=256), "a"),
        (spec(), "b"),
    ],
)
def test_a_page_of_another_table_hash_codec_or_checkpoint_never_passes(other: TableSpec, digest: str) -> None:
    shape = PageShape.of_rows(264)
    pages = np.empty((2, 4096), dtype=np.uint8)
    seal_pages([np.ones((30, 264), dtype=np.uint8)], shape, 4, page_seed(spec(), "a"), pages)
    check_pages(pages, np.array([4, 5]), page_seed(spec(), "a"), "layers.1")
    with pytest.raises(CorruptPageError, match="page 4 of table layers"):
        check_pages(pages, np.array([4, 5]), page_seed(other, digest), "layers.1")


def test_the_error_names_the_first_bad_page_and_how_many() -> None:
    shape = PageShape.of_rows(264)
    pages = np.empty((3, 4096), dtype=np.uint8)
    seal_pages([np.ones((45, 264), dtype=np.uint8)], shape, 0, 1, pages)
    pages[1, 100] ^= 1
    with pytest.raises(CorruptPageError, match=r"page 1 of table t \(1 of 3 pages.*checksum.*tierstore verify"):
        check_pages(pages, np.arange(3), 1, "t")
