"""Quantized rows into bfloat16: the compiled kernel, with and without AVX2, bit for bit what the reference makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tierstore import kernels
from tierstore.codec import GGUF_BLOCKS, parse_codec
from tierstore.kernels import reference_block_codecs as reference
from tierstore.spec import codec_row_bytes

CODECS = [
    *("fp4_e2m1_e4m3x16", "fp4_e2m1_e4m3x16*0x1.8p-7", "fp4_e2m1_e4m3x16/0x1.9p+3", "fp4_e2m1_e8m0x32"),
    *("int8_fp32", "int8_bf16x128", "int8_fp16x12", "uint8b128_fp32x8", "uint8b128_bf16"),
    *("uint4b8_bf16x32", "uint4b8_fp32x6", "uint4b8_fp16", "nf4_fp32x64", "nf4_fp32"),
    *("fp8_e4m3_fp32", "fp8_e4m3_bf16x128", "fp8_e4m3_e8m0x32", "fp8_e4m3_fp16x3", *GGUF_BLOCKS),
]


def decode(module: Any, rows: np.ndarray, codec: str, dim: int, **options: int) -> np.ndarray:
    parsed = parse_codec(codec)
    out = np.full((len(rows), dim), 0x1234, dtype=np.uint16)
    module.decode_block_rows(
        rows, dim, parsed.values, parsed.scale, parsed.block or dim, parsed.factor, parsed.divides, out, **options
    )
    return out


def random_rows(codec: str, dim: int, num_rows: int, more: int = 0) -> np.ndarray:
    row_bytes = codec_row_bytes(codec, dim)
    assert row_bytes is not None
    return np.random.default_rng(dim).integers(0, 256, (num_rows, row_bytes + more), dtype=np.uint8)


@pytest.mark.parametrize("plain", [False, True], ids=["fastest", "plain"])
@pytest.mark.parametrize("codec", CODECS)
def test_any_bytes_decode_as_the_reference_decodes_them(codec: str, plain: bool) -> None:
    """Random scales are NaN, infinite and subnormal among others; rows are followed by bytes that are not theirs."""
    for dim in (768, 64 * 768):  # more blocks than scales that the kernel reads at once
        rows = random_rows(codec, dim, 100 if dim == 768 else 2, more=3)
        expected, got = decode(reference, rows, codec, dim), decode(kernels, rows, codec, dim, plain=plain)
        is_nan = (expected & 0x7FFF) > 0x7F80
        np.testing.assert_array_equal((got & 0x7FFF) > 0x7F80, is_nan)
        np.testing.assert_array_equal(got[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("codec", ["int8_bf16", "int8_fp16", "uint8b128_bf16"])
def test_every_byte_times_scales_of_every_size_and_sign_rounds_as_the_reference_rounds(codec: str) -> None:
    """Ties are common where a scale has few bits, and -0 comes of a negative one; scales of all exponents are here."""
    scales = np.arange(0, 1 << 16, 7, dtype="<u2").view(np.uint8).reshape(-1, 2)
    rows = np.concatenate([np.tile(np.arange(256, dtype=np.uint8), (len(scales), 1)), scales], axis=1)
    expected, got = decode(reference, rows, codec, 256), decode(kernels, rows, codec, 256)
    is_nan = (expected & 0x7FFF) > 0x7F80
    np.testing.assert_array_equal((got & 0x7FFF) > 0x7F80, is_nan)
    np.testing.assert_array_equal(got[~is_nan], expected[~is_nan])


def test_a_nan_of_any_bits_stays_one() -> None:
    """Rounding carries: 0x7fffffff plus a half would be minus zero."""
    scales = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], dtype="<u4").view(np.uint8).reshape(3, 4)
    rows = np.concatenate([np.full((3, 8), 3, dtype=np.uint8), scales], axis=1)
    for plain in (False, True):
        assert ((decode(kernels, rows, "int8_fp32", 8, plain=plain) & 0x7FFF) > 0x7F80).all()


def test_values_and_scales_lie_where_the_format_says() -> None:
    """By hand: low half first, of nf4 the high one; GGUF has all low halves of a block before the high ones."""
    one = {"e8m0": b"\x7f", "e4m3": b"\x38", "fp32": b"\0\0\x80\x3f", "bf16": b"\x80\x3f", "fp16": b"\0\x3c"}
    two = {"e8m0": b"\x80", "e4m3": b"\x40", "fp32": b"\0\0\0\x40", "bf16": b"\0\x40", "fp16": b"\0\x40"}
    cases = {
        "fp4_e2m1_e8m0x32": (b"\x21" + bytes(15) + b"\xf1" + bytes(15), [0.5, 1.0], [1.0, -12.0], 32),
        "fp4_e2m1_e4m3x16": (b"\x21" + bytes(7) + b"\xf1" + bytes(7), [0.5, 1.0], [1.0, -12.0], 16),
        "nf4_fp32x4": (b"\xf0\x77\x07\x77", [1.0, -1.0], [-2.0, 0.0], 4),
        "uint4b8_fp16x4": (b"\x08\x88\x9f\x88", [0.0, -8.0], [14.0, 2.0], 4),
        "int8_bf16x2": (b"\xff\x02\x80\x05", [-1.0, 2.0], [-256.0, 10.0], 2),
        "uint8b128_fp32x2": (b"\xff\x02\x80\x05", [127.0, -126.0], [0.0, -246.0], 2),
    }
    for codec, (values, first, second, block) in cases.items():
        scale = parse_codec(codec).scale
        row = np.frombuffer(values + one[scale] + two[scale], dtype=np.uint8)[None]
        out = (decode(kernels, row, codec, 2 * block)[0].astype(np.uint32) << 16).view(np.float32)
        assert out[:2].tolist() == first, codec
        assert out[block : block + 2].tolist() == second, codec
    halves = np.frombuffer(b"\0\x40" + b"\x9f" + b"\x88" * 15, dtype=np.uint8)[None]
    out = (decode(kernels, halves, "gguf_q4_0", 32)[0].astype(np.uint32) << 16).view(np.float32)
    assert (out[0], out[1], out[16]) == (14.0, 0.0, 2.0)


@pytest.mark.parametrize("module", [reference, kernels], ids=["reference", "compiled"])
@pytest.mark.parametrize(
    ("shape", "dim", "values", "scale", "block", "out_shape"),
    [
        ((2, 143), 256, "fp4_e2m1", "e4m3", 16, (2, 256)),  # a row that is too short
        ((2, 144), 256, "fp4_e2m1", "e4m3", 16, (3, 256)),
        ((2, 144), 256, "fp4_e2m1", "e4m3", 16, (2, 255)),
        ((288,), 256, "fp4_e2m1", "e4m3", 16, (2, 256)),
        ((2, 999), 250, "fp4_e2m1", "e4m3", 16, (2, 250)),  # no whole block
        ((2, 999), 6, "uint4b8", "fp32", 3, (2, 6)),  # half a byte
        ((2, 999), 256, "fp4_e2m1", "", 16, (2, 256)),
        ((2, 999), 256, "gguf_q8_0", "fp32", 32, (2, 256)),
        ((2, 999), 256, "gguf_q8_0", "", 16, (2, 256)),
        ((2, 999), 256, "gguf_q9_0", "", 32, (2, 256)),
        ((2, 999), 256, "int8", "fp64", 32, (2, 256)),
        ((2, 999), 0, "int8", "fp32", 32, (2, 0)),
        ((2, 999), 256, "int8", "fp32", 0, (2, 256)),
    ],
)
def test_what_is_no_row_is_refused_before_anything_is_written(
    module: Any, shape: tuple[int, ...], dim: int, values: str, scale: str, block: int, out_shape: tuple[int, ...]
) -> None:
    rows, out = np.zeros(shape, dtype=np.uint8), np.full(out_shape, 0x1234, dtype=np.uint16)
    with pytest.raises(ValueError):
        module.decode_block_rows(rows, dim, values, scale, block, 1.0, False, out)
    assert (out == 0x1234).all()


@pytest.mark.parametrize("codec", ["int8_fp32", "gguf_q4_k"])
def test_no_rows_are_no_work(codec: str) -> None:
    assert decode(kernels, random_rows(codec, 256, 0), codec, 256).shape == (0, 256)


def test_threads_that_share_the_rows_write_the_same_values() -> None:
    for codec, num_rows in (("fp4_e2m1_e4m3x16*0x1.8p-7", 1500), ("gguf_q4_k", 1300), ("int8_fp32", 5)):
        rows = random_rows(codec, 256, num_rows, more=1)
        alone = decode(kernels, rows, codec, 256)
        for threads in (2, 3, 64):
            np.testing.assert_array_equal(decode(kernels, rows, codec, 256, threads=threads), alone)
