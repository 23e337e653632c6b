"""Keys of heads that share none, made on the device, are those of the host; an id outside the vocabulary is noted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from support.gpu_inputs import native_block_of
from support.host_memory import POISON_INT64

from tierstore.kernels import reference
from tierstore.kernels.gpu import launching
from tierstore.kernels.gpu import polynomial_keys as module
from tierstore.kernels.gpu.polynomial_keys import DeviceSums, polynomial_keys_of_tokens

VOCAB, ORDERS = 50, (2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4)


class Batch:
    """Random ids, many of them the barrier or 0, and a hash of twelve heads."""

    def __init__(self, seed: int, shape: tuple[int, int], past: int, orders: tuple[int, ...] = ORDERS) -> None:
        rng = np.random.default_rng([seed, *shape, past])
        self.orders, self.barrier_id = orders, 9 if seed % 2 else -1
        self.moduli = rng.integers(1, 2**40, len(orders))
        self.weights = rng.integers(1, 2**50, (len(orders), max(orders)))
        self.weights[np.arange(max(orders)) >= np.array(orders)[:, None]] = 0
        self.token_ids = rng.integers(0, VOCAB, shape)
        self.token_ids[rng.random(shape) < 0.2] = rng.choice([0, 9])
        self.history = rng.integers(-1, VOCAB, (shape[0], past)) if past else None
        self.dead = rng.random(shape) < 0.2 if seed % 3 else None

    def on(self, device: torch.device) -> tuple[np.ndarray, int]:
        """Returns the keys that the device makes, and its word about ids outside the vocabulary, which was 0."""
        arrays: tuple[Any, ...] = (self.token_ids, self.history, self.dead, self.weights, self.moduli)
        tensors = [None if each is None else torch.from_numpy(each.copy()).to(device) for each in arrays]
        spec = DeviceSums(VOCAB, tensors[3], tensors[4], torch.tensor(self.orders, device=device), self.barrier_id)
        out = torch.full((*self.token_ids.shape, len(self.orders)), POISON_INT64, device=device)
        outside = torch.zeros(1, dtype=torch.int64, device=device)
        polynomial_keys_of_tokens(*tensors[:3], spec, out, outside)
        return out.cpu().numpy(), int(outside)

    def expected(self) -> np.ndarray:
        out = np.full((*self.token_ids.shape, len(self.orders)), POISON_INT64)
        arguments = (self.token_ids, self.history, self.dead, VOCAB, self.weights, self.moduli, self.barrier_id, out)
        assert reference.polynomial_keys_of_tokens(*arguments) == -1
        return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("shape", "past"), [((1, 1), 0), ((3, 20), 3), ((2, 33), 1), ((2, 0), 1)])
def test_keys_are_those_of_the_host(device: torch.device, seed: int, shape: tuple[int, int], past: int) -> None:
    batch = Batch(seed, shape, past)
    found, outside = batch.on(device)
    assert outside == 0
    np.testing.assert_array_equal(found, batch.expected())


def test_every_program_of_several_writes_its_part(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "block_of", native_block_of)
    batch = Batch(1, (3, module._TOKENS_A_PROGRAM), 2)
    np.testing.assert_array_equal(batch.on(device)[0], batch.expected())


@pytest.mark.parametrize("bad", [VOCAB, -2, 2**44])
def test_an_id_outside_costs_its_n_grams_the_key_and_nothing_else(device: torch.device, bad: int) -> None:
    batch = Batch(0, (2, 12), 3)
    batch.barrier_id = -1
    batch.history = np.zeros((2, 3), dtype=np.int64)
    wanted = batch.expected()
    batch.token_ids[1, 5] = bad
    found, outside = batch.on(device)
    assert outside == 1 + 15 + 3 + 5
    for head, order in enumerate(ORDERS):
        touched = range(5, 5 + order)
        assert (found[1, touched, head] == -2).all()
        others = [column for column in range(12) if column not in touched]
        np.testing.assert_array_equal(found[1, others, head], wanted[1, others, head])
    np.testing.assert_array_equal(found[0], wanted[0])


@pytest.mark.parametrize(
    "change", [{"vocab_size": 0}, {"orders": torch.ones(3, dtype=torch.int64)}, {"weights": torch.ones(12, 17).long()}]
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    ones = torch.ones(12, dtype=torch.int64)
    good = DeviceSums(VOCAB, torch.ones(12, 4, dtype=torch.int64), ones, ones, -1)
    with pytest.raises(ValueError, match=r"must|expected"):
        dataclasses.replace(good, **change)
