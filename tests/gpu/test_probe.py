"""Keys are found where the index has them, whichever bucket of whichever area that is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gpu_inputs import KEY_MAX, HostIndex, index_of, native_block_of

from tierstore.kernels import reference_gpu
from tierstore.kernels.gpu import launching, probe

POISON = -77


def found(host: HostIndex, keys: np.ndarray, device: torch.device) -> np.ndarray:
    places = torch.full(keys.shape, POISON, dtype=torch.int32, device=device)
    probe.find_entries(host.index, torch.from_numpy(keys).to(device), places)
    expected = reference_gpu.find_entries(int(host.epoch[0]), host.heads, host.buckets, keys)
    np.testing.assert_array_equal(places.cpu().numpy(), expected)
    return expected


def random_entries(seed: int, counts: tuple[int, ...]) -> list[dict[int, int]]:
    random = np.random.default_rng(seed)
    places = random.permutation(10_000)
    out, start = [], 0
    for count in counts:
        keys = np.unique(random.integers(0, KEY_MAX, size=count, endpoint=True))
        out.append(dict(zip(keys.tolist(), places[start : start + len(keys)].tolist(), strict=True)))
        start += count
    return out


def asked_keys(seed: int, placed: list[dict[int, int]], num_tokens: int) -> np.ndarray:
    """Keys of the index, of another order, of none, and -1, duplicates among them."""
    random = np.random.default_rng(seed)
    keys = np.empty((num_tokens, len(placed)), dtype=np.int64)
    for order, entries in enumerate(placed):
        own = list(entries) or [0]
        other = list(placed[(order + 1) % len(placed)]) or [0]
        choice = random.integers(0, 4, size=num_tokens)
        keys[:, order] = np.choose(
            choice,
            [
                random.choice(own, num_tokens),
                random.choice(other, num_tokens),
                random.integers(0, KEY_MAX, size=num_tokens),
                np.full(num_tokens, -1),
            ],
        )
    return keys


def by_hand(placed: list[dict[int, int]], keys: np.ndarray) -> np.ndarray:
    return np.array(
        [[placed[order].get(int(key), -1) for order, key in enumerate(token)] for token in keys], dtype=np.int32
    ).reshape(keys.shape)


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_every_key_is_found_at_its_place_and_no_other(device: torch.device, seed: int, parity: int) -> None:
    placed = random_entries(seed, (200, 40, 5))
    host = index_of(placed, (44, 8, 1), device, parity)  # nearly full: many entries are displaced, round the end too
    keys = asked_keys(seed, placed, 97)
    np.testing.assert_array_equal(found(host, keys, device), by_hand(placed, keys))


@pytest.mark.parametrize("num_tokens", [0, 1, 10, 11, 1023, 1024, 1025])
def test_any_number_of_tokens_is_answered(device: torch.device, num_tokens: int) -> None:
    placed = random_entries(1, (30, 30, 30))
    keys = asked_keys(2, placed, num_tokens)
    np.testing.assert_array_equal(found(index_of(placed, (8, 8, 8), device), keys, device), by_hand(placed, keys))


def test_the_sizes_that_a_gpu_runs_give_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "block_of", native_block_of)
    placed = random_entries(3, (60, 20))
    for num_tokens in (15, 16, 17, 40):  # two orders: 16 tokens are a program's pairs
        keys = asked_keys(4, placed, num_tokens)
        np.testing.assert_array_equal(found(index_of(placed, (13, 4), device), keys, device), by_hand(placed, keys))


def test_key_zero_and_the_largest_key_are_keys_like_others(device: torch.device) -> None:
    host = index_of([{0: 5, KEY_MAX: 6}, {}, {0: 9}], (1, 1, 3), device)
    keys = np.array([[0, 0, 0], [KEY_MAX] * 3, [-1, -1, -1], [0, -1, KEY_MAX]])
    np.testing.assert_array_equal(found(host, keys, device), [[5, -1, 9], [6, -1, -1], [-1, -1, -1], [5, -1, -1]])


def test_an_order_without_buckets_has_no_entries(device: torch.device) -> None:
    host = index_of([{3: 1}, {}, {3: 2}], (1, 0, 1), device)
    np.testing.assert_array_equal(found(host, np.full((4, 3), 3), device), [[1, -1, 2]] * 4)


def test_a_search_in_a_full_index_ends(device: torch.device) -> None:
    full = {key: key % 1000 for key in range(35)}
    host = index_of([full], (7,), device)
    host.buckets[:, 60:] = 0xFF  # every displaced bit is set: only the number of buckets ends a search
    host.index.buckets.copy_(torch.from_numpy(host.buckets))
    keys = np.arange(80)[:, None]
    np.testing.assert_array_equal(found(host, keys, device), by_hand([full], keys))


def test_a_new_epoch_is_seen_without_another_index(device: torch.device) -> None:
    host = index_of([{3: 1}], (1,), device, parity=0)
    assert found(host, np.array([[3]]), device).item() == 1
    host.index.epoch.add_(1)
    host.epoch += 1
    assert found(host, np.array([[3]]), device).item() == 7


def test_a_place_that_no_memory_has_counts_as_not_there(device: torch.device) -> None:
    host = index_of([{3: 2**31 - 1, 4: 2**31, 5: 2**32 - 1}], (1,), device)
    np.testing.assert_array_equal(found(host, np.array([[3], [4], [5]]), device), [[2**31 - 1], [-1], [-1]])


def test_tensors_that_do_not_fit_are_refused(device: torch.device) -> None:
    index = index_of([{3: 1}, {}], (1, 1), device).index
    keys, places = (
        torch.zeros(4, 2, dtype=torch.int64, device=device),
        torch.zeros(4, 2, dtype=torch.int32, device=device),
    )
    probe.find_entries(index, keys, places)
    for bad_keys, bad_places in (
        (keys.int(), places),
        (keys, places.long()),
        (keys, places[:3]),
        (keys.T, places),
        (keys[:, :1].contiguous(), places[:, :1].contiguous()),  # another number of orders than the index has
    ):
        with pytest.raises(ValueError, match="expected"):
            probe.find_entries(index, bad_keys, bad_places)
    room = torch.zeros(4 * 64 + 64, dtype=torch.uint8, device=device)
    start = -room.data_ptr() % 64 + 8
    tilted = probe.DeviceIndex(index.epoch, index.heads, room[start : start + 192].view(3, 64))
    with pytest.raises(ValueError, match="multiple of 64"):
        probe.find_entries(tilted, keys, places)
