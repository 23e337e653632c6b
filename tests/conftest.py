"""Fixtures shared by all tests. What lies in the folder `shared/data` beside the
repository is used only where it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.repository import REPOSITORY
from support.stores import Model, make_model, place_some
from support.text_store import TextStore, make_text_store

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything loads triton, as transformers does


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the optional folder {folder.name} beside the repository is not there")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def built(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of `model`, in shards of 64 KiB. Tests must not change it; see `own_store`."""
    store = tmp_path_factory.mktemp("built") / "store"
    model.build(store, shard_bytes=65536)
    return store


@pytest.fixture(scope="session")
def placed(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of `model` with a placement of some of the keys that tests draw. Tests must not change it."""
    store = tmp_path_factory.mktemp("placed") / "store"
    model.build(store, shard_bytes=65536)
    place_some(store)
    return store


@pytest.fixture
def own_store(model: Model, tmp_path: Path) -> Path:
    """A finished store that a test may damage."""
    model.build(tmp_path / "own", shard_bytes=65536)
    return tmp_path / "own"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextStore:
    """A store with a trace and a profile of real text. Tests must not change it; see `own`."""
    return make_text_store(tmp_path_factory.mktemp("text"))


@pytest.fixture
def own(text: TextStore, tmp_path: Path) -> Path:
    """A store of `text` in which a test may place entries."""
    return text.copy(tmp_path / "own.tier")


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """For tests that set up logging for the whole process: afterwards it is what it was."""
    logger = logging.getLogger("tierstore")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
