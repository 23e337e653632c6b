"""The C++ tests of what is shared: races, every way of reading, a writer killed after each of its instructions.

`make` compiles the programs, plainly; what is missing is compiled here. `make sanitize` compiles and runs the same
under ThreadSanitizer, then under AddressSanitizer and UndefinedBehaviorSanitizer, which takes some minutes.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.cpp_programs import FLAGS, NoCompilerError, program

NOT_ALLOWED = 77  # a program's exit status if the system does not let it do what it tests
RUN_S = 600.0


def check(name: str, *arguments: str) -> None:
    """Runs a part of a program, which must say that it checked something."""
    try:
        path = program(name)
    except NoCompilerError as error:
        pytest.skip(str(error))
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, timeout=RUN_S)
    if done.returncode == NOT_ALLOWED:
        pytest.skip("this system does not let a process trace its own child")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked" in done.stdout


@pytest.mark.parametrize("what", ["cache", "crew", "engine", "epochs", "kill"])
def test_the_lookup_path_keeps_its_promises_in_cpp(what: str, tmp_path: Path) -> None:
    check("lookup_path_test", what, *([str(tmp_path)] if what in ("engine", "epochs") else []))


@pytest.mark.parametrize("what", ["ring", "counts", "kill"])
def test_reports_keep_their_promises_in_cpp(what: str) -> None:
    check("reports_test", what)


@pytest.mark.parametrize("what", ["devices", "wild"])
def test_mailboxes_keep_their_promises_in_cpp(what: str, tmp_path: Path) -> None:
    check("mailbox_test", what, str(tmp_path))


@pytest.mark.parametrize("what", ["memory", "threads", "cancel", "ring"])
def test_nothing_is_lost_when_memory_threads_or_the_ring_give_out_in_cpp(what: str, tmp_path: Path) -> None:
    if what in ("threads", "ring") and "-fsanitize=thread" in FLAGS:
        pytest.skip("ThreadSanitizer has its own pthread_create and syscall, which the test would have to replace")
    trials = "10000" if os.environ.get("TIERSTORE_SOAK") else "300"
    check("scarcity_test", what, str(tmp_path), *([trials] if what == "cancel" else []))
