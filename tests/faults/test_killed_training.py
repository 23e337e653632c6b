"""A training that is killed at any moment goes on from its newest commit, and ends as one that nobody disturbed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.repository import REPOSITORY, SUPPORT
from support.trainable import make_trainable

CLIENT = SUPPORT / "training_client.py"
LIMIT_S = 120


def start(store: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(CLIENT), str(store), str(out)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(store: Path, out: Path) -> tuple[bytes, float]:
    """Lets a training end; returns the rows, and how long it took from its first word on."""
    process = start(store, out)
    assert process.stdout is not None
    process.stdout.readline()
    began = time.monotonic()
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors.decode()
    return out.read_bytes(), time.monotonic() - began


def check_killed(tmp_path: Path, num_kills: int, seed: int) -> None:
    codecs = {"bf16": "bf16", "fp8": "fp8_e4m3_e8m0x32"}
    trainable = make_trainable(tmp_path / "checkpoint", num_rows=4000, dim=64, codecs=codecs)
    trainable.model.build(tmp_path / "undisturbed")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "built")
    expected, seconds = run(tmp_path / "undisturbed", tmp_path / "expected")
    rng = np.random.default_rng(seed)
    kills = 0
    while kills < num_kills:
        store = Path(shutil.copytree(tmp_path / "built", tmp_path / "killed"))
        steps = [0]
        for _ in range(8):  # then it may end
            process = start(store, tmp_path / "found")
            assert process.stdout is not None
            words = process.stdout.readline().split()
            if words[:1] != [b"step"]:
                _, errors = process.communicate(timeout=LIMIT_S)
                raise AssertionError(errors.decode())
            steps.append(int(words[1]))
            assert steps[-1] >= steps[-2], "a commit was lost"
            if kills == num_kills:
                process.communicate(timeout=LIMIT_S)
                break
            try:
                process.wait(timeout=float(rng.random()) * seconds)
                process.communicate()
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
        found, _ = run(store, tmp_path / "found")
        assert found == expected
        shutil.rmtree(store)


def test_killed_three_times_a_training_ends_as_one_that_was_not(tmp_path: Path) -> None:
    check_killed(tmp_path, num_kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_killed_two_hundred_times_trainings_end_as_one_that_was_not(tmp_path: Path, seed: int) -> None:
    check_killed(tmp_path, num_kills=10, seed=seed)
