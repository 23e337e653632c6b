"""What tests of a training share: a small checkpoint, its store, and a copy of the store for each test.

A file says how large they are: NUM_ROWS of each table, and CODECS, by table.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.trainable import Trainable, make_trainable


@pytest.fixture(scope="module")
def trainable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainable:
    asked = request.module
    return make_trainable(tmp_path_factory.mktemp("trainable"), num_rows=asked.NUM_ROWS, codecs=asked.CODECS)


@pytest.fixture(scope="module")
def built(trainable: Trainable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("built") / "store"
    trainable.model.build(store)
    return store


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "store"))
