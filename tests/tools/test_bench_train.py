"""`bench train` at toy size: every side runs and takes part, and the bare loop does what a step is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierstore.tools.bench.bare import loops as bare
from tierstore.tools.bench.bare.loops import BareLoop
from tierstore.tools.bench.pairs import Options
from tierstore.tools.bench.train import cold, command, warm
from tierstore.tools.bench.train.work import LR, Batches

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, bare.COMPILERS)), reason="no C compiler is there to make the bare loop"
)
ROWS = 4_096


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rule", ["sgd", "row_wise_adagrad", "lazy_adam"])
def test_the_bare_loop_gathers_sums_and_updates(rule: str, threads: int) -> None:
    batches = Batches(500, 20, dim=20)
    values, first, second = np.zeros((3, 500, 20))  # in float64: the bare loop need not keep anybody's bits
    with BareLoop.train(rule, 20, 500, threads) as loop:
        for step in range(1, 4):
            row_ids = batches.draw()
            loop.load(row_ids[:, None])
            loop.run()
            found = loop.output().view(np.float32).reshape(-1, 20)
            assert np.allclose(found, values[row_ids], atol=1e-5)  # what the step before left
            sums = np.zeros((500, 20))
            np.add.at(sums, row_ids, batches.gradients.astype(np.float64))
            touched = np.unique(row_ids)
            gradients = sums[touched]
            if rule == "sgd":
                values[touched] -= LR * gradients
            elif rule == "row_wise_adagrad":
                first[touched] += (gradients**2).mean(axis=1, keepdims=True)
                values[touched] -= LR * gradients / (np.sqrt(first[touched]) + 1e-8)
            else:
                first[touched] += 0.1 * (gradients - first[touched])
                second[touched] += 0.001 * (gradients**2 - second[touched])
                rate = LR * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
                values[touched] -= rate * first[touched] / (np.sqrt(second[touched]) + 1e-8)
        assert loop.cpu_seconds() > 0


def test_a_batch_repeats_rows_about_as_text_does() -> None:
    row_ids = Batches(262_144, 2_048).draw()
    assert len(row_ids) == 2_048 * 24
    assert row_ids.min() >= 0
    assert row_ids.max() < 262_144
    assert 0.4 < len(np.unique(row_ids)) / len(row_ids) < 0.65


def test_train_measures_every_side_and_keeps_its_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "COLD_ROWS", ROWS)
    monkeypatch.setattr(cold, "DRAM_BYTES", 24 << 20)
    options = Options(size_bytes=ROWS * 1024, pairs=2, tokens=16)
    result: dict[str, Any] = command.run(tmp_path, options).to_dict()
    cases = {each["case"]: each for each in result["comparisons"]}
    assert len(cases) == 2 * len(warm.RULES) + 1
    for case, each in cases.items():
        assert {"tierstore", "bare loop"} <= set(each["seconds"]), case
        assert all(len(seconds) == 2 and min(seconds) >= 0 for seconds in each["seconds"].values())
    adagrad = next(each for case, each in cases.items() if "Adagrad" in case and "processor" in case)
    assert adagrad["targets"]["torch Adagrad"] == 3.0
    assert adagrad["targets"]["bare loop"] == pytest.approx(1 / 1.5)
    assert all(not each["targets"] for case, each in cases.items() if case.endswith("wall"))
    assert {each["bound"] for each in result["figures"]} == {warm.TWO_THREADS, None, cold.STALL_FRACTION}
    assert [value for name, value in result["facts"].items() if "were read while" in name] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []  # nothing is left
