"""Rows of float32 into a codec's bytes and back, and initial values: compiled, with AVX2 and without, and in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tierstore import kernels
from tierstore.kernels import reference_philox, reference_quantize
from tierstore.kernels.reference_codec import e8m0_values

E8M0 = "fp8_e4m3_e8m0x32"
CODECS = {"fp32": 1.0, "fp16": 1.0, "bf16": 1.0, "fp8_e4m3": 0.01171875, E8M0: 1.0}
WAYS = {"fastest": False, "plain": True}
Counts = tuple[int, int]


def row_bytes(codec: str, dim: int) -> int:
    return {"fp32": 4 * dim, "fp16": 2 * dim, "bf16": 2 * dim, "fp8_e4m3": dim, E8M0: dim + dim // 32}[codec]


def quantized(
    values: np.ndarray, codec: str, way: str, old: np.ndarray | None = None, factor: float | None = None
) -> tuple[np.ndarray, Counts]:
    """Rows of the compiled kernel and its counts; the reference gives the same."""
    used = CODECS[codec] if factor is None else factor
    out = np.full((len(values), row_bytes(codec, values.shape[1])), 0x77, np.uint8)
    counts = kernels.quantize_rows(values, codec, used, old, out, plain=WAYS[way])
    expected = np.full_like(out, 0x33)
    assert reference_quantize.quantize_rows(values, codec, used, old, expected) == counts
    assert np.array_equal(out, expected)
    return out, counts


def dequantized(rows: np.ndarray, dim: int, codec: str, way: str, factor: float | None = None) -> np.ndarray:
    used = CODECS[codec] if factor is None else factor
    out, expected = np.full((2, len(rows), dim), 77, np.float32)
    kernels.dequantize_rows(rows, dim, codec, used, out, plain=WAYS[way])
    reference_quantize.dequantize_rows(rows, dim, codec, used, expected)
    assert np.array_equal(out.view(np.int32), expected.view(np.int32))
    return out


def near_all_codes(codec: str, scale: float) -> np.ndarray:
    """Each code's value, the middle between neighbours, and the floats beside both: float32 [1, n]."""
    table = reference_quantize.values_of(codec)
    finite = np.unique(table[np.isfinite(table)].astype(np.float64))
    middles = (finite[1:] + finite[:-1]) / 2
    edge = finite[-1] + (finite[-1] - finite[-2]) / 2
    values = (np.concatenate([finite, middles, [edge, -edge]]) * scale).astype(np.float32)
    beside = [np.nextafter(values, np.float32(-np.inf)), values, np.nextafter(values, np.float32(np.inf))]
    found = np.concatenate([*beside, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-45], np.float32)])
    return np.resize(found, -(-len(found) // 32) * 32)[None]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", CODECS)
def test_values_at_and_beside_every_code_and_every_middle_are_rounded_half_to_even(codec: str, way: str) -> None:
    values = near_all_codes("bf16" if codec == "fp32" else codec, CODECS[codec])
    out, counts = quantized(values, codec, way)
    if codec in ("fp16", "bf16"):  # beside an oracle that shares no code with either
        dtype = torch.float16 if codec == "fp16" else torch.bfloat16
        theirs = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)[0]
        ours = out.view(np.uint16)[0]
        different = (ours != theirs) & ~np.isnan(values[0])
        assert np.isin(theirs[different] & 0x7FFF, [0x7C00, 0x7F80]).all()  # torch makes infinities of those
        assert counts == (different.sum(), np.isnan(values).sum())
    elif codec == "fp8_e4m3":
        scaled = (torch.from_numpy(values) / CODECS[codec]).clamp(-448, 448)
        theirs = scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        assert np.array_equal(out[~np.isnan(values)], theirs[~np.isnan(values)])
        assert counts[0] > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", CODECS)
def test_rows_that_did_not_change_keep_every_byte(codec: str, way: str) -> None:
    old = np.random.default_rng(1).integers(0, 256, (50, row_bytes(codec, 64)), dtype=np.uint8)
    if codec == E8M0:
        old[:30, 64:] = 120  # else most scales are far off
    values = dequantized(old, 64, codec, way)
    out, counts = quantized(values, codec, way, old)
    assert np.array_equal(out, old)
    assert counts == (0, 0)


@pytest.mark.parametrize("way", WAYS)
def test_all_fp8_bytes_under_all_scale_bytes_come_back(way: str) -> None:
    rows = np.empty((256, 256 + 8), np.uint8)
    rows[:, :256], rows[:, 256:] = np.arange(256), np.arange(256)[:, None]
    values = dequantized(rows, 256, E8M0, way)
    for scale in range(255):
        expected = [math.ldexp(float(reference_quantize.values_of(E8M0)[byte]), scale - 127) for byte in range(256)]
        with np.errstate(over="ignore"):
            assert np.array_equal(values[scale], np.array(expected).astype(np.float32), equal_nan=True)
    assert np.isnan(values[255]).all()
    assert np.array_equal(quantized(values, E8M0, way, rows)[0], rows)


@pytest.mark.parametrize("way", WAYS)
def test_all_fp8_bytes_come_back_under_any_factor(way: str) -> None:
    rows = np.arange(256, dtype=np.uint8)[None]
    for factor in (1.0, 0.01171875, -3.7, 1e-30, 2.0**-149, 3e38):
        values = dequantized(rows, 256, "fp8_e4m3", way, factor)
        assert np.array_equal(quantized(values, "fp8_e4m3", way, rows, factor)[0], rows)
        if 1e-20 < abs(factor) < 1e20:
            alone = quantized(values, "fp8_e4m3", way, None, factor)[0]
            back = dequantized(alone, 256, "fp8_e4m3", way, factor)
            assert np.array_equal(back, values, equal_nan=True)


def block(*values: float) -> np.ndarray:
    row = np.zeros((1, 32), np.float32)
    row[0, : len(values)] = values
    return row


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("largest", "old", "expected"),
    [
        (448.0, 127, 127),  # just fits
        (np.nextafter(np.float32(448), np.float32(1e9)), 127, 128),
        (np.nextafter(np.float32(112), np.float32(1e9)), 127, 127),  # just above a quarter
        (112.0, 127, 125),  # the least that fits
        (1e-3, 127, 109),
        (1e30, 127, 218),
        (448.0, 255, 127),  # the scale was not a number
        (3e38, 1, 247),
        (1e-45, 127, 0),
        (448.0, None, 127),
        (449.0, None, 128),
        (0.0, None, 0),
    ],
)
def test_a_scale_stays_while_it_fits_and_is_else_the_least(
    largest: float, old: int | None, expected: int, way: str
) -> None:
    values = block(largest, -largest / 2, largest / 448)
    before = None
    if old is not None:
        before = np.zeros((1, 33), np.uint8)
        before[0, 0], before[0, 32] = 0x11, old
    out, counts = quantized(values, E8M0, way, before)
    assert out[0, 32] == expected
    assert counts == (0, 0)
    found = dequantized(out, 32, E8M0, way)[0]
    scale = float(e8m0_values(out[:, 32])[0])
    assert (np.abs(found - values[0]) <= np.maximum(np.abs(values[0]) / 16, scale / 1024)).all()


