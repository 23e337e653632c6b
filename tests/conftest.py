"""Fixtures shared by all tests. The optional folder `shared/data` lies beside the repository.

Loads no torch, and what is heavy only in the fixture that needs it: a run of a file that needs neither starts at once.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

# Tests import `support` and `contract`, and parts of each other as `tests.FOLDER.FILE`. None of the folders is on the
# path: kernels/ and tools/ would be found there, by transformers for one, which takes any `kernels` for the Hub's.
TESTS = Path(__file__).resolve().parent
FOLDERS = {"tests": TESTS, "support": TESTS / "support", "contract": TESTS / "contract"}
FOLDERS["builder"] = TESTS.parent / "docs" / "builder"  # of the documentation
for name, folder in FOLDERS.items():
    sys.modules.setdefault(name, ModuleType(name)).__path__ = [str(folder)]
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() not in (TESTS, TESTS.parent)]

from support.device import INTERPRET, has_gpu  # noqa: E402
from support.marks import MARKERS, excluded_by, marks_by_use, marks_of  # noqa: E402
from support.repository import REPOSITORY  # noqa: E402

if TYPE_CHECKING:
    from support.stores import Model
    from support.text_store import TextStore


if not has_gpu():
    os.environ[INTERPRET] = "1"  # before anything loads triton, as transformers does


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Does not even load a file of which `-m` takes nothing: many load torch, transformers or triton, for seconds."""
    if collection_path.is_relative_to(TESTS):
        return True if marks_of(collection_path.relative_to(TESTS)) & excluded_by(config.option.markexpr) else None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        function = inspect.unwrap(item.function)
        for name in marks_of(item.path.relative_to(TESTS)) | marks_by_use(function, item.fixturenames):
            item.add_marker(name)


def pytest_collection_finish() -> None:
    """What is imported by now stays: so a collection of garbage, of which tests make many, takes milliseconds."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Without a test of hypothesis, its plugin would load it here, for a second, to report nothing."""
    plugins = session.config.pluginmanager
    if "hypothesis" not in sys.modules and plugins.has_plugin("hypothesispytest"):
        plugins.unregister(name="hypothesispytest")


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


@pytest.fixture(scope="session")
def in_place_built(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store in place of `model`, its scales copied. Tests must not change it."""
    store = tmp_path_factory.mktemp("in_place") / "store"
    model.build(store, in_place=True, shard_bytes=65536)
    return store


@pytest.fixture(scope="session")
def in_place_placed(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a placement. Tests must not change it."""
    from support.stores import place_some

    store = tmp_path_factory.mktemp("in_place_placed") / "store"
    model.build(store, in_place=True, shard_bytes=65536)
    place_some(store)
    return store


@pytest.fixture
def own_store(built: Path, tmp_path: Path) -> Path:
    """A finished store that a test may damage: a copy of `built`, since building one anew waits for the disk."""
    return Path(shutil.copytree(built, tmp_path / "own"))


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
