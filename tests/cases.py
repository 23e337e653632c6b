"""`make cases`: every script of `../shared/cases`, beside the repository, with the installed product;
or the project's own tests.

Input: scripts that each state a right behaviour and exit with 0 if they see it, 77 if they cannot be run here. Each
runs in an empty folder of its own. Output: a table, what the scripts that failed said last, and exit status 1 if any
failed. Where there is no such folder, `pytest` runs instead: every case is also a test in this repository.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.repository import REPOSITORY, SUPPORT

FOLDER = REPOSITORY.parent / "shared" / "cases"
OLD_NAMES = SUPPORT / "old_names"  # on a script's PYTHONPATH: some import modules that have moved
SKIPPED_STATUS = 77
TIMEOUT_S = 300.0
WORDS_LINES = 6  # printed of what a script said last
# Cases that may fail today, by the script's name, and why. One that passes all the same is named,
# so that it leaves the list.
EXCEPTIONS: dict[str, str] = {}


@dataclass(frozen=True)
class Outcome:
    """How a script ended: "right", "skipped", "WRONG", or "excepted" if it is one of the exceptions; words:
    what it said last."""

    name: str
    how: str
    seconds: float
    words: str


def run_case(script: Path, exceptions: Mapping[str, str] = EXCEPTIONS, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Runs one script in an empty folder. Blocks, timeout_s at most; what it has started ends with it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tierstore-case-") as folder:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, (str(OLD_NAMES), os.environ.get("PYTHONPATH"))))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            said, status = process.communicate(timeout=timeout_s)[0].decode(errors="replace"), process.returncode
        except subprocess.TimeoutExpired:
            said, status = f"it did not end within {timeout_s:g} s", -1
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    how = {0: "right", SKIPPED_STATUS: "skipped"}.get(status, "WRONG")
    words = "\n".join(said.strip().splitlines()[-WORDS_LINES:]) or f"exit status {status}"
    if script.stem in exceptions and how != "skipped":
        how, words = (
            "excepted",
            exceptions[script.stem] + ("; it passes: take it off the list" if how == "right" else ""),
        )
    return Outcome(script.stem, how, time.monotonic() - started, words)


def run_cases(scripts: Sequence[Path], timeout_s: float = TIMEOUT_S) -> list[Outcome]:
    """Runs scripts one after the other and prints a line for each as it ends."""
    width = max((len(script.stem) for script in scripts), default=0)
    outcomes = []
    for script in scripts:
        outcome = run_case(script, timeout_s=timeout_s)
        outcomes.append(outcome)
        note = outcome.words.splitlines()[-1] if outcome.how not in ("right", "WRONG") else ""
        print(f"{outcome.name:{width}}  {outcome.how:8}  {outcome.seconds:6.1f} s  {note}".rstrip(), flush=True)
    return outcomes


def main(names: Sequence[str]) -> int:
    """Runs the cases of these names, by default all; returns the exit status."""
    if not FOLDER.is_dir():
        print(
            f"there is no folder {FOLDER.relative_to(REPOSITORY.parent)} beside the repository: running its own tests"
        )
        return subprocess.run([sys.executable, "-m", "pytest"], cwd=REPOSITORY, check=False).returncode
    scripts = sorted(script for script in FOLDER.rglob("*.py") if not names or script.stem in names)
    if unknown := set(names) - {script.stem for script in scripts}:
        print(f"no such case: {', '.join(sorted(unknown))}")
        return 2
    outcomes = run_cases(scripts)
    wrong = [outcome for outcome in outcomes if outcome.how == "WRONG"]
    for outcome in wrong:
        print(f"\n{outcome.name}:\n{outcome.words}")
    counts = {how: sum(outcome.how == how for outcome in outcomes) for how in ("right", "skipped", "excepted", "WRONG")}
    print("\n" + ", ".join(f"{count} {how}" for how, count in counts.items()))
    return 1 if wrong or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
