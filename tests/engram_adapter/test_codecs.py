"""Codecs against an oracle in exact fractions: every fp8 value with every scale byte, and the plain float types."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.device import DEVICE

from engram_adapter import codecs
from engram_adapter.codecs import codec_dtype, decode_rows, e8m0_to_float32
from tierstore.errors import ConfigError, FormatError
from tierstore.spec import codec_row_bytes

SCALED = "fp8_e4m3_e8m0x32"
BF16_MAX = Fraction(255, 128) * Fraction(2) ** 127


def fp8_value(byte: int) -> Fraction | None:
    """The value of an fp8 e4m3 byte; None for NaN. Exponent 0 is subnormal; only mantissa 7 of exponent 15 is NaN."""
    sign, exponent, mantissa = -1 if byte & 0x80 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 8) * Fraction(1, 64)
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


def bf16_bits(value: Fraction, negative: bool) -> int:
    """Rounds an exact value to bfloat16, half to even, and returns its 16 bits."""
    magnitude, sign = abs(value), 0x8000 if negative else 0
    if magnitude == 0:
        return sign
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    exponent = min(max(exponent, -126), 128)
    units = magnitude / Fraction(2) ** (exponent - 7)  # 7 mantissa bits; below 2^-126 the unit stays 2^-133
    rounded = round(units)  # Fraction rounds half to even
    # The exponent field counts from the subnormals on, so a carry out of the mantissa moves into it by itself.
    bits = rounded + (exponent + 126 << 7)
    return sign | min(bits, 0x7F80)


def bits_of(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.uint16).numpy()


def assert_bf16_equals(values: torch.Tensor, expected: list[int | None]) -> None:
    """Compares bit for bit; None stands for NaN, of which any payload will do."""
    got = bits_of(values).reshape(-1)
    assert len(got) == len(expected)
    nan = np.array([bits is None for bits in expected])
    assert np.array_equal(torch.isnan(values).reshape(-1).numpy(), nan)
    assert np.array_equal(got[~nan], np.array([bits for bits in expected if bits is not None], dtype=np.uint16))


@pytest.mark.long
def test_every_fp8_value_with_every_scale_byte_equals_the_exact_product_rounded_once() -> None:
    dim = 256
    rows = np.empty((256, dim + dim // 32), dtype=np.uint8)
    rows[:, :dim] = np.arange(256)
    rows[:, dim:] = np.arange(256)[:, None]
    expected: list[int | None] = []
    for scale in range(256):
        for byte in range(256):
            value = fp8_value(byte)
            if value is None or scale == 255:
                expected.append(None)
            else:
                expected.append(bf16_bits(value * Fraction(2) ** (scale - 127), byte >= 0x80))
    assert_bf16_equals(decode_rows(torch.from_numpy(rows), SCALED, dim), expected)


@pytest.mark.long
def test_scale_bytes_3_to_246_lose_nothing() -> None:
    dim = 256
    rows = np.empty((244, dim + dim // 32), dtype=np.uint8)
    rows[:, :dim] = np.arange(256)
    rows[:, dim:] = np.arange(3, 247)[:, None]
    values = decode_rows(torch.from_numpy(rows), SCALED, dim).double().numpy()
    for index, scale in enumerate(range(3, 247)):
        for byte in range(256):
            exact = fp8_value(byte)
            if exact is not None:
                assert Fraction(float(values[index, byte])) == exact * Fraction(2) ** (scale - 127)


def test_each_scale_byte_covers_its_own_32_columns() -> None:
    dim = 96
    rows = np.zeros((2, dim + 3), dtype=np.uint8)
    rows[:, :dim] = 0x38  # 1.0
    rows[0, dim:], rows[1, dim:] = (127, 128, 130), (126, 127, 120)
    values = decode_rows(torch.from_numpy(rows), SCALED, dim).float().numpy()
    assert np.array_equal(values[0], np.repeat([1.0, 2.0, 8.0], 32))
    assert np.array_equal(values[1], np.repeat([0.5, 1.0, 2.0**-7], 32))


@pytest.mark.parametrize("scale", [1.0, 0.01171875, -3.0, 1 / 3, 1e-38, 3e38, 7.3e-41])
def test_global_scale_is_the_float32_product_rounded_once(scale: float) -> None:
    scale = struct.unpack("<f", struct.pack("<f", scale))[0]
    rows = torch.arange(256, dtype=torch.uint8)
    expected: list[int | None] = []
    for byte in range(256):
        value = fp8_value(byte)
        if value is None:
            expected.append(None)
            continue
        with np.errstate(over="ignore"):
            product = float(np.float32(float(value)) * np.float32(scale))
        negative = (byte >= 0x80) != (scale < 0)
        expected.append(bf16_bits(2 * BF16_MAX if math.isinf(product) else Fraction(product), negative))
    assert_bf16_equals(decode_rows(rows, f"fp8_e4m3*{scale.hex()}", 256), expected)


def test_fp8_without_scale_is_exact() -> None:
    values = decode_rows(torch.arange(256, dtype=torch.uint8), "fp8_e4m3", 256)
    expected = [None if (value := fp8_value(byte)) is None else bf16_bits(value, byte >= 0x80) for byte in range(256)]
    assert_bf16_equals(values, expected)


def test_e8m0_bytes_are_powers_of_two() -> None:
    values = e8m0_to_float32(torch.arange(256, dtype=torch.uint8)).double().numpy()
    assert np.isnan(values[255])
    assert [Fraction(float(value)) for value in values[:255]] == [Fraction(2) ** (byte - 127) for byte in range(255)]


@pytest.mark.parametrize(("codec", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_plain_codecs_give_the_stored_bytes_without_a_copy(codec: str, dtype: str) -> None:
    width = 4 if codec == "fp32" else 2
    rows = torch.arange(2 * 3 * 8 * width, dtype=torch.uint8).reshape(2, 3, 8 * width)
    values = decode_rows(rows, codec, 8)
    assert values.dtype == getattr(torch, dtype)
    assert values.shape == (2, 3, 8)
    assert values.data_ptr() == rows.data_ptr()
    assert values.view(torch.uint8).numpy().tobytes() == rows.numpy().tobytes()


@pytest.mark.parametrize(
    "codec",
    [
        "bf16",
        "fp16",
        "fp32",
        "fp8_e4m3",
        "fp8_e4m3*0x1p-3",
        SCALED,
        "fp4_e2m1_e4m3x16*0x1p-3",
        "int8_fp32",
        "gguf_q4_0",
    ],
)
@pytest.mark.parametrize("layout", ["odd offset", "strided rows", "strided bytes", "odd address"])
def test_layout_of_the_rows_does_not_matter(codec: str, layout: str) -> None:
    dim = 32
    row_bytes = codec_row_bytes(codec, dim)
    assert row_bytes is not None
    plain = torch.from_numpy(np.random.default_rng(5).integers(0, 0x70, (6, row_bytes), dtype=np.uint8))
    if layout == "odd offset":
        rows = torch.cat([torch.zeros(1, dtype=torch.uint8), plain.flatten()])[1:].view(6, row_bytes)
    elif layout == "strided rows":
        rows = torch.cat([plain, torch.full((6, 3), 9, dtype=torch.uint8)], dim=1)[:, :row_bytes]
    elif layout == "strided bytes":
        rows = plain.T.contiguous().T
    else:
        rows = torch.from_numpy(np.concatenate([[np.uint8(0)], plain.numpy().reshape(-1)])[1:].reshape(6, row_bytes))
    assert torch.equal(rows, plain)
    assert torch.equal(decode_rows(rows, codec, dim), decode_rows(plain, codec, dim))


@pytest.mark.parametrize("shape", [(0,), (0, 24), (2, 0, 24), (1, 1)])
@pytest.mark.parametrize("codec", ["bf16", SCALED, "fp8_e4m3*0x1p-3", "int8_fp32"])
def test_no_rows_decode_to_no_values(codec: str, shape: tuple[int, ...]) -> None:
    row_bytes = codec_row_bytes(codec, 64)
    for rows in (
        torch.zeros((*shape, row_bytes), dtype=torch.uint8),
        torch.from_numpy(np.zeros((*shape, row_bytes), np.uint8)),
    ):
        assert decode_rows(rows, codec, 64).shape == (*shape, 64)
        assert decode_rows(rows, codec, 64).dtype == torch.bfloat16


def test_decoding_leaves_the_rows_as_they_were() -> None:
    rows = torch.from_numpy(np.random.default_rng(6).integers(0, 256, (4, 264), dtype=np.uint8))
    before = rows.clone()
    decode_rows(rows, SCALED, 256)
    assert torch.equal(rows, before)


def test_codec_dtype_names_what_decode_returns() -> None:
    for codec, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert codec_dtype(codec) == dtype
    for codec in (SCALED, "fp8_e4m3", "fp8_e4m3*0x1.8p-7", "fp4_e2m1_e4m3x16/0x1p0", "gguf_q4_k", "nf4_fp32x64"):
        assert codec_dtype(codec) == torch.bfloat16


def test_raw_rows_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"Table\.rows"):
        codec_dtype("raw")
    with pytest.raises(ConfigError, match="raw"):
        decode_rows(torch.zeros(8, dtype=torch.uint8), "raw", 8)


@pytest.mark.parametrize("codec", ["fp7", "fp8_e4m3*nonsense", "bf16*0x1p0"])
def test_unknown_codecs_are_refused(codec: str) -> None:
    with pytest.raises(FormatError, match="codec"):
        decode_rows(torch.zeros(64, dtype=torch.uint8), codec, 32)


def test_bytes_that_are_no_whole_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="264 bytes"):
        decode_rows(torch.zeros((3, 263), dtype=torch.uint8), SCALED, 256)
    with pytest.raises(ValueError, match="264 bytes"):
        decode_rows(torch.zeros((), dtype=torch.uint8), SCALED, 256)
    with pytest.raises(TypeError, match="uint8"):
        decode_rows(torch.zeros((3, 264), dtype=torch.int8), SCALED, 256)


@pytest.mark.parametrize("codec", [SCALED, "fp8_e4m3", "fp8_e4m3*0x1.8p-7"])
def test_the_kernel_and_torchs_own_conversion_give_the_same_values(codec: str) -> None:
    row_bytes = codec_row_bytes(codec, 256)
    assert row_bytes is not None
    rows = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 300, 2 * row_bytes), dtype=np.uint8))
    for given in (rows[..., :row_bytes], rows[:, ::3, row_bytes:], rows[:0, :, :row_bytes]):
        by_kernel = decode_rows(given, codec, 256)
        by_torch = codecs._decoded_by_torch(given, codec, 256).to(torch.bfloat16)  # as a GPU decodes
        nan = torch.isnan(by_torch)
        assert torch.equal(torch.isnan(by_kernel), nan)
        assert np.array_equal(bits_of(by_kernel.masked_fill(nan, 0)), bits_of(by_torch.masked_fill(nan, 0)))


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["fp4_e2m1_e4m3x16*0x1.8p-7", "gguf_q8_0"])
def test_rows_on_a_gpu_decode_there_to_the_same_values(codec: str) -> None:
    rows = torch.from_numpy(
        np.random.default_rng(4).integers(0, 256, (2, 9, codec_row_bytes(codec, 64)), dtype=np.uint8)
    )
    by_kernel = decode_rows(rows, codec, 64)
    by_triton = codecs._decoded_by_triton(rows.to(DEVICE), codec, 64).cpu()
    nan = torch.isnan(by_kernel)
    assert torch.equal(torch.isnan(by_triton), nan)
    assert np.array_equal(bits_of(by_triton.masked_fill(nan, 0)), bits_of(by_kernel.masked_fill(nan, 0)))
    assert codecs._decoded_by_triton(rows[:0].to(DEVICE), codec, 64).shape == (0, 9, 64)
