"""One launch answers what the sources hold, lists what they do not, once each, and counts both."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from support.gpu_inputs import (
    CODECS,
    KEY_MAX,
    LOST,
    HostIndex,
    Sources,
    decoded,
    index_of,
    native_block_of,
    patterns,
    poison_of,
    poisoned_out,
)
from support.host_memory import POISON_INT32, POISON_INT64, address_of, host_bytes, wait_for_device
from support.marks import slow_but

from tierstore.kernels import reference_gpu
from tierstore.kernels.gpu import launching, lookup
from tierstore.kernels.gpu.codecs import BYTES, RowCodec
from tierstore.kernels.gpu.misses import MissList

SMALL = CODECS["scaled-33x3"]


class Lookup:
    """Everything that a lookup takes, and what it left behind."""

    def __init__(self, codec: RowCodec, device: torch.device, num_pairs: int, orders: int, pairs_max: int) -> None:
        self.device, self.codec, self.pairs_max = device, codec, pairs_max
        self.listed_keys = host_bytes(8 * (num_pairs + 8)).view(np.int64)
        self.listed_pairs = host_bytes(4 * (num_pairs + 8)).view(np.int32)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.counts = torch.full((3 * orders + 1,), 1000, dtype=torch.int64, device=device)
        self.out = poisoned_out(num_pairs, codec, device)

    def run(self, keys: np.ndarray, host: HostIndex, sources: Sources) -> None:
        misses = MissList(self.count, address_of(self.listed_keys), address_of(self.listed_pairs), self.pairs_max)
        lookup.lookup_entries(
            torch.from_numpy(keys).to(self.device),
            host.index,
            sources.sources,
            self.codec,
            self.out,
            misses,
            self.counts,
        )
        wait_for_device(self.device)

    def listed(self) -> list[tuple[int, int]]:
        """(pair, key) of the misses; every word behind them must be poison still."""
        stored = min(int(self.count), self.pairs_max)
        assert (self.listed_keys[stored:] == POISON_INT64).all()
        assert (self.listed_pairs[stored:] == POISON_INT32).all()
        return list(zip(self.listed_pairs[:stored].tolist(), self.listed_keys[:stored].tolist(), strict=True))


def placed_keys(seed: int, num_places: int, orders: int, dangling: int = 3) -> list[dict[int, int]]:
    """Keys by order for every place and some that no source has; the same keys in several orders, at other places."""
    random = np.random.default_rng(seed)
    pool = [0, KEY_MAX, *random.integers(1, KEY_MAX, size=num_places + dangling).tolist()]
    out: list[dict[int, int]] = [{} for _ in range(orders)]
    for place in [*range(num_places), *range(num_places, num_places + dangling)]:
        entries = out[int(random.integers(orders))]
        entries[next(key for key in random.permutation(pool).tolist() if key not in entries)] = place
    return out


def keys_of(seed: int, placed: list[dict[int, int]], num_tokens: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    pool = [*sorted({key for entries in placed for key in entries}), 5, 6]
    keys = random.choice(np.array(pool, dtype=np.int64), size=(num_tokens, len(placed)))
    keys[random.random(keys.shape) < 0.2] = -1
    keys[random.random(keys.shape) < 0.05] = -2
    return keys


def check(
    keys: np.ndarray,
    placed: list[dict[int, int]],
    sources: Sources,
    codec: RowCodec,
    device: torch.device,
    parity: int = 0,
) -> None:
    """Runs a lookup, and goes through its pairs one by one."""
    sizes = [len(entries) // 4 + 1 if entries else 0 for entries in placed]
    host = index_of(placed, sizes, device, parity)
    answer = Lookup(codec, device, keys.size, len(placed), keys.size)
    answer.run(keys, host, sources)
    expected, missed, counted = poison_of(keys.size, codec), [], Counter()
    for pair, key in enumerate(keys.reshape(-1).tolist()):
        order = pair % len(placed)
        place = placed[order].get(key, -1)
        if key == -1:
            expected[pair] = 0
            counted[3 * len(placed)] += 1
        elif key < -1:
            expected[pair] = LOST[str(expected.dtype)]  # no key, and so counted nowhere
        elif 0 <= place < len(sources.entries):
            expected[pair] = decoded(sources.entries[place : place + 1], codec)[0]
            counted[(place >= len(sources.slots)) * len(placed) + order] += 1
        else:
            missed.append((pair, key))
            counted[2 * len(placed) + order] += 1
    np.testing.assert_array_equal(patterns(answer.out), expected)
    assert int(answer.count) == len(missed)
    assert sorted(answer.listed()) == missed
    assert answer.counts.tolist() == [1000 + counted[counter] for counter in range(3 * len(placed) + 1)]
    against_the_reference(keys, host, sources, answer)
    without_a_list(keys, host, sources, answer)


def without_a_list(keys: np.ndarray, host: HostIndex, sources: Sources, answer: Lookup) -> None:
    """The same where misses are not listed, and the places of all pairs are wanted instead."""
    out = poisoned_out(keys.size, answer.codec, answer.device)
    counts = torch.full_like(answer.counts, 1000)
    places = torch.full(keys.shape, 12345, dtype=torch.int32, device=answer.device)
    there = torch.from_numpy(keys).to(answer.device)
    lookup.lookup_entries(there, host.index, sources.sources, answer.codec, out, None, counts, places)
    wait_for_device(answer.device)
    np.testing.assert_array_equal(patterns(out), patterns(answer.out))
    assert counts.tolist() == answer.counts.tolist()
    found = reference_gpu.find_entries(int(host.epoch[0]), host.heads, host.buckets, keys)
    found[found >= len(sources.entries)] = -1
    np.testing.assert_array_equal(places.cpu().numpy(), found)


def against_the_reference(keys: np.ndarray, host: HostIndex, sources: Sources, answer: Lookup) -> None:
    places = reference_gpu.find_entries(int(host.epoch[0]), host.heads, host.buckets, keys)
    out = poison_of(keys.size, answer.codec).view(np.uint8 if answer.codec.kind == BYTES else np.uint16)
    counts = np.full(len(answer.counts), 1000, dtype=np.int64)
    missed = reference_gpu.lookup_entries(keys, places, sources.slots, sources.records, answer.codec, out, counts)
    if answer.codec.kind != BYTES:
        out[out == 0xFFFF] = 0x7FC0  # as `patterns` has every NaN
    np.testing.assert_array_equal(patterns(answer.out).view(out.dtype), out)
    assert sorted(pair for pair, _ in answer.listed()) == missed.tolist()
    assert answer.counts.tolist() == counts.tolist()


@pytest.mark.parametrize("name", CODECS)
def test_hits_are_answered_misses_listed_and_both_counted(device: torch.device, name: str) -> None:
    codec, placed = CODECS[name], placed_keys(1, 20, 3)
    check(keys_of(2, placed, 29), placed, Sources(3, 8, 12, codec, device), codec, device)


@pytest.mark.parametrize("orders", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", slow_but([0, 1], range(5)))
def test_random_tables_and_batches(device: torch.device, seed: int, orders: int) -> None:
    random = np.random.default_rng(seed)
    num_slots, num_records = random.integers(0, 30, size=2).tolist()
    placed = placed_keys(seed, num_slots + num_records, orders)
    sources = Sources(seed, num_slots, num_records, SMALL, device)
    check(keys_of(seed, placed, int(random.integers(1, 60))), placed, sources, SMALL, device, parity=seed % 2)


@pytest.mark.parametrize("num_tokens", [0, 1, 85, 86, 171])
def test_any_number_of_tokens_is_answered(device: torch.device, num_tokens: int) -> None:
    placed = placed_keys(4, 9, 3)  # a program of the interpreter takes 256 pairs, of 85.3 tokens
    check(keys_of(5, placed, num_tokens), placed, Sources(6, 4, 5, SMALL, device), SMALL, device)


@pytest.mark.parametrize("native_pairs", slow_but([8], [1, 8]))
@pytest.mark.parametrize("name", ["bytes-264x8", "bytes-33x3", "scaled-264x8", "fp8-24x4"])
def test_the_sizes_that_a_gpu_runs_give_the_same(
    device: torch.device, name: str, native_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "block_of", native_block_of)
    monkeypatch.setattr(lookup, "PAIRS_NATIVE", native_pairs)
    codec, placed = CODECS[name], placed_keys(7, 6, 3)
    check(keys_of(8, placed, 6), placed, Sources(9, 3, 3, codec, device), codec, device)


@pytest.mark.parametrize("batch", ["hits", "misses", "sentinels", "one key"])
def test_batches_of_one_kind(device: torch.device, batch: str) -> None:
    placed = [{0: 0, KEY_MAX: 1, 17: 2}, {0: 3, KEY_MAX: 4, 17: 5}]
    keys = {
        "hits": np.array([[0, KEY_MAX], [17, 0], [KEY_MAX, 17]]),
        "misses": np.array([[1, 2], [3, 1]]),
        "sentinels": np.full((3, 2), -1),
        "one key": np.full((90, 2), 17),
    }[batch]
    check(keys, placed, Sources(1, 3, 3, SMALL, device), SMALL, device)


def test_without_entries_everything_is_missed(device: torch.device) -> None:
    check(np.array([[0, 1, -1], [0, 0, KEY_MAX]]), [{}, {}, {}], Sources(1, 0, 0, SMALL, device), SMALL, device)


def test_misses_past_the_list_are_counted_and_not_stored(device: torch.device) -> None:
    keys = np.arange(40).reshape(20, 2)
    host, sources = index_of([{}, {}], [0, 0], device), Sources(1, 0, 0, SMALL, device)
    answer = Lookup(SMALL, device, 40, 2, pairs_max=7)
    answer.run(keys, host, sources)
    assert int(answer.count) == 40
    listed = answer.listed()
    assert len({pair for pair, _ in listed}) == 7
    assert all(pair == key for pair, key in listed)


def test_misses_of_several_lookups_go_behind_one_another(device: torch.device) -> None:
    placed = [{4: 0}, {}]
    host, sources = index_of(placed, [1, 0], device), Sources(1, 1, 0, SMALL, device)
    answer = Lookup(SMALL, device, 4, 2, pairs_max=8)
    answer.run(np.array([[4, 9], [8, -1]]), host, sources)
    answer.run(np.array([[4, 7], [-1, 4]]), host, sources)
    assert int(answer.count) == 4
    assert sorted(answer.listed()) == [(1, 7), (1, 9), (2, 8), (3, 4)]


def test_tensors_that_do_not_fit_are_refused(device: torch.device) -> None:
    host, sources = index_of([{4: 0}, {}], [1, 0], device), Sources(1, 1, 0, SMALL, device)
    answer = Lookup(SMALL, device, 4, 2, pairs_max=8)
    keys = np.zeros((2, 2), dtype=np.int64)
    for attribute, bad in (
        ("counts", answer.counts[:-1]),
        ("counts", answer.counts.int()),
        ("out", answer.out[:3]),
        ("out", answer.out.view(torch.int16)),
    ):
        good = getattr(answer, attribute)
        setattr(answer, attribute, bad)
        with pytest.raises(ValueError, match="expected"):
            answer.run(keys, host, sources)
        setattr(answer, attribute, good)
    with pytest.raises(ValueError, match="expected"):
        answer.run(keys.reshape(4, 1), host, sources)
