"""A step from keys to rows: what the device holds at once, what it misses from the host,
and nothing false where that fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gpu_inputs import CODECS, Sources, decoded, index_of, patterns, poisoned_out
from support.host_memory import address_of, host_bytes, wait_for_device

from tierstore.kernels.gpu import mailbox
from tierstore.kernels.gpu.await_answer import await_answer
from tierstore.kernels.gpu.lookup import lookup_entries
from tierstore.kernels.gpu.misses import MissList, StepState, post_misses
from tierstore.kernels.gpu.scatter import scatter_entries

NUM_TOKENS, ORDERS, PAIRS_MAX = 7, 3, 21
CODEC = CODECS["scaled-264x8"]
KEYS_START = 192
PAIRS_START = KEYS_START + 8 * PAIRS_MAX
ENTRIES_START = -(-(PAIRS_START + 4 * PAIRS_MAX) // 64) * 64


class Device:
    """A table of 60 keys: the even ones below 40 on the device, all of them with the host,
    who answers from `entries`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sources = Sources(1, 8, 12, CODEC, device)
        self.index = index_of([{2 * place: place for place in range(20)}] * ORDERS, [5] * ORDERS, device).index
        self.entries = np.random.default_rng(2).integers(0, 256, size=(60, CODEC.entry_bytes), dtype=np.uint8)
        self.entries[0:40:2] = self.sources.entries
        self.block = host_bytes(ENTRIES_START + PAIRS_MAX * CODEC.entry_bytes)
        self.block[:KEYS_START] = 0
        self.words = self.block[:KEYS_START].view(np.int64)
        self.address = address_of(self.block)
        words = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(5)]
        self.state = StepState(*words, torch.zeros(2, dtype=torch.int64, device=device))
        self.misses = MissList(self.state.count, self.address + KEYS_START, self.address + PAIRS_START, PAIRS_MAX)
        self.counts = torch.zeros(3 * ORDERS + 1, dtype=torch.int64, device=device)

    def answer(self, status: int) -> None:
        """The host's part, once the device has asked."""
        wait_for_device(self.device)
        if self.words[mailbox.REQUESTED.value // 8] == self.words[mailbox.ANSWERED.value // 8]:
            return
        num_misses = int(self.words[mailbox.NUM_MISSES.value // 8])
        keys = self.block[KEYS_START:PAIRS_START].view(np.int64)[:num_misses]
        entries = self.block[ENTRIES_START:].reshape(PAIRS_MAX, CODEC.entry_bytes)
        entries[:num_misses] = self.entries[keys]
        self.words[mailbox.STATUS.value // 8] = status
        self.words[mailbox.ANSWERED.value // 8] = self.words[mailbox.REQUESTED.value // 8]

    def step(self, keys: np.ndarray, status: int = 0, *, answered: bool = True) -> np.ndarray:
        out = poisoned_out(keys.size, CODEC, self.device)
        given = torch.from_numpy(keys).to(self.device)
        lookup_entries(given, self.index, self.sources.sources, CODEC, out, self.misses, self.counts)
        post_misses(self.state, self.address, PAIRS_MAX)
        if answered:
            self.answer(status)
        await_answer(self.state, self.address, 100)
        scatter_entries(self.state, self.address + PAIRS_START, self.address + ENTRIES_START, CODEC, PAIRS_MAX, out)
        wait_for_device(self.device)
        return patterns(out)

    def expected(self, keys: np.ndarray) -> np.ndarray:
        flat = keys.reshape(-1)
        rows = decoded(self.entries[np.maximum(flat, 0)], CODEC)
        rows[flat == -1] = 0
        return rows


def held(keys: np.ndarray) -> np.ndarray:
    return (keys.reshape(-1) < 40) & (keys.reshape(-1) % 2 == 0) | (keys.reshape(-1) == -1)


def test_steps_give_every_row(device: torch.device) -> None:
    random, table = np.random.default_rng(3), Device(device)
    for number in range(1, 9):
        keys = random.integers(-1, 60, size=(NUM_TOKENS, ORDERS))
        if number % 3 == 0:
            keys = random.integers(0, 20, size=(NUM_TOKENS, ORDERS)) * 2  # nothing is missed: the host is not asked
        np.testing.assert_array_equal(table.step(keys), table.expected(keys))
        assert int(table.state.step) == int(table.state.ready) == number
        assert (table.words[mailbox.REQUESTED.value // 8] == number) == (number % 3 != 0)
    assert table.state.batch_counts.tolist() == [8, 2]
    assert int(table.counts.sum()) == 8 * NUM_TOKENS * ORDERS


@pytest.mark.parametrize("how", ["status", "silence"])
def test_a_step_without_its_answer_has_no_false_row_and_the_next_is_whole(device: torch.device, how: str) -> None:
    table = Device(device)
    keys = np.random.default_rng(4).integers(-1, 60, size=(NUM_TOKENS, ORDERS))
    out = table.step(keys, status=1) if how == "status" else table.step(keys, answered=False)
    here = held(keys)
    assert not here.all()
    np.testing.assert_array_equal(out[here], table.expected(keys)[here])
    assert (out[~here] == 0x7FC0).all()
    assert int(table.state.failed) == 1
    np.testing.assert_array_equal(table.step(keys), table.expected(keys))
