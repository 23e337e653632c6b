"""The demo: it removes what it made, and nothing else; and its oracle gives the rows that the hash gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from engram_adapter import HashSpec
from tierstore.errors import ConfigError
from tierstore.tools import demo
from tierstore.tools.demo import first_tokens, own_folder, plain_row_ids, windows


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


def test_the_oracles_rows_are_the_hashs_however_a_document_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "engram_layer_ids": [1, 4], "engram_vocab_size": 300, "engram_max_ngram_size": 4, "engram_n_heads": 3,
        "engram_head_dim": 32, "engram_pad_token_id": 2, "vocab_size": 61,
    }  # fmt: skip
    spec = HashSpec.from_config(config, np.arange(61, dtype=np.int32) % 40)
    monkeypatch.setattr(demo, "WINDOW_TOKENS", 7)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 61, length) for length in (20, 1, 7, 9)]
    for layer in spec.layers:
        parts = [spec.row_ids(ids.numpy(), layer, before.numpy())[0] for ids, before in windows(documents, 30, 3)]
        expected = np.concatenate([plain_row_ids(part, spec, layer) for part in first_tokens(documents, 30)])
        np.testing.assert_array_equal(np.concatenate(parts), expected)
