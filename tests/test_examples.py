"""The examples do what they say, started as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.repository import REPOSITORY
from support.text_store import TABLE_BYTES, TextStore

import tierstore

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
