"""Fixtures shared by all tests. The optional folder `shared/data` lies beside the repository.

Loads no torch, and what is heavy only in the fixture that needs it: a run of a file that needs neither starts at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.device import INTERPRET, has_gpu
from support.repository import REPOSITORY

if TYPE_CHECKING:
    from support.stores import Model
    from support.text_store import TextStore

if not has_gpu():
    os.environ[INTERPRET] = "1"  # before anything loads triton, as transformers does


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the optional folder {folder.name} beside the repository is not there")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from support.stores import make_model

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
    from support.stores import place_some

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
    from support.text_store import make_text_store

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
