"""Entries come out as they went in, bit by bit, wherever they lie; as bfloat16, as the adapter decodes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gpu_inputs import (
    BLOCK_CODECS,
    CODECS,
    LOST,
    Sources,
    decoded,
    native_block_of,
    patterns,
    poison_of,
    poisoned_out,
)
from support.marks import slow_but

from tierstore.kernels import reference_gpu
from tierstore.kernels.gpu import codecs, gather, launching
from tierstore.kernels.gpu.codecs import BYTES, FP8, FP8_SCALED, RowCodec

SMALL = CODECS["scaled-33x3"]


def pairs_of(seed: int, num_tokens: int, num_places: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and places [num_tokens, 3]: hits with duplicates, misses, sentinels, no keys,
    and places that no source has."""
    random = np.random.default_rng(seed)
    keys = random.integers(0, 2**63, size=(num_tokens, 3))
    keys[random.random(keys.shape) < 0.1] = 0
    places = random.integers(0, max(num_places, 1), size=keys.shape) if num_places else np.full(keys.shape, -1)
    places[random.random(keys.shape) < 0.2] = -1
    far = random.random(keys.shape) < 0.1
    places[far] = random.choice([num_places, num_places + 1, 2**31 - 1], size=int(far.sum()))
    sentinels = random.random(keys.shape) < 0.15
    keys[sentinels] = -1
    none = random.random(keys.shape) < 0.1
    keys[none] = random.choice([-2, -(2**63)], size=int(none.sum()))
    places[sentinels & (random.random(keys.shape) < 0.9)] = -1
    return keys, places.astype(np.int32)


def gathered(
    keys: np.ndarray, places: np.ndarray, sources: Sources, codec: RowCodec, device: torch.device
) -> np.ndarray:
    out = poisoned_out(keys.size, codec, device)
    gather.gather_entries(
        torch.from_numpy(places).to(device), torch.from_numpy(keys).to(device), sources.sources, codec, out
    )
    return patterns(out)


def by_hand(keys: np.ndarray, places: np.ndarray, sources: Sources, codec: RowCodec) -> np.ndarray:
    expected = poison_of(keys.size, codec)
    for pair, (key, place) in enumerate(zip(keys.reshape(-1), places.reshape(-1), strict=True)):
        if key == -1:
            expected[pair] = 0
        elif key < -1:
            expected[pair] = LOST[str(expected.dtype)]
        elif 0 <= place < len(sources.entries):
            expected[pair] = decoded(sources.entries[place : place + 1], codec)[0]
    return expected


@pytest.mark.parametrize("name", [*CODECS, *slow_but(["int8-164x4", "nf4-36x3", "gguf_q4_k-x2"], BLOCK_CODECS)])
def test_entries_come_out_as_they_lie(device: torch.device, name: str) -> None:
    codec = (CODECS | BLOCK_CODECS)[name]
    sources = Sources(3, 9, 14, codec, device)
    keys, places = pairs_of(4, 37, 23)
    out = gathered(keys, places, sources, codec, device)
    np.testing.assert_array_equal(out, by_hand(keys, places, sources, codec))
    reference = poison_of(keys.size, codec).view(out.dtype if codec.kind == BYTES else np.uint16)
    reference_gpu.gather_entries(places, keys, sources.slots, sources.records, codec, reference)
    if codec.kind != BYTES:
        reference[reference == 0xFFFF] = 0x7FC0  # as `patterns` has every NaN
    np.testing.assert_array_equal(out, reference.view(out.dtype))


