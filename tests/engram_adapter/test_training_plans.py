"""plan for training: what it says of a trace is what a training of that trace does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny_store import VOCAB_SIZE, build_tiny, tiny_hash

import tierstore
from engram_adapter.training_plans import plan_training
from tierstore.decisions.training_estimate import DiskRates
from tierstore.errors import BudgetError, ConfigError
from tierstore.formats.trace import TokenTraceWriter
from tierstore.tools.cli import run
from tierstore.training.disk_probe import probe_disk
from tierstore.training.optimizers import SGD, LazyAdam, RowWiseAdagrad

BATCH = 64


@pytest.fixture
def store(tmp_path: Path) -> Path:
    spec = tiny_hash()
    path, _ = build_tiny(tmp_path, spec, "bf16", 1)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    """A trace of documents whose tokens are seldom all alike, and its documents."""
    rng = np.random.default_rng(0)
    documents = [np.minimum(rng.zipf(1.4, rng.integers(1, 200)), VOCAB_SIZE) - 1 for _ in range(20)]
    path = tmp_path / "trace"
    with TokenTraceWriter(path, vocab_size=VOCAB_SIZE, source="") as writer:
        for ids in documents:
            writer.add_document(ids.astype(np.int32))
        writer.finish()
    return path, documents


def test_touched_rows_and_records_are_those_of_a_training_of_the_same_steps(
    store: Path, trace: tuple[Path, list[np.ndarray]]
) -> None:
    path, documents = trace
    optimizer = RowWiseAdagrad(0.1)
    estimate = plan_training(store, path, optimizer, "64MiB", BATCH, probe=False)
    spec = tiny_hash()
    ids = {
        name: np.concatenate([spec.row_ids(document[None], name)[0] for document in documents])
        for name in estimate.tables
    }
    reads = dict.fromkeys(ids, 0)
    with tierstore.open_training(store, optimizer, dram="64MiB") as training:
        for name, row_ids in ids.items():
            for start in range(0, len(row_ids), BATCH):
                step = row_ids[start : start + BATCH].reshape(-1)
                training[name].apply(step, np.zeros((len(step), training[name].spec.dim), dtype=np.float32))
                reads[name] += len(np.unique(step))
        commit = training.commit(1).wait()
    for name, table in estimate.tables.items():
        touched = len(np.unique(ids[name]))
        assert table.touched_rows == touched == sum(run.num_records for run in commit.runs[name])
        assert table.watched_one_in == 1
        num_steps = -(-len(ids[name]) // BATCH)
        assert table.rows_per_step * num_steps == pytest.approx(reads[name])
        assert table.base_reads_per_step * num_steps == pytest.approx(touched)
        assert table.run_reads_per_step == 0  # all of it fits


def test_an_index_and_a_log_that_do_not_fit_are_refused_with_both_numbers(
    store: Path, trace: tuple[Path, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BudgetError, match=r"dram: 100000 bytes .* is below the \d+ bytes"):
        plan_training(store, trace[0], SGD(0.1), 100_000, BATCH, probe=False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 16})())
    with pytest.raises(BudgetError, match=r"runs of \d+ tokens take up to .*65536 bytes"):
        plan_training(store, trace[0], LazyAdam(0.1), "8MiB", BATCH, probe=False)
    with pytest.raises(BudgetError, match=r"a probe of the disk writes 16\.00 MiB"):
        probe_disk(store, 8, 0)


def test_a_probe_measures_and_leaves_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierstore.training.disk_probe.FILE_BYTES", 16 << 20)
    monkeypatch.setattr("tierstore.training.disk_probe.READ_SECONDS", 0.05)
    before = sorted(store.rglob("*"))
    rates = probe_disk(store, 64, 1)
    assert min(rates.reads_per_s, rates.neighbours_per_s, rates.write_bytes_per_s) > 0
    assert sorted(store.rglob("*")) == before


def test_the_command_says_the_same_as_the_function(
    store: Path,
    trace: tuple[Path, list[np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("engram_adapter.training_plans.probe_disk", lambda *_: DiskRates(1000.0, 900.0, 1e8))
    command = ["plan", str(store), str(trace[0]), "--training", "--dram", "8MiB", "--batch-tokens", str(BATCH)]
    assert run([*command, "--optimizer", "LazyAdam", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    expected = plan_training(store, trace[0], LazyAdam(0.0), "8MiB", BATCH)
    assert record["tokens_per_s"] == expected.tokens_per_s
    assert record["tables"]["layers.1"]["touched_rows"] == expected.tables["layers.1"].touched_rows
    assert run(command) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert run([*command[:3], "--training"]) == 2
    assert "--training needs --dram" in capsys.readouterr().err
    assert run(["plan", str(store), "a", "b"]) == 2
    assert "for traces add --training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--training", "--hbm", "1GiB"], "takes no --hbm"),
        (["--training", "--dry-run", "--for-machine", "1TiB"], "takes no --dry-run, --for-machine"),
        (["--optimizer", "SGD", "--no-probe"], "only a plan of --training takes --no-probe, --optimizer"),
    ],
)
def test_options_of_the_other_kind_of_plan_are_refused_by_name(
    store: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert run(["plan", str(store), "a.trace", "--dram", "8MiB", *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_tables_that_cannot_be_trained_are_named(tmp_path: Path, trace: tuple[Path, list[np.ndarray]]) -> None:
    path, _ = build_tiny(tmp_path, tiny_hash(), "fp4_e2m1_e4m3x16*0x1.8p-7", 1)
    with pytest.raises(ConfigError, match="cannot be trained"):
        plan_training(path, trace[0], SGD(0.1), "8MiB", BATCH, probe=False)
