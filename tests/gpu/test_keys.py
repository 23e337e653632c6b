"""Keys made on the device are those of the host, and ids outside the vocabulary cost their n-grams the key,
nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.gpu_inputs import KEY_MAX, native_block_of
from support.host_memory import POISON_INT64
from support.marks import slow_but

from tierstore.kernels import reference
from tierstore.kernels.gpu import keys as keys_module
from tierstore.kernels.gpu import launching
from tierstore.kernels.gpu.keys import DeviceHash, keys_of_tokens

ORDERS = [(1,), (2,), (2, 3), (2, 3, 4), (1, 4), (3, 5, 6), tuple(range(2, 17))]
NATIVE_BLOCK = keys_module._TOKENS_A_PROGRAM
VOCAB = 50
OUTSIDE = [VOCAB, -2, -(2**63), KEY_MAX, 2**44]  # ids; a map read there would be a fault


class Batch:
    """Random ids, many of them the barrier or 0, and a hash of these orders."""

    def __init__(
        self, seed: int, shape: tuple[int, int], orders: tuple[int, ...], past: int, with_map: bool, with_barrier: bool
    ) -> None:
        rng = np.random.default_rng([seed, *shape, *orders, past, with_map, with_barrier])
        self.orders, self.pad_id, self.barrier_id = orders, 7, 9 if with_barrier else -1
        self.token_map = rng.integers(0, 30, VOCAB, dtype=np.int32) if with_map else None
        self.multipliers = rng.integers(1, KEY_MAX // VOCAB, orders[-1])
        self.token_ids = rng.integers(0, VOCAB, shape)
        self.token_ids[rng.random(shape) < 0.2] = rng.choice([0, 9])
        self.history = rng.integers(-1, VOCAB, (shape[0], past)) if past else None
        self.dead = rng.random(shape) < 0.2 if rng.random() < 0.7 else None

    def on(self, device: torch.device) -> tuple[np.ndarray, int]:
        """Returns the keys that the device makes, and its word about ids outside the vocabulary, which was 0."""
        tensors = [
            None if array is None else torch.from_numpy(array.copy()).to(device)
            for array in (self.token_ids, self.history, self.dead, self.token_map, self.multipliers)
        ]
        spec = DeviceHash(tensors[3], VOCAB, tensors[4], self.orders, self.pad_id, self.barrier_id)
        shape = (*self.token_ids.shape, len(self.orders))
        out = torch.full(shape, POISON_INT64, dtype=torch.int64, device=device)
        outside = torch.zeros(1, dtype=torch.int64, device=device)
        keys_of_tokens(*tensors[:3], spec, out, outside)
        return out.cpu().numpy(), int(outside)

    def expected(self) -> np.ndarray:
        out = np.full((*self.token_ids.shape, len(self.orders)), POISON_INT64)
        outside = reference.keys_of_tokens(
            self.token_ids, self.history, self.dead, self.token_map, VOCAB, self.multipliers, np.array(self.orders),
            self.pad_id, self.barrier_id, out,
        )  # fmt: skip
        assert outside == -1
        return out

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of history and tokens, and which of them are nothing to look at."""
        past = np.empty((len(self.token_ids), 0), dtype=np.int64) if self.history is None else self.history
        dead = np.zeros(self.token_ids.shape, dtype=bool) if self.dead is None else self.dead
        return np.concatenate([past, self.token_ids], 1), np.concatenate([past == -1, dead], 1)

    def touching(self) -> np.ndarray:
        """Which n-grams, bool [B, T, O], reach an id outside the vocabulary before look-back ends; token by token."""
        ids, nothing = self.joined()
        past = ids.shape[1] - self.token_ids.shape[1]
        found = np.zeros((*self.token_ids.shape, len(self.orders)), dtype=bool)
        for row, column, order in np.ndindex(found.shape):
            for back in range(self.orders[order]):
                at = past + column - back
                if at < 0 or nothing[row, at] or (back > 0 and ids[row, at] == self.barrier_id):
                    break
                if not 0 <= ids[row, at] < VOCAB:
                    found[row, column, order] = True
        return found


@pytest.mark.parametrize("orders", slow_but([(1,), (2, 3, 4), (3, 5, 6)], ORDERS), ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1), (2, 3), (3, 17), (64, 1)], ids=str)
def test_keys_equal_the_references(device: torch.device, orders: tuple[int, ...], shape: tuple[int, int]) -> None:
    for past in sorted({0, 1, orders[-1] - 1}):
        for with_map, with_barrier in ((False, True), (True, False)):
            if past < orders[-1]:
                batch = Batch(0, shape, orders, past, with_map, with_barrier)
                found, outside = batch.on(device)
                np.testing.assert_array_equal(found, batch.expected())
                assert outside == 0


