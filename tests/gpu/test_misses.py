"""The list of misses and the request to the host: every miss once, nothing past the list,
and no request without a miss."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.gpu_inputs import KEY_MAX, native_block_of
from support.host_memory import POISON_INT32, POISON_INT64, address_of, host_bytes, host_words, wait_for_device

from tierstore.kernels import reference_mailbox
from tierstore.kernels.gpu import launching
from tierstore.kernels.gpu import misses as misses_module
from tierstore.kernels.gpu.misses import MissList, StepState, collect_misses, list_row_ids, post_misses

NATIVE_BLOCK = misses_module._PAIRS_A_PROGRAM


class List:
    """A miss list in poisoned host memory, with room for as many pairs behind it, where nothing may be written."""

    def __init__(self, device: torch.device, pairs_max: int) -> None:
        self.keys = host_bytes(8 * (2 * pairs_max + 8)).view(np.int64)
        self.pairs = host_bytes(4 * (2 * pairs_max + 8)).view(np.int32)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.misses = MissList(self.count, address_of(self.keys), address_of(self.pairs), pairs_max)

    def found(self) -> dict[int, int]:
        """Keys by pair; every other word must be poison still."""
        wait_for_device(self.count.device)
        stored = min(int(self.count), self.misses.pairs_max)
        assert (self.keys[stored:] == POISON_INT64).all()
        assert (self.pairs[stored:] == POISON_INT32).all()
        found = dict(zip(self.pairs[:stored].tolist(), self.keys[:stored].tolist(), strict=True))
        assert len(found) == stored
        return found


def batch(seed: int, num_tokens: int, orders: int, missing: float) -> tuple[np.ndarray, np.ndarray]:
    """Random keys, among them -1, 0, 2^63 - 1 and equal ones, and their places below 100, some of them none."""
    rng = np.random.default_rng([seed, num_tokens, orders])
    keys = rng.integers(0, KEY_MAX, (num_tokens, orders), endpoint=True)
    special = rng.random(keys.shape) < 0.3
    keys[special] = rng.choice([-1, 0, 5, KEY_MAX], int(special.sum()))
    places = np.where(rng.random(keys.shape) < missing, -1, rng.integers(0, 100, keys.shape)).astype(np.int32)
    return keys, places


def collect(device: torch.device, keys: np.ndarray, places: np.ndarray, listed: List, num_places: int = 100) -> None:
    collect_misses(torch.from_numpy(keys).to(device), torch.from_numpy(places).to(device), listed.misses, num_places)


def expected(keys: np.ndarray, places: np.ndarray, num_places: int = 100) -> dict[int, int]:
    missed, pairs = reference_mailbox.collect_misses(keys, places, num_places)
    return dict(zip(pairs.tolist(), missed.tolist(), strict=True))


@pytest.fixture(params=["its own", "native"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the size that the launcher picks, and of the native size in the interpreter too."""
    if request.param == "native":
        monkeypatch.setattr(launching, "block_of", native_block_of)


def test_a_miss_is_a_key_without_a_place_and_a_sentinel_is_none(device: torch.device) -> None:
    keys = np.array([[7, -1, 0], [KEY_MAX, 9, 0], [7, 7, 11]])
    places = np.array([[-1, -1, -1], [3, -1, 0], [-1, 5, -7]], dtype=np.int32)
    listed = List(device, 9)
    collect(device, keys, places, listed, num_places=5)
    assert listed.found() == {0: 7, 2: 0, 4: 9, 6: 7, 7: 7, 8: 11}  # place 5 is none of the five


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 255, 256, 257, 1024, 1025])
@pytest.mark.parametrize("orders", [1, 3])
def test_every_miss_is_listed_once(device: torch.device, num_tokens: int, orders: int) -> None:
    keys, places = batch(0, num_tokens, orders, 0.4)
    listed = List(device, keys.size)
    collect(device, keys, places, listed)
    assert listed.found() == expected(keys, places)
    assert int(listed.count) == len(expected(keys, places))


@pytest.mark.parametrize("seed", range(10))
def test_lists_equal_the_references_over_random_shapes(device: torch.device, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys, places = batch(seed, int(rng.integers(1, 800)), int(rng.integers(1, 5)), rng.random())
    listed = List(device, keys.size)
    collect(device, keys, places, listed)
    assert listed.found() == expected(keys, places)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("missing", [0.0, 1.0])
def test_all_hits_list_nothing_and_all_misses_list_all(device: torch.device, missing: float) -> None:
    keys = np.arange(2 * NATIVE_BLOCK).reshape(-1, 2)
    places = np.full(keys.shape, -1 if missing else 0, dtype=np.int32)
    listed = List(device, keys.size)
    collect(device, keys, places, listed)
    assert listed.found() == (dict(enumerate(range(keys.size))) if missing else {})


def test_the_second_batch_is_listed_behind_the_first(device: torch.device) -> None:
    listed = List(device, 8)
    collect(device, np.array([[1, 2]]), np.array([[-1, 0]], dtype=np.int32), listed)
    collect(device, np.array([[3, 4]]), np.array([[0, -1]], dtype=np.int32), listed)
    assert listed.found() == {0: 1, 1: 4}


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("pairs_max", [0, 1, 100, 599])
def test_misses_past_the_end_of_the_list_are_counted_and_not_stored(device: torch.device, pairs_max: int) -> None:
    keys = np.arange(600).reshape(-1, 3)
    listed = List(device, pairs_max)
    collect(device, keys, np.full(keys.shape, -1, dtype=np.int32), listed)
    found = listed.found()
    assert int(listed.count) == 600
    assert len(found) == pairs_max
    assert all(pair == key for pair, key in found.items())


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    listed = List(device, 8)
    keys = torch.zeros((2, 3), dtype=torch.int64, device=device)
    places = torch.zeros((2, 3), dtype=torch.int32, device=device)
    for bad_keys, bad_places in (
        (keys.to(torch.int32), places),
        (keys[:, :2], places[:, :2].contiguous()),
        (keys.reshape(-1), places.reshape(-1)),
        (keys, places.to(torch.int64)),
        (keys, places[:1]),
    ):
        with pytest.raises(ValueError, match="expected torch"):
            collect_misses(bad_keys, bad_places, listed.misses, 1)
    for change in ({"keys_address": 12}, {"pairs_address": 6}, {"pairs_max": -1}, {"count": torch.zeros(2)}):
        with pytest.raises(ValueError, match=r"must be multiples|expected torch"):
            dataclasses.replace(listed.misses, **change)
    with pytest.raises(ValueError, match="multiple of 64"):
        post_misses(new_state(device), 8, 1)
    with pytest.raises(ValueError, match="batch_counts"):
        dataclasses.replace(new_state(device), batch_counts=torch.zeros(1, dtype=torch.int64, device=device))


def new_state(device: torch.device) -> StepState:
    words = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(5)]
    return StepState(*words, batch_counts=torch.zeros(2, dtype=torch.int64, device=device))


