"""The examples do what they say, started as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.repository import REPOSITORY
from support.text_store import TABLE_BYTES, TextStore

import tierstore
from engram_adapter import HashSpec

EXAMPLES = REPOSITORY / "examples"
TIMEOUT_S = 300


def output_of(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, check=True, timeout=TIMEOUT_S, capture_output=True, text=True).stdout


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