@pytest.mark.parametrize("seed", slow_but([0], range(3)))
@pytest.mark.parametrize(("num_slots", "num_records"), [(0, 12), (12, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("name", ["bytes-264x8", "scaled-264x8", "fp8-24x4"])
def test_either_source_may_be_empty(
    device: torch.device, name: str, num_slots: int, num_records: int, seed: int
) -> None:
    codec, sources = CODECS[name], Sources(seed, num_slots, num_records, CODECS[name], device)
    keys, places = pairs_of(seed, 11, num_slots + num_records)
    np.testing.assert_array_equal(gathered(keys, places, sources, codec, device), by_hand(keys, places, sources, codec))


@pytest.mark.parametrize("num_tokens", [0, 1, 85, 86, 171])
def test_any_number_of_tokens_is_answered(device: torch.device, num_tokens: int) -> None:
    sources = Sources(1, 5, 5, SMALL, device)
    keys, places = pairs_of(2, num_tokens, 10)  # a program of the interpreter takes 256 pairs, of 85.3 tokens
    np.testing.assert_array_equal(gathered(keys, places, sources, SMALL, device), by_hand(keys, places, sources, SMALL))


@pytest.mark.parametrize("native_pairs", [1, 4])
@pytest.mark.parametrize("name", slow_but(["bytes-264x8", "bytes-33x3", "scaled-99x5", "fp8-24x4"], CODECS))
def test_the_sizes_that_a_gpu_runs_give_the_same(
    device: torch.device, name: str, native_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "block_of", native_block_of)
    monkeypatch.setattr(gather, "PAIRS_NATIVE", native_pairs)
    codec, sources = CODECS[name], Sources(5, 3, 3, CODECS[name], device)
    keys, places = pairs_of(6, 7, 6)
    np.testing.assert_array_equal(gathered(keys, places, sources, codec, device), by_hand(keys, places, sources, codec))


@pytest.mark.parametrize("chunk", [32, 64, 256])
@pytest.mark.parametrize("name", ["bytes-264x8", "bytes-33x3", "scaled-99x5", "fp8-33x1"])
def test_entries_longer_than_a_chunk_are_whole(
    device: torch.device, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "_CHUNK_MAX", chunk)
    codec, sources = CODECS[name], Sources(5, 3, 3, CODECS[name], device)
    keys, places = pairs_of(6, 7, 6)
    np.testing.assert_array_equal(gathered(keys, places, sources, codec, device), by_hand(keys, places, sources, codec))


@pytest.mark.parametrize("tilt", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["bytes-264x8", "scaled-264x8"])
def test_records_may_lie_anywhere(device: torch.device, name: str, tilt: int) -> None:
    codec, sources = CODECS[name], Sources(8, 2, 6, CODECS[name], device, tilt)
    keys, places = pairs_of(9, 9, 8)
    np.testing.assert_array_equal(gathered(keys, places, sources, codec, device), by_hand(keys, places, sources, codec))


def test_every_byte_with_every_exponent_is_the_adapters_value(device: torch.device) -> None:
    codec = RowCodec(FP8_SCALED, 8, 33, 32)
    rows = np.empty((256, 8, 33), dtype=np.uint8)
    rows[:, :, :32] = np.arange(256).reshape(8, 32)
    rows[:, :, 32] = np.arange(256)[:, None]
    everything(rows.reshape(256, -1), codec, device)


@pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-140, 3e38, 1e-45, float("inf"), float("nan"), -7.3])
def test_every_byte_with_one_scale_is_the_adapters_value(device: torch.device, scale: float) -> None:
    codec = RowCodec(FP8, 1, 256, 256, scale)
    rows = np.arange(256, dtype=np.uint8)[None, :]
    sources = Sources(0, 1, 0, codec, device)
    sources.sources.slots.copy_(torch.from_numpy(rows))
    out = gathered(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int32), sources, codec, device)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    expected = (values * torch.tensor(scale, dtype=torch.float32)).to(torch.bfloat16)
    np.testing.assert_array_equal(out.reshape(-1), patterns(expected))
    with np.errstate(all="ignore"):
        reference = reference_gpu.decode_entries(rows, codec)
    np.testing.assert_array_equal(out.view(np.uint16), reference)


def everything(entries: np.ndarray, codec: RowCodec, device: torch.device) -> None:
    sources = Sources(0, len(entries), 0, codec, device)
    sources.sources.slots[:, : codec.entry_bytes] = torch.from_numpy(entries).to(device)
    places = np.arange(len(entries), dtype=np.int32)[:, None]
    out = gathered(places.astype(np.int64), places, sources, codec, device)
    np.testing.assert_array_equal(out, decoded(entries, codec))
    np.testing.assert_array_equal(out.view(np.uint16), reference_gpu.decode_entries(entries, codec))


def test_sizes_that_are_not_their_codecs_are_refused() -> None:
    for bad in (
        (FP8_SCALED, 8, 264, 255),
        (FP8_SCALED, 8, 256, 256),
        (FP8, 8, 32, 31),
        (BYTES, 0, 4, 0),
        (BYTES, 1, 0, 0),
    ):
        with pytest.raises(ValueError, match="take"):
            RowCodec(*bad)
    with pytest.raises(ValueError, match="not one of"):
        RowCodec("fp4", 1, 2, 2)


def test_sources_and_outputs_that_do_not_fit_are_refused(device: torch.device) -> None:
    codec, sources = CODECS["bytes-40x1"], Sources(1, 2, 2, CODECS["bytes-40x1"], device).sources
    keys = torch.zeros(1, 1, dtype=torch.int64, device=device)
    places = torch.zeros(1, 1, dtype=torch.int32, device=device)
    out = poisoned_out(1, codec, device)
    for wrong in (
        gather.EntrySources(sources.slots[:, :32].contiguous(), 0, 0, 0),
        gather.EntrySources(torch.zeros(2, 41, dtype=torch.uint8, device=device), 0, 0, 0),
        gather.EntrySources(sources.slots, sources.records_address, 41, 2),
        gather.EntrySources(sources.slots, sources.records_address, 32, 2),
        gather.EntrySources(sources.slots, 0, 56, 2),
        gather.EntrySources(sources.slots, -8, 56, 2),
    ):
        with pytest.raises(ValueError, match=r"must|below"):
            gather.gather_entries(places, keys, wrong, codec, out)
    for bad_out in (out[:, :39], out.view(torch.int8), poisoned_out(2, codec, device)):
        with pytest.raises(ValueError, match="expected"):
            gather.gather_entries(places, keys, sources, codec, bad_out)
