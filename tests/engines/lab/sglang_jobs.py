"""What `make engines` runs of SGLang: its layers alone, with rows from tierstore against the tables in memory.

Input: the lab's folder. Output: results of the cases in `sglang_layers.py`, and of what `sglang_measure.py` measures.
Errors: `SystemExit` that names the package that did not install, or the program that failed.

SGLang's kernels have no build for a CPU, so that no whole model of it runs here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environments import REPOSITORY, Environment, install_tierstore, pip, run

VERSION = "0.5.23"
ENGINES = REPOSITORY / "tests" / "engines"
FAMILIES = ("deepseek_v41", "qwen4_exp", "process")


def sglang_environment(folder: Path) -> Environment:
    """Makes the environment if it is not there, 2.4 GB; installs this repository in it as users do."""
    base = folder / f"sglang-{VERSION}"
    python = base / "bin" / "python"
    if not (base / "ready").exists():
        run([sys.executable, "-m", "venv", "--clear", str(base)], "a virtual environment")
        requirements = ENGINES / "sglang_requirements.txt"
        pip(python, f"sglang {VERSION} and what it imports", "install", "--no-deps", "-r", str(requirements))
        (base / "ready").write_text(f"sglang {VERSION}\n")
    install_tierstore(folder, python)
    return Environment(VERSION, python)


def sglang_jobs(lab: Any) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """Returns the jobs by name; lab: has `folder`, and `python` that runs a program of an environment."""
    made: list[Environment] = []

    def environment() -> Environment:
        if not made:
            made.append(sglang_environment(lab.folder))
        return made[0]

    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"sglang {family}", lambda family=family: _cases(lab, environment(), family)) for family in FAMILIES
    ]
    return [*jobs, ("sglang measures", lambda: _measures(lab, environment()))]


def _cases(lab: Any, environment: Environment, family: str) -> dict[str, Any]:
    begun, out = time.monotonic(), lab.folder / "logs" / f"sglang-{family}.json"
    out.unlink(missing_ok=True)
    lab.python(environment, f"sglang-{family}", [str(ENGINES / "sglang_layers.py"), family, "--json", str(out)], {})
    found = json.loads(out.read_text())
    failed = [each["name"] for each in found["cases"] if not each["passed"]]
    return {
        "case": f"SGLang {VERSION}, {family}: {len(found['cases'])} cases",
        "result": f"failed: {', '.join(failed)}" if failed else "all right",
        "passed": bool(found["cases"]) and not failed,
        "seconds": round(time.monotonic() - begun, 1),
        "cases": found["cases"],
    }


def _measures(lab: Any, environment: Environment) -> dict[str, Any]:
    begun, out = time.monotonic(), lab.folder / "logs" / "sglang-measures.json"
    out.unlink(missing_ok=True)
    lab.python(environment, "sglang-measures", [str(ENGINES / "sglang_measure.py"), "--json", str(out)], {})
    return {
        "case": f"SGLang {VERSION}, the layer's own time",
        "result": "measured",
        "passed": True,
        "seconds": round(time.monotonic() - begun, 1),
        "figures": json.loads(out.read_text()),
    }