def as_dict(state: StepState) -> dict[str, int]:
    """In the reference's words."""
    words = {name: int(getattr(state, name)) for name in ("count", "step", "ready", "posted", "failed")}
    num_batches, num_without = state.batch_counts.tolist()
    return {**words, "num_batches": num_batches, "num_without_misses": num_without}


@pytest.mark.parametrize("seed", range(3))
def test_steps_are_posted_as_the_reference_does(device: torch.device, seed: int) -> None:
    rng = np.random.default_rng(seed)
    state, model = new_state(device), reference_mailbox.Step()
    mailbox, model_mailbox = host_words(24), np.zeros(24, dtype=np.int64)
    for _ in range(20):
        count = int(rng.choice([0, 1, 2, 50, 51, 1000]))
        state.count.fill_(count)
        model.count = count
        post_misses(state, address_of(mailbox), 50)
        reference_mailbox.post_misses(model, model_mailbox, 50)
        wait_for_device(device)
        assert as_dict(state) == dataclasses.asdict(model)
        np.testing.assert_array_equal(mailbox, model_mailbox)


def test_a_step_without_misses_is_ready_and_leaves_the_mailbox_alone(device: torch.device) -> None:
    state = new_state(device)
    mailbox = host_bytes(192).view(np.int64)
    post_misses(state, address_of(mailbox), 8)
    wait_for_device(device)
    assert (int(state.step), int(state.ready), int(state.posted), state.batch_counts.tolist()) == (1, 1, 0, [1, 1])
    assert (mailbox == POISON_INT64).all()


def test_a_step_with_misses_asks_and_is_not_ready(device: torch.device) -> None:
    state = new_state(device)
    state.step.fill_(41)
    state.ready.fill_(41)
    state.count.fill_(3)
    mailbox = host_bytes(192).view(np.int64)
    post_misses(state, address_of(mailbox), 8)
    wait_for_device(device)
    assert (int(state.step), int(state.ready), int(state.posted), int(state.count)) == (42, 41, 3, 0)
    assert mailbox[[0, 1]].tolist() == [42, 3]
    assert (np.delete(mailbox, [0, 1]) == POISON_INT64).all()


@pytest.mark.parametrize("count", [0, 3])
def test_a_token_id_outside_the_vocabulary_is_told_to_the_host(device: torch.device, count: int) -> None:
    state = new_state(device)
    outside = torch.zeros(1, dtype=torch.int64, device=device)
    mailbox = host_words(24)
    for place in (0, 77, 77, 0):
        state.count.fill_(count)
        outside.fill_(place)
        post_misses(state, address_of(mailbox), 8, outside)
        wait_for_device(device)
        assert mailbox[17] == (77 if int(state.step) > 1 else 0)  # the host takes it away, nobody else
        assert int(outside) == 0  # and is told once


def test_more_misses_than_the_list_holds_are_told_to_the_host(device: torch.device) -> None:
    state = new_state(device)
    state.count.fill_(9)
    mailbox = host_words(24)
    post_misses(state, address_of(mailbox), 8)
    wait_for_device(device)
    assert int(state.posted) == 8  # what may be scattered
    assert mailbox[1] == 9  # which the host refuses


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 100])
def test_pairs_without_a_key_are_listed_with_their_wanted_row_ids(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, num_tokens: int, native: bool
) -> None:
    if native:
        monkeypatch.setattr(launching, "block_of", native_block_of)
    rng, pairs_max = np.random.default_rng(num_tokens), 60
    keys = rng.choice([-2, -1, 0, KEY_MAX], (num_tokens, 3))
    ids = rng.integers(-5, 100, (num_tokens, 12))
    listed, row_ids = List(device, pairs_max), host_bytes(8 * 4 * (pairs_max + 2)).view(np.int64).reshape(-1, 4)
    there = torch.from_numpy(np.repeat(ids, 2, axis=1)).to(device)[:, ::2]
    list_row_ids(there, (10, 80), torch.from_numpy(keys).to(device), listed.misses, address_of(row_ids))
    found = listed.found()
    loose = np.flatnonzero(keys.reshape(-1) == -2)
    assert int(listed.count) == len(loose)  # also those that found no room
    assert set(found) <= set(loose.tolist())
    assert len(found) == min(len(loose), pairs_max)
    wanted = np.where((ids >= 10) & (ids < 80), ids, -1).reshape(-1, 4)
    np.testing.assert_array_equal(row_ids[: len(found)], wanted[list(found)])
    assert (row_ids[len(found) :] == POISON_INT64).all()
