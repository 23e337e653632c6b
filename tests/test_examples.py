"""The examples do what they say, started as a user starts them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.repository import REPOSITORY
from support.text_store import TABLE_BYTES, TextStore, write_trace

import tierstore
from engram_adapter import HashSpec

EXAMPLES = REPOSITORY / "examples"
TIMEOUT_S = 300
OFFLINE = {"RAY_USAGE_STATS_ENABLED": "0"}  # Ray reports its use to its makers else


def output_of(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | OFFLINE
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


@pytest.mark.parametrize(("dram", "epoch"), [(16 << 20, 1), (2 * TABLE_BYTES, None)], ids=["part of it", "all of it"])
def test_a_store_replanned_nightly_opens_with_the_new_epoch(
    text: TextStore, own: Path, dram: int, epoch: int | None
) -> None:
    said = output_of(EXAMPLES / "replan_nightly.py", own, dram, text.trace)
    assert "layers.1, layers.14: expected hbm 0.0 %, dram " in said
    assert (f"opens with epoch {epoch} from now on" if epoch else "nothing to place") in said
    with tierstore.open(own, dram=dram) as store:
        assert store.stats()["placement"]["epoch"] == epoch


def test_tables_fine_tuned_are_published_and_a_killed_run_goes_on(text: TextStore, own: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.concatenate(text.documents[:40]))
    arguments = (EXAMPLES / "fine_tune.py", own, tmp_path / "ids.npy", tmp_path / "dense.pt")
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline().startswith("step 10: loss ")
        killed.kill()
    said = output_of(*arguments).splitlines()
    assert [line.partition(":")[0] for line in said] == ["step 20", "step 30", "published version 1"]
    row_ids = HashSpec.from_store(tierstore.open(own)).row_ids(text.documents[0][None, :9], 1)
    with tierstore.open(own, version=0) as before, tierstore.open(own) as after:
        assert not np.array_equal(before["layers.1"].rows(row_ids), after["layers.1"].rows(row_ids))


def test_a_store_is_built_checked_and_looked_up_in(text: TextStore, tmp_path: Path) -> None:
    model, path = text.store.parent / "model", tmp_path / "store"
    for built, kept in ((2, 0), (0, 2)):  # run again, there is nothing left to build
        said = output_of(EXAMPLES / "build_and_look_up.py", model, path)
        assert f"{path}: {built} shards built, {kept} kept\n" in said
    with tierstore.open(path) as store:
        num_rows = sum(table.spec.num_rows for table in store.tables.values())
    assert f"{num_rows} rows are those of {model}\n" in said


def test_a_profile_says_what_memory_buys_and_the_plan_is_placed(text: TextStore, own: Path) -> None:
    said = output_of(EXAMPLES / "profile_and_plan.py", own, text.trace)
    assert f"tokens of {len(text.documents)} documents\n" in said
    with tierstore.open(own) as store:
        assert f"\n{own} opens with epoch {store.stats()['placement']['epoch']}: " in said


@pytest.mark.daemon
def test_processes_look_up_in_one_copy_of_a_daemon(text: TextStore, tmp_path: Path) -> None:
    said = output_of(EXAMPLES / "serve_and_connect.py", text.store, tmp_path / "s")
    assert sorted(line.partition(":")[0] for line in said.splitlines() if line.startswith("worker")) == [
        "worker 0", "worker 1", "worker 2",
    ]  # fmt: skip
    assert "clients: 0 of 64" in said
    assert not (tmp_path / "s").exists(), "the daemon has ended"


def if_installed(script: str, package: str) -> Any:
    is_missing = importlib.util.find_spec(package) is None
    reason = f"{package} is not installed; pip install {package}"
    return pytest.param(script, marks=pytest.mark.skipif(is_missing, reason=reason))


@pytest.mark.long
@pytest.mark.parametrize("script", [if_installed("ray", "ray"), if_installed("dask", "distributed")])
def test_a_corpus_profiled_by_two_workers_of_a_cluster_is_the_profile_of_one_process(
    text: TextStore, tmp_path: Path, script: str
) -> None:
    """To the byte, from traces of very different lengths."""
    bounds = [0, 9, len(text.documents) // 2, len(text.documents)]
    traces = [
        write_trace(tmp_path / f"{start}.trace", text.documents[start:end]) for start, end in itertools.pairwise(bounds)
    ]
    merged = tmp_path / "merged.profile"
    said = output_of(EXAMPLES / f"profile_with_{script}.py", text.store, *traces, "-o", merged, "--workers", 2)
    assert said.endswith(f" tokens of {len(text.documents):,} documents, 3 parts\n")
    assert merged.read_bytes() == text.profile.read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted([*traces, merged]), "the parts are gone"


@pytest.mark.parametrize("script", ["ray", "dask"])
def test_the_scripts_of_clusters_explain_themselves_without_the_clusters_packages(script: str) -> None:
    said = output_of(EXAMPLES / f"profile_with_{script}.py", "--help")
    assert "--held-out SHARE" in said
    assert "example: python" in said.lower()
