"""What the interpreter runs is what a GPU can run: every launch compiles to machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.repository import SUPPORT, TESTS


@pytest.mark.parametrize("codecs", [4, pytest.param(99, marks=pytest.mark.slow)], ids=["four codecs", "every codec"])
def test_every_launch_compiles_for_a_gpu_without_one(tmp_path: Path, codecs: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(TESTS), "TRITON_CACHE_DIR": str(tmp_path)}  # nothing compiled before counts
    program = SUPPORT / "compile_natively.py"
    done = subprocess.run(
        [sys.executable, program, str(codecs)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "find_entries" in done.stdout
