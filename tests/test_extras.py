"""What is not installed is named with the command that installs it, which works as printed."""

from __future__ import annotations

import configparser
import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.repository import REPOSITORY

import engram_adapter
import tierstore
from tierstore import ConfigError, extras
from tierstore.extras import EXTRAS, install_command, missing, reinstall_command


def a_clone(folder: Path) -> Path:
    (folder / "tierstore").mkdir(parents=True)
    (folder / "setup.cfg").touch()
    return folder


def installed(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As if this were an installation in site-packages, made from `url`."""
    monkeypatch.setattr(extras, "__file__", "/usr/lib/python3/site-packages/tierstore/extras.py")
    monkeypatch.setattr(extras, "_direct_url", lambda: {"url": url, "dir_info": {}})


def test_the_clone_that_pip_installed_from_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = a_clone(tmp_path / "my clone")
    installed(monkeypatch, f"file://{tmp_path}/my%20clone")
    assert shlex.split(install_command("data"))[-2:] == ["install", f"{clone}[data]"]
    assert shlex.split(reinstall_command())[-1] == str(clone)


def test_what_runs_out_of_a_clone_goes_on_doing_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = a_clone(tmp_path / "clone")
    monkeypatch.setattr(extras, "__file__", str(clone / "tierstore" / "extras.py"))
    assert shlex.split(install_command("data"))[-3:] == ["install", "-e", f"{clone}[data]"]


def test_a_clone_that_is_gone_leaves_the_packages_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, f"file://{tmp_path}/gone")
    listed = ["numpy>=1.26", "pyarrow>=18; extra == 'data'", 'grpcio >=1.60 ; extra == "remote"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: listed)
    assert shlex.split(install_command("data"))[-2:] == ["install", "pyarrow>=18"]
    assert shlex.split(install_command("remote"))[-2:] == ["install", "grpcio>=1.60"]


def test_the_pip_that_is_named_is_this_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.shutil, "which", lambda _: f"{Path(sys.executable).parent}/pip")
    assert install_command("gpu").startswith("pip install ")
    for other in ("/other/bin/pip", None):
        monkeypatch.setattr(extras.shutil, "which", lambda _, other=other: other)
        assert install_command("gpu").startswith(f"{shlex.quote(sys.executable)} -m pip install ")


def test_every_extra_is_one_of_the_package_and_is_named_in_the_readme() -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    readme = (REPOSITORY / "README.md").read_text()
    for name in EXTRAS:
        assert name in config["options.extras_require"]
        assert f'pip install ".[{name}]"' in readme


def test_a_missing_extra_is_an_error_with_its_command() -> None:
    error = missing("a column", "data", ImportError("No module named 'pyarrow'"))
    assert isinstance(error, ConfigError)
    assert str(error).startswith("a column needs the extra 'data' (No module named 'pyarrow'); install it: ")
    assert str(error).endswith(install_command("data"))


@pytest.mark.parametrize(
    ("package", "code", "extra"),
    [
        ("torch", "from engram_adapter import TieredEmbedding", "torch"),
        ("torch", "from engram_adapter import swap_embedding", "torch"),
        (
            "torch",
            "import pathlib; from tierstore.formats.pt_file import _loaded as r; r(pathlib.Path('x.pt'), 0)",
            "torch",
        ),
        ("torch", "from tierstore.tiers.hbm.device import _load; _load('torch', 'cuda:0')", "gpu"),
        ("grpc", "from tierstore.remote.access import load_grpc; load_grpc()", "remote"),
        ("torch", "import tierstore.tools.demo.run", "torch"),
    ],
)
def test_what_needs_an_extra_says_the_command_and_no_traceback_of_an_import(
    package: str, code: str, extra: str
) -> None:
    script = f"import sys; sys.modules[{package!r}] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode != 0
    assert install_command(extra) in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("package", [tierstore, engram_adapter])
def test_dir_lists_what_is_imported_at_its_first_use(package: ModuleType) -> None:
    assert set(package.__all__) <= set(dir(package))
    for name in package._JOBS:
        assert name in dir(package)