@pytest.mark.parametrize("way", WAYS)
def test_one_changed_value_changes_one_byte_while_the_scale_fits(way: str) -> None:
    old = np.random.default_rng(2).integers(0, 0x60, (1, 66), dtype=np.uint8)
    old[0, [5, 40]], old[0, 64:] = 0x7E, 120  # each block holds the largest value
    values = dequantized(old, 64, E8M0, way)
    values[0, 7] += 0.001953125
    out, _ = quantized(values, E8M0, way, old)
    assert np.flatnonzero(out[0] != old[0]).tolist() == [7]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [32, 96, 256])
def test_random_rows_over_random_old_rows_equal_the_reference(codec: str, dim: int, way: str) -> None:
    generator = np.random.default_rng(dim)
    old = generator.integers(0, 256, (40, row_bytes(codec, dim)), dtype=np.uint8)
    values = (generator.normal(size=(40, dim)) * 10.0 ** generator.integers(-12, 6, (40, 1))).astype(np.float32)
    before = dequantized(old, dim, codec, way)
    kept = generator.random((40, dim)) < 0.5
    out, counts = quantized(np.where(kept, before, values), codec, way, old)
    threaded = np.empty_like(out)
    shared = kernels.quantize_rows(np.where(kept, before, values), codec, CODECS[codec], old, threaded, threads=3)
    assert shared == counts
    assert np.array_equal(threaded, out)


