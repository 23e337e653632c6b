"""fp8 rows into bfloat16: the compiled kernel and the reference against exact arithmetic."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support.threads import threads_of_this_process

from tierstore import kernels
from tierstore.kernels import reference_codec

IMPLEMENTATIONS: dict[str, Any] = {"reference": reference_codec, "compiled": kernels}
NAN = None


def bf16_of(value: float) -> int | None:
    """The bits of a float64 rounded to bfloat16, half to even; all products of this test are exact in float64."""
    if math.isnan(value):
        return NAN
    sign = 0x8000 if math.copysign(1, value) < 0 else 0
    if value == 0:
        return sign
    exponent = max(math.frexp(abs(value))[1] - 1, -126)
    units = round(math.ldexp(abs(value), 7 - exponent))
    return sign | min(units + (exponent + 126 << 7), 0x7F80)


def fp8_of(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = mantissa / 512 if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return math.copysign(math.nan if byte & 0x7F == 0x7F else magnitude, -1 if byte & 0x80 else 1)


def check(got: np.ndarray, expected: list[int | None]) -> None:
    for bits, wanted in zip(got.reshape(-1).tolist(), expected, strict=True):
        assert (bits & 0x7FFF) > 0x7F80 if wanted is NAN else bits == wanted


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_value_with_every_scale_byte_is_the_product_rounded_once(name: str) -> None:
    scales = np.arange(256, dtype=np.uint8)
    rows = np.empty((256, 256 + 8 + 3), dtype=np.uint8)  # three bytes more than a row needs: they are skipped
    rows[:, :256], rows[:, 256:], rows[:, -3:] = np.arange(256), scales[:, None], 77
    out = np.full((256, 256), 0x1234, dtype=np.uint16)
    IMPLEMENTATIONS[name].decode_fp8_rows(rows, 256, None, out)
    factors = [math.nan if scale == 255 else math.ldexp(1, scale - 127) for scale in range(256)]
    check(out, [bf16_of(fp8_of(byte) * factor) for factor in factors for byte in range(256)])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dim", [1, 31, 32, 33, 160])
def test_one_scale_serves_all_values_of_any_dim(name: str, dim: int) -> None:
    rows = np.random.default_rng(dim).integers(0, 256, (5, dim), dtype=np.uint8)
    out = np.full((5, dim), 0x1234, dtype=np.uint16)
    scale = 0.0117645263671875  # 12 bits: products with fp8's 4 are exact in float32
    IMPLEMENTATIONS[name].decode_fp8_rows(rows, dim, scale, out)
    check(out, [bf16_of(fp8_of(byte) * scale) for byte in rows.reshape(-1).tolist()])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("rows_shape", "dim", "scale", "out_shape"),
    [
        ((2, 33), 33, None, (2, 33)),  # no whole block
        ((2, 64), 64, None, (2, 64)),  # no room for scales
        ((2, 63), 64, 1.0, (2, 64)),  # a row that is too short
        ((2, 66), 64, None, (2, 63)),
        ((2, 66), 64, None, (3, 64)),
        ((132,), 64, None, (2, 64)),
        ((2, 66), 0, None, (2, 0)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    name: str, rows_shape: tuple[int, ...], dim: int, scale: float | None, out_shape: tuple[int, ...]
) -> None:
    rows, out = np.zeros(rows_shape, dtype=np.uint8), np.full(out_shape, 0x1234, dtype=np.uint16)
    with pytest.raises(ValueError):
        IMPLEMENTATIONS[name].decode_fp8_rows(rows, dim, scale, out)
    assert (out == 0x1234).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_rows_are_no_work(name: str) -> None:
    out = np.empty((0, 64), dtype=np.uint16)
    IMPLEMENTATIONS[name].decode_fp8_rows(np.empty((0, 66), dtype=np.uint8), 64, None, out)


MANY = np.random.default_rng(7).integers(0, 256, (5_003, 264), dtype=np.uint8)


def decoded(threads: int) -> np.ndarray:
    out = np.full((len(MANY), 256), 0x1234, dtype=np.uint16)
    kernels.decode_fp8_rows(MANY, 256, None, out, threads)
    return out


@pytest.mark.parametrize("threads", [2, 3, 1_000])
def test_threads_that_share_rows_decode_what_one_does(threads: int) -> None:
    alone = decoded(1)
    for _ in range(20):
        assert np.array_equal(decoded(threads), alone)


def test_callers_at_once_all_get_their_rows() -> None:
    alone = decoded(1)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(each, alone) for each in pool.map(decoded, [2] * 40))


def test_a_forked_child_decodes_with_threads_of_its_own() -> None:
    alone = decoded(1)
    stop = threading.Event()

    def go_on() -> None:  # the fork comes while the parent's threads are at work
        while not stop.is_set():
            decoded(2)

    busy = threading.Thread(target=go_on)
    busy.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                before = threads_of_this_process()  # one, and those that other libraries start in a child
                os._exit(0 if np.array_equal(decoded(2), alone) and threads_of_this_process() > before else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        busy.join()
