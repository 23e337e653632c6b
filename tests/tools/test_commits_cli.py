"""`tierstore commits`: what it lists, what it pins, what it says of a commit that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.training_runs import Trained, make_training

from tierstore.errors import ConfigError, FormatError
from tierstore.tools.commits import command
from tierstore.training.commits import read_training


def run(store: Path, *options: str) -> Result:
    return CliRunner().invoke(command, [str(store), *options])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    trained = Trained(make_training(tmp_path / "store"))
    for step in (10, 20):
        trained.spill("a", 100)
        trained.spill("b", 50)
        trained.commit(step, payload=b"abc")
    return trained.store


def test_commits_are_listed_with_what_they_hold(store: Path) -> None:
    first, second = json.loads(run(store, "--json").output)
    assert (first["commit"], first["step"], first["current"], first["pinned"]) == (1, 10, False, False)
    assert second["current"] is True
    assert second["records"] == {"a": 200, "b": 100}
    assert second["runs"] == {"a": 2, "b": 2}
    assert second["payload_bytes"] == 3
    assert second["missing"] == []
    sizes = {path.name: path.stat().st_size for path in (store / "training").iterdir()}
    assert second["num_bytes"] == sum(sizes.values())
    assert second["own_bytes"] == sum(size for name, size in sizes.items() if name[:8] in ("00000003", "00000004"))
    assert first["own_bytes"] == 0
    shown = run(store).output
    assert "current" in shown
    assert second["digest"][:8] in shown


def test_a_commit_is_pinned_and_unpinned(store: Path) -> None:
    assert [of["pinned"] for of in json.loads(run(store, "--pin", "1", "--json").output)] == [True, False]
    records = read_training(store)
    assert records is not None
    assert records.pins == {1}
    assert [of["pinned"] for of in json.loads(run(store, "--unpin", "1", "--json").output)] == [False, False]


def test_a_commit_that_was_not_pinned_is_said_to_be_so(store: Path) -> None:
    assert "commit 1 was not pinned" in run(store, "--unpin", "1").stderr
    run(store, "--pin", "1")
    assert run(store, "--unpin", "1").stderr == ""


def test_a_checkpoints_folder_is_no_store_without_commits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    error = run(tmp_path).exception
    assert isinstance(error, FormatError)
    assert f"make a store of it: tierstore build {tmp_path} NEW_STORE" in str(error)


def test_a_commit_that_is_not_there_is_named(store: Path) -> None:
    assert isinstance(run(store, "--pin", "7").exception, ConfigError)
    assert "there is no commit 7; there are: 1, 2" in str(run(store, "--pin", "7").exception)


def test_a_missing_file_is_listed(store: Path) -> None:
    (store / "training" / "00000003-a.run").unlink()
    assert json.loads(run(store, "--json").output)[1]["missing"] == ["training/00000003-a.run"]
    assert "1 files are missing" in " ".join(run(store).output.split())


def test_a_store_without_commits_says_so(tmp_path: Path) -> None:
    assert "has no commits" in run(make_training(tmp_path / "store")).output
