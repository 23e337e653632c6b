"""What happens at the same time: caches that shrink, prefetches while it goes back, commits while it closes, forks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.trainable import Pair, Trainable, make_trainable, tiny_caches

import tierstore
from tierstore import kernels

ADAGRAD = tierstore.RowWiseAdagrad(lr=0.05)


@pytest.fixture(scope="module")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Trainable:
    return make_trainable(tmp_path_factory.mktemp("trainable"), num_rows=300, codecs={"bf16": "bf16"})


@pytest.fixture(scope="module")
def built(trainable: Trainable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("built") / "store"
    trainable.model.build(store)
    return store


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "store"))


def test_a_step_in_parts_changes_every_row_while_the_cache_gives_up_slots(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_caches(monkeypatch, 64, 4)
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    rows = pair.training["bf16"].rows
    bring = rows.bring

    def bring_and_shrink(row_ids: np.ndarray, pins: kernels.RowPins) -> None:
        bring(row_ids, pins)
        rows.num_slots = max(40, rows.num_slots - 4)  # as the writer's thread does

    monkeypatch.setattr(rows, "bring", bring_and_shrink)
    pair.steps(1, 200)
    assert pair.training["bf16"].num_steps == 1
    pair.check_all()
    pair.training.close()
