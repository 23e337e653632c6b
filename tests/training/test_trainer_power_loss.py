"""A whole training under power loss: it resumes at a commit of one step in all tables, and ends as if undisturbed.

Every operation of a training with two tables, spills among them, is recorded below libc and replayed up to a moment;
what was not synced is kept, lost or torn.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.durable_replay import MARK, crashes, read_log, run_recorded
from support.trainable import in_bits, make_trainable, tiny_caches

import tierstore

NUM_ROWS, NUM_STEPS, STEPS_OF_COMMIT, NUM_SLOTS = 120, 8, 2, 24
RECORD = """
import ctypes
from pathlib import Path
import pytest
from training.test_trainer_power_loss import NUM_SLOTS, train
from support.trainable import tiny_caches
libc = ctypes.CDLL(None)
with pytest.MonkeyPatch.context() as patch:
    tiny_caches(patch, NUM_SLOTS)
    train(Path(sys.argv[1]) / "store", lambda step, _: libc.durable_mark(b"step %d" % step))
"""
Values = dict[str, np.ndarray]


def train(store: Path, committed: Callable[[int, Values], None]) -> Values:
    """Takes what is left of NUM_STEPS steps, always the same; returns all values, and gives them at each commit."""
    with tierstore.open_training(store, tierstore.LazyAdam(lr=0.05), dram="16MiB") as training:
        done = training.commits[-1].step if training.commits else 0
        for step in range(done + 1, NUM_STEPS + 1):
            rng = np.random.default_rng(step)
            for table in training.tables.values():
                row_ids = rng.integers(0, NUM_ROWS, 50)
                table.apply(row_ids, rng.standard_normal((50, table.spec.dim)).astype(np.float32))
            if step % STEPS_OF_COMMIT == 0:
                training.commit(step).wait(60)
                committed(step, values_of(training))
        return values_of(training)


def values_of(training: tierstore.Training) -> Values:
    rows = np.arange(NUM_ROWS)
    return {name: in_bits(table.gather(rows)).copy() for name, table in training.tables.items()}


def equal(one: Values, other: Values) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def check(tmp_path: Path, patch: pytest.MonkeyPatch, num_crashes: int | None) -> None:
    """Looks at some of the crashes, or at all."""
    root, before, log = tmp_path / "disk", tmp_path / "before", tmp_path / "log"
    trainable = make_trainable(tmp_path / "model", NUM_ROWS, codecs={"bf16": "bf16", "fp8": "fp8_e4m3_e8m0x32"})
    root.mkdir()
    trainable.model.build(root / "store")
    shutil.copytree(root, before)
    tiny_caches(patch, NUM_SLOTS)
    states: dict[int, Values] = {}
    at_end = train(Path(shutil.copytree(before, tmp_path / "undisturbed")) / "store", states.__setitem__)
    run_recorded(RECORD, root, log=log)
    operations = read_log(log, root)
    assert sum(operation.what == MARK for operation in operations) == len(states)
    moments = None
    if num_crashes is not None:
        moments = {len(operations), *random.Random(0).sample(range(len(operations)), num_crashes)}
    for done, how, folder in crashes(before, operations, tmp_path / "crashed", moments=moments):
        last = STEPS_OF_COMMIT * sum(operation.what == MARK for operation in operations[:done])
        where = f"after {done} of {len(operations)} operations, what was not synced {how}"
        with tierstore.open_training(folder / "store", tierstore.LazyAdam(lr=0.05), dram="16MiB") as training:
            step = training.commits[-1].step if training.commits else 0
            assert step in (last, last + STEPS_OF_COMMIT), where
            assert step == 0 or equal(values_of(training), states[step]), where
        assert equal(train(folder / "store", lambda *_: None), at_end), where


def test_a_training_resumes_after_power_loss_and_ends_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tmp_path, monkeypatch, num_crashes=4)


@pytest.mark.slow
def test_a_training_resumes_after_power_loss_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, monkeypatch, num_crashes=None)