def test_arguments_that_do_not_fit_are_refused() -> None:
    values, out = np.zeros((2, 48), np.float32), np.zeros((2, 48), np.uint8)
    with pytest.raises(ValueError, match="codec must be"):
        kernels.quantize_rows(values, "nf4", 1.0, None, out)
    with pytest.raises(ValueError, match="factor of 0"):
        kernels.quantize_rows(values, "fp8_e4m3", 0.0, None, out)
    with pytest.raises(ValueError, match="multiple of 32"):
        kernels.quantize_rows(values, E8M0, 1.0, None, out)
    with pytest.raises(ValueError, match="out must be"):
        kernels.quantize_rows(values, "bf16", 1.0, None, out)
    with pytest.raises(ValueError, match="old must be"):
        kernels.quantize_rows(values, "fp8_e4m3", 1.0, out[:1], out)
    with pytest.raises(ValueError, match="a row must hold"):
        kernels.dequantize_rows(out, 64, "fp8_e4m3", 1.0, np.zeros((2, 64), np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# Initial values.


def test_philox_gives_the_published_words() -> None:
    # The known answers that Random123 comes with (kat_vectors, philox4x32 10).
    counters = np.array([[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], dtype=np.uint32)
    keys = np.array([[0] * 2, [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0]], dtype=np.uint32)
    expected = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    for counter, key, words in zip(counters, keys, expected, strict=True):
        assert kernels.philox4x32(counter[None], key)[0].tolist() == words
        assert reference_philox.philox4x32(counter, key).tolist() == words


ROWS = np.array([0, 1, 2**32 - 1, 2**32, 2**40 + 17, 5])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [1, 4, 31, 250])
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_initial_values_are_a_function_of_seed_table_row_and_column(kind: str, dim: int, way: str) -> None:
    drawn = np.empty((len(ROWS), dim), np.float32)
    kernels.initial_rows(ROWS, kind, 0.5, 0.25, 2**63 + 5, 3, drawn, plain=WAYS[way])
    expected = reference_philox.initial_rows(ROWS, kind, 0.5, 0.25, 2**63 + 5, 3, dim)
    assert np.abs(drawn.view(np.int32) - expected.view(np.int32)).max() <= (1 if kind == "normal" else 0)
    backwards = np.empty((len(ROWS), dim), np.float32)
    kernels.initial_rows(ROWS[::-1].copy(), kind, 0.5, 0.25, 2**63 + 5, 3, backwards, threads=3)
    assert np.array_equal(backwards[::-1], drawn)  # the order does not count, nor the processor
    wider = np.empty((len(ROWS), dim + 9), np.float32)
    kernels.initial_rows(ROWS, kind, 0.5, 0.25, 2**63 + 5, 3, wider)
    assert np.array_equal(wider[:, :dim], drawn)
    other = np.empty_like(drawn)
    for seed, table in ((2**63 + 6, 3), (2**63 + 5, 4)):
        kernels.initial_rows(ROWS, kind, 0.5, 0.25, seed, table, other)
        assert (other != drawn).all()


def test_initial_values_have_the_distribution_that_is_asked_for() -> None:
    drawn = np.empty((4_000, 64), np.float32)
    kernels.initial_rows(np.arange(4_000), "normal", 1.0, 2.0, 1, 1, drawn)
    standard = (drawn - 1) / 2
    moments = [float((standard.astype(np.float64) ** power).mean()) for power in (1, 2, 3, 4)]
    assert np.allclose(moments, [0, 1, 0, 3], atol=0.06)  # six deviations of the widest
    assert abs(np.corrcoef(drawn, rowvar=False)[np.triu_indices(64, 1)]).max() < 0.1
    kernels.initial_rows(np.arange(4_000), "uniform", -1.0, 3.0, 1, 1, drawn)
    assert -1 <= drawn.min() < -0.999
    assert 2.999 < drawn.max() <= 3
    assert np.allclose(np.histogram(drawn, 8)[0] / drawn.size, 1 / 8, atol=0.005)
