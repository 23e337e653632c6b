"""A model's name on the Hugging Face Hub, looked up among what this machine has downloaded. Nothing is fetched.

Input: OWNER/NAME or OWNER/NAME@REVISION, and the variables that say where the cache is. Output: the folder of the
revision in the cache. Errors: `ConfigError` with the command that downloads what is not there.

Layout: CACHE/models--OWNER--NAME has refs/BRANCH, files with a commit's digest, and snapshots/COMMIT, folders of links.
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?P<owner>{_PART})/(?P<name>{_PART})(?:@(?P<revision>[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*))?")
_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)/snapshots/(?P<revision>[^/]+)$")
REF_BYTES_MAX = 256


class Repository(NamedTuple):
    """A model on the Hub; revision: a branch, tag or commit, None for main."""

    owner: str
    name: str
    revision: str | None

    def download(self, file_name: str = "") -> str:
        """Returns the command that downloads it, or one of its files."""
        words = ["hf", "download", f"{self.owner}/{self.name}", *([file_name] if file_name else [])]
        return shlex.join([*words, "--revision", self.revision] if self.revision else words)


def repository_named(path: Path) -> Repository | None:
    """Returns the model that a path may name, None if it cannot be a name; the path itself is not looked at."""
    match = _NAME.fullmatch(path.as_posix())
    if match is None or ".." in path.as_posix() or "--" in path.as_posix():
        return None
    return Repository(match["owner"], match["name"], match["revision"])


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns where huggingface_hub keeps its downloads, as its variables say."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(variable):
            return Path(os.path.expandvars(environment[variable])).expanduser()
    if environment.get("HF_HOME"):
        return Path(os.path.expandvars(environment["HF_HOME"])).expanduser() / "hub"
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expandvars(base)).expanduser() / "huggingface" / "hub"


def snapshot_in_cache(repository: Repository, environment: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder of a model's revision. Raises `ConfigError` if it was not downloaded here."""
    cache = cache_folder(environment)
    folder = cache / f"models--{repository.owner}--{repository.name}"
    wanted = repository.revision or "main"
    what = f"{repository.owner}/{repository.name}"
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {what}, and no model {what} in the Hugging Face cache {cache}; give a path, or "
            f"download it: {repository.download()}"
        )
    ref = folder / "refs" / wanted
    commit = ref.read_bytes()[:REF_BYTES_MAX].decode(errors="replace").strip() if ref.is_file() else wanted
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"[A-Za-z0-9._-]+", commit) or not snapshot.is_dir():
        snapshots = folder / "snapshots"
        revisions = sorted(each.name for each in snapshots.iterdir()) if snapshots.is_dir() else []
        raise ConfigError(
            f"{what}: revision {wanted} is not in the Hugging Face cache {folder}, which has "
            f"{', '.join(revisions[:4]) or 'none'}; name one of these, {what}@REVISION, or download it: "
            f"{repository.download()}"
        )
    return snapshot


def download_of(file: Path) -> str | None:
    """Returns the command that downloads a file of a snapshot in the cache; None for files elsewhere."""
    match = _SNAPSHOT.search(file.parent.as_posix())
    if match is None:
        return None
    return Repository(match["owner"], match["name"], match["revision"]).download(file.name)
