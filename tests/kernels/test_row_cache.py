"""The row cache keeps every row's newest record, whatever is evicted, spilled, frozen, pinned or moved meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from tierstore import kernels
from tierstore.tiers.memory import allocate

DIM = 4
RECORD_BYTES = 32
NUM_ROWS = 60
LR = 0.5


def base_record(row_id: int) -> np.ndarray:
    record = np.zeros(RECORD_BYTES // 4, dtype=np.float32)
    record[:DIM] = row_id + np.arange(DIM) / 8
    return record.view(np.uint8)


def new_cache(num_slots: int, num_aside: int = 4, rule: str = "sgd") -> kernels.RowCache:
    block = allocate(kernels.row_cache_bytes(NUM_ROWS, DIM, RECORD_BYTES, num_slots, num_aside))
    optimizer = kernels.Optimizer(rule=rule, eps=1e-8)
    return kernels.RowCache(block, NUM_ROWS, DIM, RECORD_BYTES, num_slots, num_aside, optimizer)


@dataclass
class Walk:
    """A cache, what was written of it, and what plain NumPy says every row is."""

    cache: kernels.RowCache
    rng: np.random.Generator
    written: dict[int, np.ndarray] = field(default_factory=dict)
    values: dict[int, np.ndarray] = field(default_factory=dict)
    write: int = 0
    update: kernels.RowUpdate = field(default_factory=lambda: kernels.RowUpdate(1 << 12))
    frozen: dict[int, np.ndarray] | None = None

    def value(self, row_id: int) -> np.ndarray:
        return self.values.get(row_id, base_record(row_id).view(np.float32)[:DIM])

    def record(self, row_id: int) -> np.ndarray:
        return self.written.get(row_id, base_record(row_id))

    def drain(self, num_records: int, *, finish: bool = True) -> int:
        """Writes dirty records; finish: they can be read at once."""
        out = np.empty((num_records, RECORD_BYTES), dtype=np.uint8)
        row_ids = np.empty(num_records, dtype=np.int64)
        self.write += 1
        count = self.cache.drain(out, row_ids, self.write)
        for row_id, record in zip(row_ids[:count].tolist(), out[:count], strict=True):
            self.written[row_id] = record.copy()
        if finish:
            self.cache.written(row_ids[:count], self.write)
        return count

    def bring(self, rows: np.ndarray, pins: kernels.RowPins) -> bool:
        missing = rows[self.cache.find(rows, pins)]
        while len(missing):
            records = np.stack([self.record(row_id) for row_id in missing.tolist()])
            done = self.cache.put(missing, records, pins)
            missing = missing[done:]
            if len(missing) and self.drain(2) == 0 and self.frozen is not None:
                return False  # what is dirty came after the freeze
        return True

    def step(self, num_references: int, distinct_max: int) -> None:
        pool = self.rng.choice(NUM_ROWS, distinct_max, replace=False)
        row_ids = self.rng.choice(np.append(pool, -1), num_references).astype(np.int64)
        gradients = self.rng.integers(-8, 9, (num_references, DIM)).astype(np.float32)
        place, _ = self.update.begin(row_ids, gradients, None, NUM_ROWS)
        assert place == -1
        pins = self.cache.pins()
        if self.bring(self.update.row_ids, pins):
            what, _ = self.cache.update(self.update, 0, len(self.update), LR)
            while what == "no_room_aside":
                assert self.drain(1) > 0
                what, _ = self.cache.update(self.update, 0, len(self.update), LR)
            assert what == "done"
            for row_id in np.unique(row_ids[row_ids >= 0]).tolist():
                total = gradients[row_ids == row_id].sum(axis=0)
                self.values[row_id] = self.value(row_id) - np.float32(LR) * total
        pins.release()

    def check(self) -> None:
        row_ids = self.rng.integers(-1, NUM_ROWS, 20)
        out = np.full((20, DIM), np.nan, dtype=np.float32)
        missing = set(self.cache.gather(row_ids, out).tolist())
        for place, row_id in enumerate(row_ids.tolist()):
            found = self.record(row_id).view(np.float32)[:DIM] if place in missing else out[place]
            expected = np.zeros(DIM) if row_id < 0 else self.value(row_id)
            np.testing.assert_array_equal(found, expected, f"row {row_id}")

    def freeze(self) -> None:
        if self.frozen is None:
            self.cache.freeze()
            self.frozen = dict(self.values)

    def end_commit(self) -> None:
        """Drains the rest; what is written is then exactly what was frozen."""
        if self.frozen is None:
            return
        while self.drain(3):
            pass
        for row_id, value in self.frozen.items():
            np.testing.assert_array_equal(self.record(row_id).view(np.float32)[:DIM], value, f"frozen row {row_id}")
        self.cache.thaw()
        self.frozen = None


@pytest.mark.parametrize("num_slots", [8, 9, 23, NUM_ROWS])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_walk_finds_every_row_as_plain_arithmetic_has_it(num_slots: int, seed: int) -> None:
    walk = Walk(new_cache(num_slots), np.random.default_rng(seed))
    rng = np.random.default_rng(seed + 100)
    for _ in range(300):
        act = rng.choice(["step", "check", "drain", "freeze", "end", "shrink"], p=[0.4, 0.25, 0.15, 0.1, 0.08, 0.02])
        if act == "step":
            walk.step(int(rng.integers(0, 12)), distinct_max=4)
        elif act == "check":
            walk.check()
        elif act == "drain":
            walk.drain(int(rng.integers(1, 5)))
        elif act == "freeze":
            walk.freeze()
        elif act == "end":
            walk.end_commit()
        elif num_slots < NUM_ROWS:
            slots = walk.cache.counters()["num_slots"]
            walk.cache.shrink(max(8, slots - 1))
    walk.end_commit()
    walk.check()
    counters = walk.cache.counters()
    assert counters["num_rows"] <= counters["num_slots"] <= num_slots
    assert (counters["evicted"] > 0) == (num_slots < NUM_ROWS)


def test_a_frozen_record_that_changes_is_drained_as_it_was() -> None:
    walk = Walk(new_cache(NUM_ROWS), np.random.default_rng(0))
    for _ in range(4):
        walk.step(12, distinct_max=8)
    walk.freeze()
    for _ in range(8):  # with four records aside, some steps drain first
        walk.step(4, distinct_max=4)
    assert walk.cache.counters()["put_aside"] > 0
    walk.end_commit()
    walk.check()


def test_a_freeze_of_nothing_drains_nothing_that_comes_later() -> None:
    walk = Walk(new_cache(NUM_ROWS), np.random.default_rng(0))
    walk.freeze()
    walk.step(12, distinct_max=8)
    assert walk.drain(8) == 0
    walk.end_commit()
    assert walk.drain(8) > 0


def test_a_record_that_is_being_written_keeps_its_slot() -> None:
    cache = new_cache(8)
    walk = Walk(cache, np.random.default_rng(0))
    walk.step(30, distinct_max=8)
    num_dirty = cache.counters()["num_dirty"]
    walk.drain(8, finish=False)
    assert cache.counters()["num_writing"] == num_dirty
    others = np.array([row for row in range(NUM_ROWS) if row not in walk.values])
    records = np.stack([base_record(row) for row in others.tolist()])
    assert cache.put(others, records) == 8 - num_dirty
    cache.written(np.array(sorted(walk.values)), walk.write)
    assert cache.counters()["num_writing"] == 0
    assert cache.put(others[8 - num_dirty :], records[8 - num_dirty :]) > 0


def test_a_sum_that_is_not_finite_changes_no_row() -> None:
    walk = Walk(new_cache(NUM_ROWS), np.random.default_rng(0))
    walk.step(12, distinct_max=8)
    gradients = np.ones((3, DIM), dtype=np.float32)
    gradients[1, 2] = np.nan
    walk.update.begin(np.array([3, 5, 9]), gradients, None, NUM_ROWS)
    pins = walk.cache.pins()
    walk.bring(walk.update.row_ids, pins)
    steps = walk.cache.num_steps
    assert walk.cache.update(walk.update, 0, 3, LR) == ("not_finite", 1)
    assert walk.update.find_not_finite() == 1
    assert walk.cache.num_steps == steps
    walk.check()


def test_pinned_rows_are_never_evicted_and_end_with_their_owner() -> None:
    cache = new_cache(8)
    records = np.stack([base_record(row) for row in range(NUM_ROWS)])
    pins = cache.pins()
    assert cache.put(np.arange(5), records[:5], pins) == 5
    assert cache.put(np.arange(10, 40), records[10:40]) == 30
    assert not len(cache.find(np.arange(5)))
    assert cache.counters()["num_pinned"] == 5
    del pins
    assert cache.counters()["num_pinned"] == 0
    cache.put(np.arange(40, 60), records[40:60])
    assert len(cache.find(np.arange(5))) == 5


def test_rows_used_again_outlive_rows_seen_once() -> None:
    cache = new_cache(16)
    records = np.stack([base_record(row) for row in range(NUM_ROWS)])
    out = np.empty((4, DIM), dtype=np.float32)
    cache.put(np.arange(4), records[:4])
    for start in range(4, 56, 4):
        cache.gather(np.arange(4), out)
        cache.put(np.arange(start, start + 4), records[start : start + 4])
    assert not len(cache.find(np.arange(4)))


def test_a_cleared_cache_is_empty_and_old_pins_are_nothing_to_it() -> None:
    walk = Walk(new_cache(8), np.random.default_rng(0))
    pins = walk.cache.pins()
    walk.bring(np.arange(3), pins)
    walk.step(6, distinct_max=3)
    walk.cache.clear()
    counters = walk.cache.counters()
    assert (counters["num_rows"], counters["num_dirty"], counters["num_pinned"], counters["num_free"]) == (0, 0, 0, 8)
    new_pins = walk.cache.pins()
    walk.cache.put(np.arange(3), np.stack([base_record(row) for row in range(3)]), new_pins)
    pins.release()
    assert walk.cache.counters()["num_pinned"] == 3


def test_wrong_arguments_are_refused_before_anything_is_written() -> None:
    cache = new_cache(8)
    out = np.full((1, DIM), 7, dtype=np.float32)
    for row_ids in (np.array([NUM_ROWS]), np.array([-2])):
        with pytest.raises(ValueError, match="outside the table"):
            cache.gather(row_ids, out)
        with pytest.raises(ValueError, match="outside the table"):
            cache.find(row_ids)
    assert (out == 7).all()
    with pytest.raises(ValueError, match="record_bytes"):
        cache.put(np.array([1]), np.zeros((1, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="cannot shrink"):
        new_cache(NUM_ROWS).shrink(8)
    with pytest.raises(ValueError, match="too small"):
        kernels.RowCache(allocate(64), NUM_ROWS, DIM, RECORD_BYTES, 8, 4, kernels.Optimizer(rule="sgd"))
