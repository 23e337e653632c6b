"""The package as users get it: a wheel, installed outside the clone, does the whole job."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.repository import REPOSITORY

SOURCES = (
    "tierstore",
    "engram_adapter",
    "kernels",
    "tools",
    "packaging",
    "setup.py",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
JOB = """
import sys
from pathlib import Path
import numpy as np
import engram_adapter, tierstore
from tierstore import kernels

site = Path(sys.argv[1]).resolve()
for module in (tierstore, engram_adapter, kernels):
    assert Path(module.__file__).resolve().is_relative_to(site), module.__file__
with tierstore.open("store", dram="64MiB") as store:
    spec = engram_adapter.HashSpec.from_store(store)
    keys = spec.keys(np.arange(40).reshape(2, 20), 1)[0]
    rows = store["layers.1"].lookup(keys)
    assert np.array_equal(rows, store["layers.1"].rows(spec.row_ids(np.arange(40).reshape(2, 20), 1)[0]))
print("rows", *rows.shape)
"""
USER = """
import numpy as np
import numpy.typing as npt
import tierstore
from tierstore import kernels

def rows(path: str, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    with tierstore.open(path, dram="64MiB") as store:
        return store["layers.1"].lookup(keys)

checksum: int = kernels.crc32c(b"tierstore")
wrong: int = kernels.crc32c(17)
"""


def run(*command: object, cwd: Path, site: Path | None = None) -> str:
    flags = f"{os.environ.get('CXXFLAGS', '')} -O0"  # half the time, and what is asked here is not how fast it is
    environment = os.environ | {"CXXFLAGS": flags} | ({"PYTHONPATH": str(site)} if site else {})
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel in it."""
    clone, wheels, site = (tmp_path_factory.mktemp(name) for name in ("clone", "wheels", "site"))
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, clone / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(source, clone / name)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, clone, cwd=wheels)
    (wheel,) = wheels.glob("tierstore-*.whl")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=wheels)
    return site


def test_a_wheel_outside_the_clone_does_the_whole_job(site: Path, tmp_path: Path) -> None:
    command = site / "bin" / "tierstore"
    run(
        sys.executable, command, "synth", "model", "--family", "deepseek_v41", "--size", "1MiB", cwd=tmp_path, site=site
    )
    run(sys.executable, command, "build", "model", "store", cwd=tmp_path, site=site)
    said = run(sys.executable, command, "verify", "store", "--source", "model", cwd=tmp_path, site=site)
    assert "nothing is wrong" in said
    for name, part in (("systemd", "[Service]"), ("grafana", '"schemaVersion"'), ("proto", "service ")):
        assert part in run(sys.executable, command, "packaging", name, cwd=tmp_path, site=site)
    assert {"status.html", "status.css", "status.js", "numbers.js"} <= names_in(site / "tierstore" / "daemon" / "pages")
    assert run(sys.executable, "-c", JOB, site, cwd=tmp_path, site=site) == "rows 20 24 264\n"


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_types_reach_a_user_of_the_wheel(site: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    # The wheel's own imports may lack types; the user's program may not.
    (tmp_path / "setup.cfg").write_text("[mypy]\nstrict = True\nfollow_imports = silent\n")
    found = mypy_of("user.py", tmp_path, site)
    assert found.count(" error: ") == 1, found
    assert f"user.py:{len(USER.splitlines())}: error: Argument 1" in found, found


def mypy_of(file: str, folder: Path, site: Path) -> str:
    """What mypy prints of a program that imports the wheel."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "mypy", file]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr
