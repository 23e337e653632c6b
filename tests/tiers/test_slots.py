"""Static slots against plain dictionaries: whatever is written, indexed and freed, an epoch names what it should,
and no more."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from support.shapes import POISON

from tierstore.kernels import INDEX_BUCKET, INDEX_HEAD, reference, reference_placed
from tierstore.layout import BUCKET_KEYS, record_bytes
from tierstore.tiers.slots import StaticSlots

ENTRY_BYTES, NUM_ORDERS, SEED = 20, 3, 77

Pair = tuple[int, int]  # order index, key


def make_slots(num_slots: int, capacity: int) -> StaticSlots:
    def area() -> np.ndarray:
        num_buckets = int(num_slots / BUCKET_KEYS) + NUM_ORDERS
        return np.full((num_buckets, INDEX_BUCKET.itemsize), POISON, dtype=np.uint8)

    def head() -> np.ndarray:
        return np.full(INDEX_HEAD.itemsize, POISON, dtype=np.uint8)

    records = np.full((num_slots, record_bytes(ENTRY_BYTES)), POISON, dtype=np.uint8)
    return StaticSlots(records, (head(), head()), (area(), area()), NUM_ORDERS, ENTRY_BYTES, capacity)


@functools.cache
def entry_of(pair: Pair) -> bytes:
    return np.random.default_rng([pair[0], pair[1] >> 32, pair[1] & 0xFFFFFFFF]).bytes(ENTRY_BYTES)


def write(slots: StaticSlots, pairs: list[Pair]) -> list[int]:
    order_index = np.array([order for order, _ in pairs], dtype=np.uint8)
    keys = np.array([key for _, key in pairs], dtype=np.int64)
    entries = np.frombuffer(b"".join(map(entry_of, pairs)), dtype=np.uint8).reshape(-1, ENTRY_BYTES)
    places = slots.write(order_index, keys, entries, SEED)
    assert places.base is None  # who keeps them does not keep those of all free slots
    written: list[int] = places.tolist()
    return written


def found_in(slots: StaticSlots, epoch: int, pairs: list[Pair]) -> dict[Pair, int]:
    """Which of the pairs the index of an epoch's parity names, and where,
    searched bucket by bucket by the reference."""
    head = slots.heads[epoch % 2].view(INDEX_HEAD)[0]
    found = {}
    for order in range(NUM_ORDERS):
        start, count = int(head["bucket_start"][order]), int(head["num_buckets"][order])
        area = np.ascontiguousarray(slots.areas[epoch % 2][start : start + count])
        mine = [pair for pair in pairs if pair[0] == order]
        places = reference_placed.find_entries(area, np.array([key for _, key in mine], dtype=np.int64)).tolist()
        found |= {pair: place for pair, place in zip(mine, places, strict=True) if place >= 0}
    return found


def assert_holds(slots: StaticSlots, epoch: int, live: dict[Pair, int], all_pairs: list[Pair]) -> None:
    assert found_in(slots, epoch, all_pairs) == live
    for (order, key), slot in live.items():
        record = slots.records[slot].tobytes()
        assert record[:ENTRY_BYTES] == entry_of((order, key))
        assert int.from_bytes(record[24:32], "little") == key
        assert int.from_bytes(record[32:36], "little") == order
        assert int.from_bytes(record[36:], "little") == reference.crc32c(record[:36], SEED)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_two_epochs_at_a_time_name_what_a_dictionary_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_slots = int(rng.integers(2, 60))
    capacity = num_slots - max(1, num_slots // 8)
    slots = make_slots(num_slots, capacity)
    keys = [0, 2**63 - 1, *rng.integers(0, 2**63 - 1, 40).tolist()]
    all_pairs = [(order, key) for order in range(NUM_ORDERS) for key in keys]  # equal keys in different orders
    live: dict[Pair, int] = {}
    before: dict[Pair, int] = {}
    for epoch in range(1, 14):
        num_free = num_slots - len(live)
        assert slots.num_free == num_free
        strangers = [all_pairs[i] for i in rng.permutation(len(all_pairs)) if all_pairs[i] not in live]
        new = strangers[: int(rng.integers(0, num_free + 1))]
        places = write(slots, new)
        assert len(set(places) | set(live.values())) == len(places) + len(live)  # nothing that is read was written over
        assert_holds(slots, epoch - 1, live, all_pairs if epoch > 1 else [])
        before, kept = live, [pair for pair in live if rng.random() < 0.7]
        kept = kept[: max(0, capacity - len(new))]
        entered = dict(zip(new, places, strict=True))
        live = dict([*entered.items(), *((pair, before[pair]) for pair in kept)][:capacity])
        mask = np.zeros(num_slots, dtype=bool)
        mask[list(live.values())] = True
        slots.index(epoch, mask)
        slots.live = mask
        assert_holds(slots, epoch, live, all_pairs)
        assert_holds(slots, epoch - 1, before, all_pairs if epoch > 1 else [])  # until it is left
        slots.free_dead()
        assert slots.num_live == len(live)
        holding = {
            (int(o), int(k)): i for i, (o, k) in enumerate(zip(slots.order_index, slots.keys, strict=True)) if k >= 0
        }
        assert holding == live


def test_a_full_set_of_one_order_fits_its_index() -> None:
    for num_slots in range(2, 80):
        slots = make_slots(num_slots, num_slots - max(1, num_slots // 8))
        pairs = [(2, key) for key in range(slots.capacity)]
        live = dict(zip(pairs, write(slots, pairs), strict=True))
        slots.index(1, slots.keys >= 0)
        assert found_in(slots, 1, pairs) == live


def test_writing_nothing_changes_nothing() -> None:
    slots = make_slots(8, 7)
    assert write(slots, []) == []
    assert (slots.records == POISON).all()
    slots.index(1, np.zeros(8, dtype=bool))
    assert found_in(slots, 1, [(0, 0), (2, 5)]) == {}


def test_more_than_is_free_and_more_than_capacity_are_mistakes() -> None:
    slots = make_slots(4, 3)
    with pytest.raises(AssertionError, match="free"):
        write(slots, [(0, key) for key in range(5)])
    write(slots, [(0, key) for key in range(4)])
    with pytest.raises(AssertionError):
        slots.index(1, np.ones(4, dtype=bool))


def test_adopted_records_are_held_by_their_trailers_and_damaged_ones_are_free() -> None:
    source, slots = make_slots(6, 5), make_slots(6, 5)
    pairs = [(0, 7), (1, 7), (2, 2**63 - 1), (0, 0)]
    write(source, pairs)
    slots.records[:] = source.records
    slots.records[1, 3] ^= 1
    assert reference_placed.invalidate_bad_records(slots.records[:4], ENTRY_BYTES, SEED) == 1  # as loading does
    slots.adopt(4)
    assert slots.keys.tolist() == [7, -1, 2**63 - 1, 0, -1, -1]
    assert slots.order_index[[0, 2, 3]].tolist() == [0, 2, 0]
    assert slots.num_free == 3
    slots.index(1, slots.keys >= 0)
    assert_holds(slots, 1, {(0, 7): 0, (2, 2**63 - 1): 2, (0, 0): 3}, pairs)
