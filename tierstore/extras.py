"""Extras: the optional packages, what each is for, and the exact command that installs it for this very installation.

Input: the name of an extra. Output: a command line that works as printed. tierstore is not on a package index, so the
command names the clone that this installation came from; if that is gone, it names the packages themselves.
Errors: none; `missing` makes the `ConfigError` that names the command.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .errors import ConfigError


@dataclass(frozen=True)
class Extra:
    """The modules that an extra brings, and what needs them."""

    modules: tuple[str, ...]
    purpose: str


EXTRAS = {
    "torch": Extra(("torch", "safetensors"), "embeddings and layers of models, .pt checkpoints"),
    "gpu": Extra(("torch", "triton"), "the hbm tier"),
    "remote": Extra(("grpc",), 'lookups by gRPC: serve --listen, connect("grpc://...")'),
    "data": Extra(("pyarrow", "jinja2"), "Parquet and Arrow files, and chat templates: trace"),
    "mooncake": Extra(("mooncake",), "shards in Mooncake: open(pages=), mooncake put"),
}


def install_command(extra: str) -> str:
    """Returns the command that installs an extra into this Python, for this installation of tierstore."""
    source = _source()
    if not source:
        needed = " ".join(shlex.quote(requirement) for requirement in _requirements(extra))
        return f"{_pip()} install {needed}"
    *options, folder = source
    return f"{_pip()} install {' '.join([*options, shlex.quote(f'{folder}[{extra}]')])}"


def reinstall_command() -> str:
    """Returns the command that builds and installs tierstore anew: after a compiler was installed, for example."""
    source = " ".join(map(shlex.quote, _source() or ["tierstore"]))
    return f"{_pip()} install --force-reinstall --no-deps {source}"


def missing(what: str, extra: str, error: ImportError) -> ConfigError:
    """Returns the error for something that an extra is needed for, with the command that installs it."""
    return ConfigError(f"{what} needs the extra {extra!r} ({error}); install it: {install_command(extra)}")


def _pip() -> str:
    """Returns the pip of this Python: by its short name only if that is what a shell would find."""
    found = shutil.which("pip")
    is_ours = found is not None and Path(found).parent == Path(sys.executable).parent
    return "pip" if is_ours else f"{shlex.quote(sys.executable)} -m pip"


def _direct_url() -> dict[str, object]:
    """Returns pip's note of the installation's source (PEP 610); {} without one."""
    try:
        text = importlib.metadata.distribution("tierstore").read_text("direct_url.json")
        return dict(json.loads(text or "{}"))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return {}


def _source() -> list[str]:
    """Returns pip's arguments for the clone of this installation; [] if it is gone."""
    here = Path(__file__).resolve().parents[1]
    if _is_clone(here):  # it runs out of the clone itself
        return ["-e", str(here)]
    url = urlsplit(str(_direct_url().get("url", "")))
    folder = Path(unquote(url.path))
    return [str(folder)] if url.scheme == "file" and _is_clone(folder) else []


def _is_clone(folder: Path) -> bool:
    return (folder / "setup.cfg").is_file() and (folder / "tierstore").is_dir()


def _requirements(extra: str) -> list[str]:
    """Returns the packages of an extra as the installation's own metadata lists them."""
    try:
        listed = importlib.metadata.requires("tierstore") or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    pattern = re.compile(rf"""(.*?)\s*;.*extra\s*==\s*['"]{extra}['"]""")
    found = [match[1].replace(" ", "") for match in map(pattern.match, listed) if match]
    return found or list(EXTRAS[extra].modules)
