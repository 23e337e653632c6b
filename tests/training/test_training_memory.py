"""A training takes its budget and 64 MiB at most, at every moment, its indexes included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.repository import REPOSITORY, SUPPORT
from support.trainable import make_trainable

import tierstore
from tierstore import kernels
from tierstore.decisions.training_budget import NUM_BUFFERS, RecordShape, divide_training

SPARE_BYTES = 64 << 20


@pytest.mark.parametrize("dram_mib", [4, 24])
def test_memory_stays_within_the_budget_and_64_mib(tmp_path: Path, dram_mib: int) -> None:
    trainable = make_trainable(tmp_path / "checkpoint", num_rows=30000, dim=128, codecs={"a": "bf16", "b": "bf16"})
    trainable.model.build(tmp_path / "store")
    command = [sys.executable, str(SUPPORT / "training_memory.py"), str(tmp_path / "store"), f"{dram_mib}MiB"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= (dram_mib << 20) + SPARE_BYTES


def shape(num_rows: int, dim: int = 128, index_bytes: int = 0) -> RecordShape:
    return RecordShape(num_rows, dim, 4 * dim + 16, index_bytes, index_bytes + 20 * num_rows)


@pytest.mark.parametrize("budget_mib", [4, 5, 64, 700, 5000])
def test_the_parts_of_a_budget_never_add_up_to_more(budget_mib: int) -> None:
    shapes = {"small": shape(1000), "large": shape(5_000_000), "huge": shape(300_000_000, index_bytes=1 << 20)}
    plan = divide_training(shapes, budget_mib << 20, 1 << 20)
    assert plan.num_bytes <= plan.budget_bytes == budget_mib << 20
    for name, table in plan.tables.items():
        of = shapes[name]
        cache_bytes = kernels.row_cache_bytes(of.num_rows, of.dim, of.record_bytes, table.num_slots, table.num_aside)
        assert cache_bytes <= table.cache_bytes
        index_bytes = of.index_bytes_max if table.is_whole else of.index_bytes
        assert table.cache_bytes + index_bytes <= table.share_bytes
        assert table.is_whole == (table.num_slots == of.num_rows)
    used = sum(table.cache_bytes for table in plan.tables.values())
    assert used > 0.8 * (plan.budget_bytes - plan.base_bytes - NUM_BUFFERS * plan.buffer_bytes - (1 << 20))


def test_a_table_that_fits_is_whole_whatever_the_others_need() -> None:
    plan = divide_training({"small": shape(1000), "huge": shape(10_000_000)}, 64 << 20, 1 << 20)
    assert plan.tables["small"].is_whole
    assert not plan.tables["huge"].is_whole


def test_a_budget_that_is_too_small_is_refused_with_both_numbers() -> None:
    with pytest.raises(tierstore.BudgetError, match=r"1048576 bytes .* below the \d+ bytes"):
        divide_training({"a": shape(1_000_000)}, 1 << 20, 1 << 20)
