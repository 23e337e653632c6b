"""Rows come by their number, from either memory; -1 gives zeros, other ids that name none no values,
and are never read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.gpu_inputs import CODECS, LOST, aligned, decoded, native_block_of, patterns
from support.host_memory import address_of, host_bytes

from tierstore.kernels import reference_gpu
from tierstore.kernels.gpu import launching, rows
from tierstore.kernels.gpu.codecs import BYTES, RowCodec

NUM_ROWS = 19
NO_ROWS = (-1, NUM_ROWS, 2**62, 2**63 - 1, -2, -(2**63))


class Table:
    """Random rows on the device or in host memory, from an address that is a multiple of `alignment` only."""

    def __init__(self, codec: RowCodec, device: torch.device, *, on_host: bool, tilt: int = 0) -> None:
        random = np.random.default_rng(1)
        self.codec = codec
        self.array = random.integers(0, 256, size=(NUM_ROWS, codec.row_bytes), dtype=np.uint8)
        if on_host:
            self.memory = host_bytes(self.array.size + tilt)[tilt:]
            self.memory[:] = self.array.reshape(-1)
            self.rows: torch.Tensor | int = address_of(self.memory)
        else:
            self.rows = aligned(self.array, device)


def poison(num_ids: int, codec: RowCodec, device: torch.device) -> torch.Tensor:
    if codec.kind == BYTES:
        return torch.full((num_ids, codec.row_bytes), 0x5A, dtype=torch.uint8, device=device)
    return torch.full((num_ids, codec.dim), 0x5A5A, dtype=torch.int16, device=device).view(torch.bfloat16)


def check(table: Table, row_ids: np.ndarray, device: torch.device, places: np.ndarray | None = None) -> None:
    codec = table.codec
    out = poison(len(row_ids), codec, device)
    left_alone = None if places is None else torch.from_numpy(places).to(device)
    rows.gather_rows(torch.from_numpy(row_ids).to(device), table.rows, NUM_ROWS, codec, out, left_alone, num_places=40)
    expected = patterns(poison(len(row_ids), codec, torch.device("cpu"))).copy()
    reference = expected.copy().view(np.uint8 if codec.kind == BYTES else np.uint16)
    one = dataclasses.replace(codec, rows_per_entry=1)
    for number, row_id in enumerate(row_ids.tolist()):
        if places is not None and 0 <= places.reshape(-1)[number // codec.rows_per_entry] < 40:
            continue
        expected[number] = 0 if row_id == -1 else LOST[str(expected.dtype)]
        if 0 <= row_id < NUM_ROWS:
            expected[number] = decoded(table.array[row_id : row_id + 1], one).reshape(-1)
    np.testing.assert_array_equal(patterns(out), expected)
    reference_gpu.gather_rows(row_ids, table.array, codec, reference, places, 40)
    if codec.kind != BYTES:
        reference[reference == 0xFFFF] = 0x7FC0  # as `patterns` has every NaN
    np.testing.assert_array_equal(expected, reference.view(expected.dtype))


def ids_of(seed: int, count: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    ids = random.integers(0, NUM_ROWS, size=count)
    strange = random.random(count) < 0.3
    ids[strange] = random.choice(np.array(NO_ROWS), size=int(strange.sum()))
    return ids


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_rows_come_by_their_number(device: torch.device, name: str, on_host: bool) -> None:
    check(Table(CODECS[name], device, on_host=on_host), ids_of(2, 67), device)


@pytest.mark.parametrize("num_ids", [0, 1, 1023, 1024, 1025])
def test_any_number_of_ids_is_answered(device: torch.device, num_ids: int) -> None:
    check(Table(CODECS["scaled-33x3"], device, on_host=False), ids_of(3, num_ids), device)


@pytest.mark.parametrize("name", ["bytes-264x8", "bytes-33x3", "scaled-264x8", "fp8-24x4"])
def test_pairs_that_have_a_place_are_left_alone(device: torch.device, name: str) -> None:
    random = np.random.default_rng(4)
    places = random.choice(np.array([-1, 0, 7, 39, 40, 2**31 - 1], dtype=np.int32), size=(9, 3))
    row_ids = ids_of(5, 27 * CODECS[name].rows_per_entry)
    check(Table(CODECS[name], device, on_host=True), row_ids, device, places)


@pytest.mark.parametrize("num_ids", [7 * 8, 8 * 8, 9 * 8])
@pytest.mark.parametrize("name", ["bytes-264x8", "scaled-264x8"])
def test_the_sizes_that_a_gpu_runs_give_the_same(
    device: torch.device, name: str, num_ids: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "block_of", native_block_of)
    places = np.random.default_rng(6).choice(np.array([-1, 3], dtype=np.int32), size=(num_ids // 8, 1))
    check(Table(CODECS[name], device, on_host=True), ids_of(7, num_ids), device, places)
    check(Table(CODECS[name], device, on_host=False), ids_of(8, num_ids - 1), device)


@pytest.mark.parametrize("tilt", [1, 2, 4, 8])
def test_rows_may_lie_anywhere(device: torch.device, tilt: int) -> None:
    for name in ("bytes-264x8", "scaled-264x8"):
        check(Table(CODECS[name], device, on_host=True, tilt=tilt), ids_of(9, 20), device)


def test_a_table_without_rows_gives_zeros_for_the_sentinel_alone(device: torch.device) -> None:
    codec = CODECS["scaled-33x3"]
    out = poison(4, codec, device)
    rows.gather_rows(torch.arange(-1, 3, device=device), 0, 0, codec, out)
    found = patterns(out)
    assert not found[0].any()
    assert (found[1:] == LOST[str(found.dtype)]).all()


def test_tensors_that_do_not_fit_are_refused(device: torch.device) -> None:
    codec = CODECS["scaled-33x3"]
    table, out = Table(codec, device, on_host=False), poison(6, codec, device)
    ids, places = torch.zeros(6, dtype=torch.int64, device=device), torch.zeros(2, 1, dtype=torch.int32, device=device)
    rows.gather_rows(ids, table.rows, NUM_ROWS, codec, out, places)
    for bad_ids, bad_rows, bad_out, bad_places in (
        (ids.int(), table.rows, out, None),
        (ids, table.rows[:, :32], out, None),
        (ids, table.rows[:5], out, None),
        (ids, table.rows, out[:5], None),
        (ids, table.rows, out.view(torch.int16), None),
        (ids, table.rows, out, places.long()),
        (ids, table.rows, out, places[:1]),
        (ids, 0, out, None),
    ):
        with pytest.raises(ValueError, match=r"expected|rows each|must be such memory"):
            rows.gather_rows(bad_ids, bad_rows, NUM_ROWS, codec, bad_out, bad_places)