@pytest.mark.parametrize("num_tokens", [NATIVE_BLOCK - 1, NATIVE_BLOCK, NATIVE_BLOCK + 1, 1000])
@pytest.mark.parametrize("native", [False, True])
def test_keys_are_right_where_blocks_meet(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, num_tokens: int, native: bool
) -> None:
    if native:
        monkeypatch.setattr(launching, "block_of", native_block_of)
    for past in (0, 3):
        batch = Batch(1, (2, num_tokens), (2, 3, 4), past, True, True)
        np.testing.assert_array_equal(batch.on(device)[0], batch.expected())


@pytest.mark.parametrize("seed", range(10))
def test_keys_equal_the_references_over_random_shapes(device: torch.device, seed: int) -> None:
    rng = np.random.default_rng(seed)
    orders = ORDERS[seed % len(ORDERS)]
    shape = int(rng.integers(1, 9)), int(rng.integers(1, 300))
    batch = Batch(seed, shape, orders, int(rng.integers(0, orders[-1])), seed % 2 == 0, seed % 3 == 0)
    np.testing.assert_array_equal(batch.on(device)[0], batch.expected())


@pytest.mark.parametrize("bad", slow_but([VOCAB, 2**44], OUTSIDE))
@pytest.mark.parametrize("with_map", [False, True])
def test_an_id_outside_the_vocabulary_is_told_and_costs_its_ngrams_their_key(
    device: torch.device, bad: int, with_map: bool
) -> None:
    batch = Batch(2, (3, 5), (1, 2, 4), 3, with_map, True)
    good_history, good_tokens = batch.history, batch.token_ids
    for place in range(3 * 8):
        batch.history, batch.token_ids = good_history.copy(), good_tokens.copy()
        row, column = divmod(place, 8)
        (batch.history if column < 3 else batch.token_ids)[row, column if column < 3 else column - 3] = bad
        ids, nothing = batch.joined()
        found, outside = batch.on(device)
        assert outside == (0 if nothing[row, column] else place + 1)
        touched = batch.touching()
        batch.history, batch.token_ids = good_history, good_tokens
        # What does not touch the bad id is what it would be with a good one there, for it ends where it ended.
        replaced = np.where((ids < -1) | (ids >= VOCAB), 1, ids)
        batch.history, batch.token_ids = replaced[:, :3].copy(), replaced[:, 3:].copy()
        np.testing.assert_array_equal(found, np.where(touched, -2, batch.expected()))


def test_minus_one_is_no_token_where_only_history_has_gaps(device: torch.device) -> None:
    batch = Batch(3, (1, 4), (1, 2), 1, True, False)
    batch.dead, batch.token_ids = None, np.array([[1, -1, 2, 3]])
    found, outside = batch.on(device)
    assert outside == 3
    assert (found == -2).tolist() == [[[False, False], [True, True], [False, True], [False, False]]]


def test_the_word_about_ids_outside_keeps_the_largest(device: torch.device) -> None:
    spec = DeviceHash(None, VOCAB, torch.ones(2, dtype=torch.int64, device=device), (2,), 0, -1)
    outside = torch.zeros(1, dtype=torch.int64, device=device)
    out = torch.empty((2, 3, 1), dtype=torch.int64, device=device)
    for ids, expected in (
        ([[0, 1, 2], [3, 4, 5]], 0),
        ([[0, 99, 2], [3, 99, 5]], 5),
        ([[99, 1, 2], [3, 4, 5]], 5),
        ([[0, 1, 2], [3, 4, 99]], 6),
        ([[0, 1, 2], [3, 4, 5]], 6),
    ):
        keys_of_tokens(torch.tensor(ids, device=device), None, None, spec, out, outside)
        assert int(outside) == expected


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    spec = DeviceHash(None, VOCAB, torch.ones(3, dtype=torch.int64, device=device), (2, 3), 0, -1)
    ids = torch.zeros((2, 4), dtype=torch.int64, device=device)
    dead = torch.zeros((2, 4), dtype=torch.bool, device=device)
    out = torch.zeros((2, 4, 2), dtype=torch.int64, device=device)
    outside = torch.zeros(1, dtype=torch.int64, device=device)
    for arguments in (
        (ids.to(torch.int32), None, None, out),
        (torch.zeros((4, 2), dtype=torch.int64, device=device).T, None, None, out),
        (ids[0], None, None, out),
        (ids, ids[:1, :2], None, out),
        (ids, ids[:, :3].contiguous(), None, out),
        (ids, None, dead.to(torch.uint8), out),
        (ids, None, dead[:, :3], out),
        (ids, None, None, out[:, :, :1]),
    ):
        with pytest.raises(ValueError, match=r"expected torch|give fewer"):
            keys_of_tokens(*arguments[:3], spec, arguments[3], outside)
    for change in ({"orders": ()}, {"orders": (0, 3)}, {"orders": (3, 3)}, {"orders": (2, 17)}, {"orders": (2,)},
                   {"vocab_size": 0}, {"token_map": ids[0]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected torch|must"):
            dataclasses.replace(spec, **change)
