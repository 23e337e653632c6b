"""What `tierstore bench gpu` looks up in: tables of random entries, in device memory and in page-locked host memory.

Input: a device, a generator, how many entries. Output: an index over random keys and entries of random bytes, as the
kernels take them, and batches of keys. Entries are made where they lie: gigabytes of them cost neither disk nor time.

Shapes: N tokens, O = 3 orders, an entry of E bytes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

from tierstore import kernels
from tierstore.kernels.gpu.codecs import BYTES, RowCodec
from tierstore.kernels.gpu.gather import EntrySources
from tierstore.kernels.gpu.misses import MissList, StepState
from tierstore.kernels.gpu.probe import DeviceIndex
from tierstore.spec import KEY_MAX
from tierstore.tiers.hbm.device import PinnedMemory

from ..stores import ORDERS

NUM_ORDERS = len(ORDERS)
DANGLING = 3  # keys whose place no source has
FILL_BYTES = 64 << 20  # of random bytes that are made at once for host memory
KEYS_A_BUCKET = 3.5
KEYS_A_FULL_BUCKET = 4.6  # of five: many entries are displaced into the buckets behind theirs


LockedT = TypeVar("LockedT", bound="Locked")


class CheckError(Exception):
    """What a kernel gave is not what it must give."""


class Locked:
    """Owns page-locked memory, until it is left as a context."""

    device: torch.device
    _pinned: PinnedMemory

    def __enter__(self: LockedT) -> LockedT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlocks the memory, when the device has done what it was given."""
        wait_for(self.device)
        self._pinned.close()


