"""The compiled kernels against the NumPy reference, and both against published vectors and an oracle written apart."""

from __future__ import annotations

import numpy as np
import pytest
from support.shapes import POISON

from tierstore import kernels
from tierstore.kernels import reference

IMPLEMENTATIONS = {"reference": reference, "compiled": kernels}

# RFC 3720, appendix B.4, and the check value of the catalogue of CRC algorithms.
VECTORS = [
    (b"", 0x00000000),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


def test_the_compiled_kernels_are_built_here() -> None:
    assert kernels.crc32c_backend() in ("sse4.2", "armv8-crc", "table")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("data", "checksum"), VECTORS)
def test_crc32c_equals_the_published_vectors(name: str, data: bytes, checksum: int) -> None:
    assert IMPLEMENTATIONS[name].crc32c(data, 0) == checksum


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 63, 64, 1000, 1007, 1008, 1009, 2015, 2017, 2120, 4088, 10_000])
def test_crc32c_continues_from_a_seed(name: str, num_bytes: int) -> None:
    crc32c = IMPLEMENTATIONS[name].crc32c
    data = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8).tobytes()
    for cut in {0, num_bytes // 3, num_bytes}:
        assert crc32c(data[cut:], crc32c(data[:cut], 0)) == crc32c(data, 0) == reference.crc32c(data, 0)


def bitwise_crc32c(data: bytes, seed: int) -> int:
    state = seed ^ 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def plain_pages(
    planes: list[np.ndarray], rows_per_page: int, page_bytes: int, page_start: int, version: int, seed: int
) -> bytes:
    """Pages made byte by byte, in plain Python."""
    rows = [b"".join(plane[i].tobytes() for plane in planes) for i in range(len(planes[0]))]
    pages = b""
    for page, first in enumerate(range(0, len(rows), rows_per_page)):
        body = b"".join(rows[first : first + rows_per_page]).ljust(page_bytes - 16, b"\0")
        body += (page_start + page).to_bytes(8, "little") + version.to_bytes(4, "little")
        pages += body + bitwise_crc32c(body, seed).to_bytes(4, "little")
    return pages


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_rows", [1, 2, 14, 15, 16, 30, 31])
@pytest.mark.parametrize("widths", [(256, 8), (1,), (3, 5, 7), (264, 0)])
def test_pages_are_sealed_as_the_format_says(name: str, num_rows: int, widths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(num_rows)
    planes = [rng.integers(0, 256, (num_rows, width), dtype=np.uint8) for width in widths]
    out = np.full((-(-num_rows // 15), 4096), POISON, dtype=np.uint8)
    IMPLEMENTATIONS[name].seal_pages(planes, out, 15, 2**33 + 5, 1, 0xDEADBEEF)
    assert out.tobytes() == plain_pages(planes, 15, 4096, 2**33 + 5, 1, 0xDEADBEEF)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_flipped_bit_of_a_page_is_noticed(name: str) -> None:
    check = IMPLEMENTATIONS[name].check_pages
    out = np.zeros((1, 4096), dtype=np.uint8)
    reference.seal_pages([np.random.default_rng(0).integers(0, 256, (15, 264), dtype=np.uint8)], out, 15, 9, 1, 77)
    flipped = np.repeat(out, 4096 * 8, axis=0) if name == "compiled" else np.repeat(out, 512, axis=0)
    bits = np.arange(len(flipped)) if name == "compiled" else np.random.default_rng(1).choice(32768, 512, replace=False)
    flipped[np.arange(len(bits)), bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
    numbers = np.full(len(bits), 9, dtype=np.int64)
    assert (check(flipped, numbers, 1, 77) == kernels.PAGE_BAD_CHECKSUM).all()
    assert (check(out, numbers[:1], 1, 77) == kernels.PAGE_GOOD).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_page_of_another_place_version_or_table_is_noticed(name: str) -> None:
    check = IMPLEMENTATIONS[name].check_pages
    out = np.zeros((2, 4096), dtype=np.uint8)
    reference.seal_pages([np.ones((30, 264), dtype=np.uint8)], out, 15, 9, 1, 77)
    assert check(out, np.array([9, 10]), 1, 77).tolist() == [kernels.PAGE_GOOD] * 2
    assert check(out, np.array([10, 9]), 1, 77).tolist() == [kernels.PAGE_OTHER_NUMBER] * 2
    assert check(out, np.array([9, 10]), 2, 77).tolist() == [kernels.PAGE_OTHER_VERSION] * 2
    assert check(out, np.array([9, 10]), 1, 78).tolist() == [kernels.PAGE_BAD_CHECKSUM] * 2


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_pages_and_numbers_that_do_not_go_together_are_refused(name: str) -> None:
    check = IMPLEMENTATIONS[name].check_pages
    for shape, num_numbers in (((2, 4096), 1), ((2, 4096), 3), ((1, 16), 1), ((4096,), 1)):
        with pytest.raises(ValueError, match="page"):
            check(np.zeros(shape, np.uint8), np.zeros(num_numbers, np.int64), 1, 0)
    for pages, numbers in (
        (np.zeros((1, 4096), np.int64), np.zeros(1, np.int64)),
        (np.zeros((1, 4096), np.uint8), np.zeros(1, np.float64)),
    ):
        with pytest.raises(TypeError):
            check(pages, numbers, 1, 0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_planes_of_other_types_are_refused(name: str, dtype: type) -> None:
    out = np.full((1, 4096), POISON, dtype=np.uint8)
    with pytest.raises(TypeError):
        IMPLEMENTATIONS[name].seal_pages([np.full((3, 10), 300, dtype=dtype)], out, 15, 0, 1, 0)
    with pytest.raises(ValueError, match="plane"):
        IMPLEMENTATIONS[name].seal_pages([], out, 15, 0, 1, 0)
    assert (out == POISON).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    seal = IMPLEMENTATIONS[name].seal_pages
    rows = np.zeros((16, 264), dtype=np.uint8)
    for planes, out, rows_per_page in (
        ([rows], np.zeros((1, 4096), np.uint8), 15),  # a page too few
        ([rows], np.zeros((1, 4096), np.uint8), 16),  # more rows than fit
        ([rows, rows[:3]], np.zeros((2, 4096), np.uint8), 7),  # planes of different lengths
    ):
        with pytest.raises(ValueError, match="row"):
            seal(planes, out, rows_per_page, 0, 1, 0)
