"""Builds of tierstore to compare, each of which measures itself in processes of its own.

Input: a checkout, a folder of installed packages, or a virtual environment; what to measure, as JSON. Output: what a
process found, as JSON. Errors: `ConfigError`: that is not a build, or it cannot do what it is asked to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tierstore
from tierstore.errors import ConfigError

from ..pairs import interleave

TIMEOUT_S = 600
THIS, OTHER = "this build", "the other"
SIDE = Path(__file__).with_name("side.py")


@dataclass(frozen=True)
class Build:
    """A build of tierstore: the interpreter that runs it, and the folder that it is imported from,
    if it needs one."""

    python: str
    folder: Path | None
    cwd: Path

    @classmethod
    def this(cls, cwd: Path) -> Build:
        """The build that this process runs."""
        return cls(sys.executable, Path(tierstore.__file__).absolute().parents[1], cwd)

    @classmethod
    def at(cls, path: Path, cwd: Path) -> Build:
        """The build at `path`: a virtual environment, or a folder with the package in it. Raises `ConfigError`."""
        python = path / "bin" / "python"
        if python.exists():
            return cls(str(python.absolute()), None, cwd)
        if not (path / "tierstore" / "__init__.py").is_file():
            raise ConfigError(
                f"--against {path}: there is neither tierstore/__init__.py nor bin/python in it; give a checkout whose "
                f"extension is built (python setup.py build_ext --inplace), a folder of installed packages, or a "
                f"virtual environment"
            )
        return cls(sys.executable, path.absolute(), cwd)

    def measure(self, ask: dict[str, Any], side: Path = SIDE) -> dict[str, Any]:
        """Runs a side in one process of this build and returns what it found. Blocks.

        side: a file whose text runs under any build; it may import what lies in the folder that this runs in. Raises
        `ConfigError` with the last words of a process that failed.
        """
        source = side.read_text()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if self.folder is not None:
            environment["PYTHONPATH"] = str(self.folder)
        command = [self.python, "-c", source, json.dumps(ask)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.cwd, env=environment, timeout=TIMEOUT_S, check=False
        )
        if done.returncode:
            words = "\n".join(done.stderr.strip().splitlines()[-6:])
            raise ConfigError(f"{self.folder or self.python}: bench {ask['bench']} failed in this build:\n{words}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        package = Path(found["build"]["package"])
        if self.folder is not None and package.parent.resolve() != self.folder.resolve():
            raise ConfigError(f"{self.folder}: its Python imports tierstore from {package.parent} instead")
        return found


def in_turn(
    measure: dict[str, Callable[[], dict[str, Any]]], pairs: int, what: object
) -> dict[str, list[dict[str, Any]]]:
    """Has each side measure once a round; returns what each found, without the first round. Blocks.

    Raises `ConfigError`, naming `what`, if two sides give different checksums.
    """
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in measure}

    def one(side: str) -> float:
        found[side].append(measure[side]())
        return 0.0

    interleave({side: partial(one, side) for side in measure}, pairs, warm_up_rounds=1)
    found = {side: of_side[1:] for side, of_side in found.items()}
    checksums = {side: {one["checksum"] for one in of_side} for side, of_side in found.items()}
    if len(set.union(*checksums.values())) > 1:
        raise ConfigError(f"{what}: the two builds give other rows for the same keys: {checksums}")
    return found