class RandomTable(Locked):
    """Entries at places 0 .. num_slots - 1 on the device, then num_records in page-locked memory,
    and an index over all of them.

    keys, places: by order, int64 each. The index's current area is of a random parity;
    the other has the same keys at place 0.
    """

    def __init__(
        self,
        device: torch.device,
        random: np.random.Generator,
        codec: RowCodec,
        num_slots: int,
        num_records: int,
        keys_a_bucket: float = KEYS_A_BUCKET,
    ) -> None:
        self.device, self._random, self._codec = device, random, codec
        generator = torch.Generator(device).manual_seed(int(random.integers(2**31)))
        stride = -(-codec.entry_bytes // 16) * 16
        self.slots = torch.empty((num_slots, stride), dtype=torch.uint8, device=device)
        self.slots.view(-1).random_(0, 256, generator=generator)
        record_bytes = -(-codec.entry_bytes // 8) * 8 + kernels.RECORD_TRAILER.itemsize
        self._pinned = PinnedMemory(device, max(64, num_records * record_bytes))
        self.records: np.ndarray = self._pinned.block[: num_records * record_bytes].reshape(num_records, record_bytes)
        fill_random(self.records.reshape(-1), device, generator)
        address = self.records.ctypes.data if num_records else 0
        self.sources = EntrySources(self.slots, address, record_bytes, num_records)
        self._place(num_slots + num_records, keys_a_bucket)

    def _place(self, num_entries: int, keys_a_bucket: float) -> None:
        """Gives every place a key of some order, and some keys a place that there is not."""
        random = self._random
        places = random.permutation(num_entries + DANGLING)
        keys = distinct_keys(random, len(places))
        keys[:2] = 0, KEY_MAX
        self.places, self.keys = np.array_split(places, NUM_ORDERS), np.array_split(keys, NUM_ORDERS)
        self.epoch, self.heads = int(random.integers(100)), np.zeros((2, NUM_ORDERS, 2), dtype=np.int64)
        areas, start = [], 0
        for area in (0, 1):
            for order, of_order in enumerate(self.keys):
                buckets = np.empty((int(len(of_order) // keys_a_bucket) + 1, 64), dtype=np.uint8)
                at = self.places[order] if area == self.epoch % 2 else np.zeros(len(of_order))
                assert kernels.index_entries(of_order, at.astype(np.uint32), buckets), "there is room for every key"
                self.heads[area, order] = start, len(buckets)
                areas.append(buckets)
                start += len(buckets)
        self.buckets = np.concatenate(areas)
        self._room, on_device = aligned(torch.from_numpy(self.buckets), self.device)
        epoch = torch.tensor([self.epoch], dtype=torch.int64, device=self.device)
        self.index = DeviceIndex(epoch, torch.from_numpy(self.heads).to(self.device), on_device)

    @property
    def num_places(self) -> int:
        """How many entries there are."""
        return len(self.slots) + len(self.records)

    def held(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns random keys that have an entry, int64 [N, O], and its place, int64 [N, O]; on the device."""
        keys, places = np.empty((2, num_tokens, NUM_ORDERS), dtype=np.int64)
        for order in range(NUM_ORDERS):
            there = np.flatnonzero(self.places[order] < self.num_places)
            drawn = there[self._random.integers(len(there), size=num_tokens)]
            keys[:, order], places[:, order] = self.keys[order][drawn], self.places[order][drawn]
        return torch.from_numpy(keys).to(self.device), torch.from_numpy(places).to(self.device)

    def mixed(self, num_tokens: int) -> np.ndarray:
        """Returns keys of the index, of another order's, of none, and -1, many of them twice; int64 [N, O]."""
        random = self._random
        keys = np.empty((num_tokens, NUM_ORDERS), dtype=np.int64)
        for order in range(NUM_ORDERS):
            choices = [random.choice(self.keys[at % NUM_ORDERS], num_tokens) for at in (order, order, order + 1)]
            choices += [random.integers(0, KEY_MAX, num_tokens, endpoint=True), np.full(num_tokens, -1)]
            keys[:, order] = np.choose(random.integers(len(choices), size=num_tokens), choices)
        return keys


class StepMemory(Locked):
    """What one lookup's step keeps: its words on the device, and a block in page-locked memory, poisoned.

    words: int64 [24] of the block, 0 at first; keys, pairs: where misses are listed,
    with room for twice as many as are allowed.
    """

    def __init__(self, device: torch.device, pairs_max: int) -> None:
        self.device, self.pairs_max = device, pairs_max
        self._pinned = PinnedMemory(device, 192 + 24 * (pairs_max + 8))
        block = self._pinned.block
        block[:] = 0xA5
        self.words = block[:192].view(np.int64)
        self.words[:] = 0
        self.keys = block[192 : 192 + 16 * (pairs_max + 8)].view(np.int64)
        self.pairs = block[192 + 16 * (pairs_max + 8) : 192 + 24 * (pairs_max + 8)].view(np.int32)
        self.address: int = block.ctypes.data
        words = torch.zeros(7, dtype=torch.int64, device=device)
        self.state = StepState(words[0:1], words[1:2], words[2:3], words[3:4], words[4:5], words[5:7])
        self.misses = MissList(self.state.count, self.keys.ctypes.data, self.pairs.ctypes.data, pairs_max)

    def listed(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns pairs and keys of the misses, by pair. Raises `CheckError` where
        something was written behind them."""
        wait_for(self.device)
        stored = min(int(self.state.count), self.pairs_max)
        behind = self.keys[stored:].view(np.uint8), self.pairs[stored:].view(np.uint8)
        if any((part != 0xA5).any() for part in behind):
            raise CheckError(f"something was written behind the {stored} misses of the list")
        by_pair = np.argsort(self.pairs[:stored], kind="stable")
        return self.pairs[:stored][by_pair], self.keys[:stored][by_pair]


def distinct_keys(random: np.random.Generator, count: int) -> np.ndarray:
    """Returns keys that all differ, in no order; none is 0 or the greatest."""
    keys = np.unique(random.integers(1, KEY_MAX, count + 64))
    return random.permutation(keys)[:count]


def fill_random(memory: np.ndarray, device: torch.device, generator: torch.Generator) -> None:
    """Fills host memory, uint8 [n], with bytes that the device draws."""
    for start in range(0, len(memory), FILL_BYTES):
        part = memory[start : start + FILL_BYTES]
        drawn = torch.empty(len(part), dtype=torch.uint8, device=device).random_(0, 256, generator=generator)
        torch.from_numpy(part).copy_(drawn)


def aligned(tensor: torch.Tensor, device: torch.device, alignment: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies bytes, uint8 [n, width], to an address of the device that is a multiple; returns what keeps it,
    and them."""
    room = torch.empty(tensor.numel() + alignment, dtype=torch.uint8, device=device)
    start = -room.data_ptr() % alignment
    there = room[start : start + tensor.numel()].view(tensor.shape)
    there.copy_(tensor)
    return room, there


def poisoned(num_entries: int, codec: RowCodec, device: torch.device) -> torch.Tensor:
    """Returns an output of `codec` in which every byte is 0x5a."""
    if codec.kind == BYTES:
        return torch.full((num_entries, codec.entry_bytes), 0x5A, dtype=torch.uint8, device=device)
    shape = (num_entries, codec.rows_per_entry, codec.dim)
    return torch.full(shape, 0x5A5A, dtype=torch.int16, device=device).view(torch.bfloat16)


def patterns(out: torch.Tensor) -> np.ndarray:
    """Returns an output bit by bit: uint8, or the uint16 patterns of bfloat16 values."""
    if out.dtype == torch.uint8:
        return np.asarray(out.cpu().numpy())
    return np.asarray(out.view(torch.int16).cpu().numpy().view(np.uint16))


def check_same(what: str, found: Any, expected: Any) -> None:
    """Raises `CheckError` where two arrays are not the same, element by element."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        raise CheckError(f"{what}: {list(found.shape)} were given, {list(expected.shape)} are right")
    wrong = np.argwhere(found != expected)
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise CheckError(
            f"{what}: {len(wrong)} of {found.size} are wrong, the first at {list(at)}: {found[at]}, "
            f"right is {expected[at]}"
        )


def wait_for(device: torch.device) -> None:
    """Blocks until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
