"""The demo: it removes what it made, and nothing else; and its oracle gives the rows that the hash gives."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from support.text_store import TextStore

import tierstore
from engram_adapter import HashSpec
from tierstore.errors import ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.tools.demo import checks as demo_checks
from tierstore.tools.demo import run as demo
from tierstore.tools.demo.checks import first_tokens, plain_row_ids, windows
from tierstore.tools.demo.run import own_folder


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that a demo worked in; the work itself is a file in each of its folders."""
    folders: list[Path] = []

    def work(folder: Path) -> bool:
        for name in ("checkpoint", "store", "profile"):
            (folder / name).mkdir()
            (folder / name / "file").touch()
        folders.append(folder)
        return True

    monkeypatch.setattr(demo, "demo", work)
    return folders


def run_demo(folder: Path) -> tuple[int, str]:
    result = CliRunner().invoke(demo.command, ["--folder", str(folder)])
    return result.exit_code, result.output


def test_the_report_of_an_earlier_demo_stays_and_does_not_keep_the_next_one_out(
    tmp_path: Path, worked: list[Path]
) -> None:
    (tmp_path / demo.REPORT).write_text("curves")
    for _ in range(2):
        assert run_demo(tmp_path)[0] == 0
    assert len(worked) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [demo.REPORT]
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run_demo(tmp_path)[0] == 1


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
    assert [work.parent for work in worked] == [tmp_path / "new" / "folder", tmp_path / "empty"]
    assert not (tmp_path / "new" / "folder").exists()
    assert not list((tmp_path / "empty").iterdir())


def left_by_a_killed_demo(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch, own_folder(folder) as work:
        patch.setattr(demo, "_remove_work", lambda _: None)
        (work / "store").mkdir()
        return work


def test_the_files_of_a_killed_demo_are_removed(tmp_path: Path, worked: list[Path]) -> None:
    folder = tmp_path / "demo"
    left = left_by_a_killed_demo(folder)
    left.mkdir(parents=True, exist_ok=True)
    (left / demo.MARKER).touch()
    (left / "store").mkdir(exist_ok=True)
    assert run_demo(folder)[0] == 0
    assert len(worked) == 1
    assert worked[0] != left
    assert not folder.exists()


def test_a_store_that_someone_built_beside_a_killed_demos_folder_stays(tmp_path: Path, worked: list[Path]) -> None:
    (tmp_path / "tierstore-demo-abc").mkdir()
    (tmp_path / "tierstore-demo-abc" / demo.MARKER).touch()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "catalog.mdb").write_text("years of work")
    status, output = run_demo(tmp_path)
    assert (status, "holds 1 files that no demo made (store, ...)" in output) == (1, True)
    assert (tmp_path / "store" / "catalog.mdb").read_text() == "years of work"
    assert not worked


def test_what_others_put_into_a_demos_folder_meanwhile_stays(tmp_path: Path) -> None:
    with own_folder(tmp_path / "demo") as work:
        (work / "store").mkdir()
        (work / "notes").write_text("kept")
        (tmp_path / "demo" / "more").write_text("kept")
    assert [file.name for file in sorted((tmp_path / "demo").rglob("*")) if file.is_file()] == ["more", "notes"]


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
    monkeypatch.setattr(demo_checks, "WINDOW_TOKENS", 7)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 61, length) for length in (20, 1, 7, 9)]
    for layer in spec.layers:
        parts = [spec.row_ids(ids.numpy(), layer, before.numpy())[0] for ids, before in windows(documents, 30, 3)]
        expected = np.concatenate([plain_row_ids(part, spec, layer) for part in first_tokens(documents, 30)])
        np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_predicted_and_measured_stand_side_by_side_for_all_tables_together() -> None:
    rates = {"2": 0.5, "3": 0.25, "all": 0.375}
    planned = {"hit_rate": rates, "low": dict.fromkeys(rates, 0.1), "high": dict.fromkeys(rates, 0.9)}
    part = {
        "orders": {2: {"hbm": 0, "dram": 6, "nvme": 4}, 3: {"hbm": 0, "dram": 1, "nvme": 9}},
        "static_hits": {2: 5, 3: 0},
    }
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(demo.compared_table(planned, {"tables": {"layers.1": part, "layers.14": part}}))
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert lines == [
        ["2", "50.0 %", "10.0 to 90.0 %", "60.0 %", "50.0 %", "10.0 %", "40.0 %"],
        ["3", "25.0 %", "10.0 to 90.0 %", "10.0 %", "0.0 %", "10.0 %", "90.0 %"],
        ["all", "37.5 %", "10.0 to 90.0 %", "35.0 %", "25.0 %", "10.0 %", "65.0 %"],
    ]


def test_text_is_profiled_planned_and_placed_for_the_store(text: TextStore, own: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    profile = demo.profile_text(own, text.documents, tmp_path / "work")
    assert (tmp_path / demo.REPORT).exists()
    planned = demo.plan_text(own, profile, 16 << 20)
    assert list(planned["hit_rate"]) == ["2", "3", "4", "all"]
    with tierstore.open(own, dram=16 << 20) as store:
        assert store.stats()["placement"]["epoch"] == 1
        assert store.stats()["placement"]["static_entries"]["layers.1"] > 0


@pytest.mark.parametrize("damaged", [False, True])
def test_rows_are_compared_with_the_checkpoints_own_bytes(text: TextStore, own: Path, damaged: bool) -> None:
    checkpoint = Checkpoint.open(text.store.parent / "model")
    with tierstore.open(own, dram="16MiB", io="mmap") as store:
        spec = HashSpec.from_store(store)
        if damaged:
            tensor = checkpoint.tensors["layers.1.engram.embed.weight"]
            checkpoint.tensors["layers.1.engram.embed.weight"] = replace(tensor, byte_start=tensor.byte_start - 1)
        compared, different = demo_checks.check_rows(store, spec, checkpoint, text.documents, 100)
    assert compared == 2 * 100 * 24
    assert (different > compared // 3) == damaged
    assert (different == 0) == (not damaged)
