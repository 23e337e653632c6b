"""A published commit is what readers get: its values in the tables' codecs, all of them, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.trainable import CODECS, Trainable, make_trainable, values_of

import tierstore
from tierstore.formats.catalog import read_catalog
from tierstore.spec import codec_scale
from tierstore.training import publish as publishing
from tierstore.training.optimizers import Optimizer
from tierstore.training.publish import publish
from tierstore.training.training import Training

NUM_ROWS, DIM = 300, 32
OPTIMIZERS = [
    tierstore.SGD(lr=0.5),
    tierstore.RowWiseAdagrad(lr=0.1),
    tierstore.LazyAdam(lr=0.05),
    tierstore.DenseAdam(lr=0.05),
]


def built(folder: Path, codecs: dict[str, str] | None = None) -> tuple[Trainable, Path]:
    made = make_trainable(folder / "model", NUM_ROWS, DIM, codecs=codecs)
    made.model.build(folder / "store")
    return made, folder / "store"


def step(training: Training, rng: np.random.Generator, num_rows: int = 40) -> np.ndarray:
    """One step of every table for the same rows; returns them."""
    row_ids = rng.permutation(NUM_ROWS)[:num_rows]
    for table in training.tables.values():
        table.gather(row_ids)
        table.apply(row_ids, rng.standard_normal((num_rows, DIM)).astype(np.float32))
    return row_ids


def values_now(training: Training) -> dict[str, np.ndarray]:
    return {name: table.gather(np.arange(NUM_ROWS)) for name, table in training.tables.items()}


def rows_served(store: Path, version: int | None = None) -> dict[str, np.ndarray]:
    with tierstore.open(store, "4MiB", version=version) as opened:
        return {name: table.rows(np.arange(NUM_ROWS)) for name, table in opened.tables.items()}


def check(served: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
    """Compares rows with values: exactly where a codec has them, within half a step where it rounds."""
    for name, rows in served.items():
        wanted, codec = values[name], CODECS[name]
        found = values_of(rows, codec, DIM)
        if codec == "fp32":
            np.testing.assert_array_equal(found, wanted)
        elif codec == "fp16":
            np.testing.assert_array_equal(found, wanted.astype(np.float16).astype(np.float32))
        elif codec == "bf16":
            assert (np.abs(found - wanted) <= np.abs(wanted) * 2.0**-8).all()
        else:  # 3 bits of mantissa; below the least normal number of a block's scale, a fixed step
            if name == "factor":  # what is beyond the largest value becomes it
                wanted = np.clip(wanted, -448 * codec_scale(codec), 448 * codec_scale(codec))
            largest = np.abs(wanted).max(axis=1, keepdims=True)
            assert (np.abs(found - wanted) <= np.maximum(np.abs(wanted) * 2.0**-4, largest * 2.0**-6 + 1e-3)).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: each.rule)
def test_readers_of_a_version_get_the_commits_values(tmp_path: Path, optimizer: Optimizer) -> None:
    made, store = built(tmp_path)
    rng = np.random.default_rng(1)
    values, touched = [made.values], np.zeros(NUM_ROWS, dtype=bool)
    with tierstore.open_training(store, optimizer, dram="16MiB") as training:
        for version in (1, 2):
            touched[step(training, rng)] = True
            touched[step(training, rng)] = True
            training.commit(version).wait()
            values.append(values_now(training))
            assert training.publish() == version
            later = step(training, rng)  # of the next version, if any
            touched[later] |= version < 2
    base = rows_served(store, 0)
    for version in range(3):
        served = rows_served(store, version)
        check(served, values[version])
    for name, rows in served.items():
        np.testing.assert_array_equal(rows[~touched], base[name][~touched])
        assert read_catalog(store).touched[name] <= touched.sum()
    assert tierstore.verify(store).faults == []


def test_rows_that_were_touched_but_did_not_change_are_not_published(tmp_path: Path) -> None:
    _, store = built(tmp_path)
    with tierstore.open_training(store, tierstore.SGD(lr=0.5), dram="16MiB") as training:
        for table in training.tables.values():
            table.apply(np.arange(50), np.zeros((50, DIM), dtype=np.float32))
        training.commit(1).wait()
        assert training.publish() == 0
        report = publish(store)
        assert (report.version, report.is_new, set(report.rows.values())) == (0, False, {0})
        rows = rows_served(store)
        table = training["fp8"]
        table.apply(np.arange(1), np.ones((1, DIM), dtype=np.float32))
        training.commit(2).wait()
        report = publish(store)
        assert (report.version, report.commit, report.rows["fp8"], report.rows["bf16"]) == (1, 2, 1, 0)
        table.apply(np.arange(50), np.ones((50, DIM), dtype=np.float32))
        training.commit(3).wait()
        told: list[tuple[int, int]] = []
        publish(store, on_progress=lambda done, total: told.append((done, total)))
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1] >= 50
    after = rows_served(store)
    np.testing.assert_array_equal(after["fp8"][50:], rows["fp8"][50:])
    assert (after["fp8"][0] != rows["fp8"][0]).any()


def test_after_a_rollback_rows_of_dropped_commits_go_back(tmp_path: Path) -> None:
    made, store = built(tmp_path)
    rng = np.random.default_rng(2)
    with tierstore.open_training(store, tierstore.RowWiseAdagrad(lr=0.1), dram="16MiB") as training:
        step(training, rng)
        training.commit(1).wait()
        first = values_now(training)
        step(training, rng)
        training.commit(2).wait()
        assert training.publish() == 1
        training.rollback(1)
        assert training.publish() == 2
        check(rows_served(store, 2), first)
        training.rollback(0)
        with pytest.raises(tierstore.ConfigError, match="no commit yet"):
            training.publish()
        step(training, rng, 5)
        training.commit(3).wait()
        assert training.publish() == 3
        check(rows_served(store, 3), values_now(training))
    base = rows_served(store, 0)
    unchanged = (values_of(base["fp32"], "fp32", DIM) == made.values["fp32"]).all(axis=1)
    assert unchanged.all()


def test_values_beyond_the_codec_are_counted(tmp_path: Path) -> None:
    _, store = built(tmp_path, {"factor": CODECS["factor"], "fp16": "fp16"})
    with tierstore.open_training(store, tierstore.SGD(lr=1.0), dram="16MiB") as training:
        for table in training.tables.values():
            table.apply(np.array([3]), np.full((1, DIM), -1e6, dtype=np.float32))
        training.commit(1).wait()
    report = publish(store)
    assert report.saturated == {"factor": DIM, "fp16": DIM}
    assert report.not_numbers == {"factor": 0, "fp16": 0}


def test_only_kept_commits_can_be_published(tmp_path: Path) -> None:
    _, store = built(tmp_path, {"fp32": "fp32"})
    with pytest.raises(tierstore.ConfigError, match="never trained"):
        publish(store)
    with tierstore.open_training(store, tierstore.SGD(lr=0.5), dram="16MiB") as training:
        with pytest.raises(tierstore.ConfigError, match="no commit yet"):
            training.publish()
        step(training, np.random.default_rng(0))
        training.commit(1).wait()
        with pytest.raises(tierstore.ConfigError, match="no commit 7"):
            publish(store, 7)


def test_commits_that_are_forgotten_while_one_is_published_are_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = built(tmp_path, {"fp32": "fp32"})
    rng = np.random.default_rng(3)
    with tierstore.open_training(store, tierstore.SGD(lr=0.1), dram="16MiB") as training:
        for number in (1, 2):
            step(training, rng)
            training.commit(number).wait()
        training.pin(2)
        assert publish(store, 2).version == 1
        training.rollback(1)  # the next commit lacks the runs of the one that was published
        step(training, rng)
        training.commit(3).wait()
        wanted, write = values_now(training), publishing._publish

        def forget_first(*arguments: Any) -> publishing.PublishReport:
            training.unpin(2)
            for number in (4, 5):
                step(training, rng)
                training.commit(number).wait()
            return write(*arguments)

        monkeypatch.setattr(publishing, "_publish", forget_first)
        assert training.publish() == 2
    check(rows_served(store, 2), wanted)
