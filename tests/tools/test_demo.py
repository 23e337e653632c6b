"""The demo's own folder: it removes what it made, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tierstore.errors import ConfigError
from tierstore.tools import demo
from tierstore.tools.demo import own_folder


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that a demo worked in; the work itself is a file in each of its two folders."""
    folders: list[Path] = []

    def work(folder: Path) -> bool:
        for name in ("checkpoint", "store"):
            (folder / name).mkdir()
            (folder / name / "file").touch()
        folders.append(folder)
        return True

    monkeypatch.setattr(demo, "demo", work)
    return folders


def run_demo(folder: Path) -> tuple[int, str]:
    result = CliRunner().invoke(demo.command, ["--folder", str(folder)])
    return result.exit_code, result.output


@pytest.mark.parametrize("kept", ["thesis.tex", "checkpoint/model.safetensors", "store"])
def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(
    tmp_path: Path, worked: list[Path], kept: str
) -> None:
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_text("years of work")
    status, output = run_demo(tmp_path)
    assert status == 1
    assert "no demo made" in output
    assert not worked
    assert (tmp_path / kept).read_text() == "years of work"
    with pytest.raises(ConfigError, match="is a file"), own_folder(tmp_path / kept):
        pass


def test_a_new_folder_is_removed_and_an_empty_one_stays_empty(tmp_path: Path, worked: list[Path]) -> None:
    (tmp_path / "empty").mkdir()
    assert run_demo(tmp_path / "new" / "folder")[0] == 0
    assert run_demo(tmp_path / "empty")[0] == 0
    assert worked == [tmp_path / "new" / "folder", tmp_path / "empty"]
    assert not (tmp_path / "new" / "folder").exists()
    assert not list((tmp_path / "empty").iterdir())


def test_what_a_killed_demo_left_is_cleared_and_what_others_put_there_stays(tmp_path: Path, worked: list[Path]) -> None:
    with own_folder(tmp_path / "demo"):
        (tmp_path / "demo" / "store").mkdir()
        left = sorted(entry.name for entry in (tmp_path / "demo").iterdir())
    (tmp_path / "demo").mkdir()
    for name in left:
        (tmp_path / "demo" / name).mkdir() if name == "store" else (tmp_path / "demo" / name).touch()
    (tmp_path / "demo" / "notes").write_text("kept")
    assert run_demo(tmp_path / "demo")[0] == 0
    assert len(worked) == 1
    assert [entry.name for entry in (tmp_path / "demo").iterdir()] == ["notes"]


def test_a_demo_that_fails_leaves_its_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> bool:
        (folder / "checkpoint").mkdir()
        raise ConfigError("the disk is full")

    monkeypatch.setattr(demo, "demo", fail)
    status, output = run_demo(tmp_path / "demo")
    assert (status, output) == (1, "Error: the disk is full\n")
    assert not (tmp_path / "demo").exists()
