"""Which files make up a checkpoint: those that its index names, or else the visible ones; and what stands in for one.

Input: the path that a user gave. Output: `CheckpointFiles`, and why files that the index names are not there. Errors:
`ConfigError` for a path without a checkpoint (it says what lies there instead) and for one rank's part of a checkpoint
that was split by rows, `FormatError` for a damaged index.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from .content import unfinished_download
from .hub_cache import download_of, repository_named, snapshot_in_cache

INDEX_NAME = "model.safetensors.index.json"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
METADATA_NAME = ".metadata"  # of torch.distributed.checkpoint
FILES_NAMED_MAX = 4  # in a message

# Names that tools give to one rank's part: (?P<rank>) and, if the name says it, (?P<world>).
_RANK_NAMES = [
    re.compile(pattern)
    for pattern in (
        r"model(?P<rank>\d+)-mp(?P<world>\d+)\.",  # DeepSeek's convert.py
        r"^consolidated\.(?P<rank>\d+)\.",  # Llama
        r"(?:^|[._-])(?:tp|mp|pp|ep|model|zero_pp)[._-]?rank[._-]?(?P<rank>\d+)",  # Megatron, DeepSpeed
        r"(?:^|[._-])rank[._-]?(?P<rank>\d+)(?:[._-]of[._-]?(?P<world>\d+))?",  # vLLM, SGLang, TensorRT-LLM
        r"(?:^|[._-])(?:tp|mp)[._-]?(?P<rank>\d+)(?:[._-]?of[._-]?(?P<world>\d+))?(?=[._-])",
        r"(?:^|[._-])model[._-]part[._-]?(?P<rank>\d+)",  # fairseq
    )
]
_NUMBERED = re.compile(r"-(?P<part>\d+)-of-(?P<parts>\d+)(?=\.)")  # Hugging Face: tensors stay whole
_DISTRIBUTED = re.compile(r"^__\d+_\d+\.distcp$")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files to read, in order of name.

    assigned: file name by tensor name, as the index says; None without an index. absent: files of the index that are
    not there, and why. beside: visible files of tensors that the index does not name. distributed: whether it is a
    folder of torch.distributed.checkpoint, whose metadata says which files it has.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None = None
    assigned: dict[str, str] | None = None
    absent: dict[str, str] = field(default_factory=dict)
    beside: tuple[Path, ...] = ()
    distributed: bool = False


def find_files(path: Path) -> CheckpointFiles:
    """Finds the files of the checkpoint at `path`: a folder, a folder of the Hugging Face cache, or one file.

    A path that is not there and could be a model's name on the Hub, OWNER/NAME, is looked up in that cache.
    """
    repository = repository_named(path)
    if repository is not None and not path.exists() and not unfinished_download(path):
        path = snapshot_in_cache(repository)
    if not path.is_dir():
        if not path.exists():
            unfinished = unfinished_download(path)
            if unfinished:
                raise ConfigError(f"there is no checkpoint at {path}: {unfinished}")
            raise ConfigError(f"there is no checkpoint at {path}; give a folder with *.safetensors, or one file")
        refuse_parts([path])
        return _one_file(path)
    folder = _snapshot_of(path)
    index = _index_of(folder)
    if index is None:
        files = _visible(folder, ".safetensors") or _visible(folder, ".bin", "pytorch_model") or _gguf_of(folder)
        if not files and (folder / METADATA_NAME).is_file():
            return CheckpointFiles(folder, (), distributed=True)
        if not files:
            raise ConfigError(f"{folder} holds no *.safetensors file; {_what_is_there(folder)}")
        refuse_parts(files)
        return CheckpointFiles(folder, tuple(files))
    assigned = _weight_map(index)
    names = sorted(set(assigned.values()))
    absent = {name: why_absent(folder / name) for name in names if not (folder / name).exists()}
    if len(absent) == len(names):
        raise ConfigError(
            f"{folder}: none of the {len(names)} files of {index.name} is there, first {names[0]}: {absent[names[0]]}"
        )
    beside = [file for file in _visible(folder, Path(names[0]).suffix) if file.name not in names]
    present = tuple(folder / name for name in names if name not in absent)
    return CheckpointFiles(folder, present, index, assigned, absent, tuple(beside))


def _one_file(path: Path) -> CheckpointFiles:
    """Returns one file of tensors; if the index of its folder names it, only what the index gives to it is there."""
    if path.suffix == ".gguf" and numbered_siblings(path):
        return CheckpointFiles(path.parent, tuple(_whole_set(path)))
    index = _index_of(path.parent)
    assigned = _weight_map(index) if index is not None else {}
    if path.name not in assigned.values():
        return CheckpointFiles(path, (path,))
    others = sorted(set(assigned.values()) - {path.name})
    absent = dict.fromkeys(others, f"only {path.name} was given; give the folder")
    return CheckpointFiles(path, (path,), index, assigned, absent)


def _whole_set(path: Path) -> list[Path]:
    """Returns all files of a numbered set, each with tensors of its own; raises `ConfigError` if one is not there."""
    files = sorted([path, *(numbered_siblings(path) or [])])
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{path} is one of {len(files)} files, {in_words(missing)} are not there; download them")
    return files


def _gguf_of(folder: Path) -> list[Path]:
    """Returns the GGUF files of a folder if they are one, or one numbered set; another one may be the same again."""
    files = _visible(folder, ".gguf")
    is_one = len(files) == 1 or (files and set(files[1:]) <= set(numbered_siblings(files[0]) or []))
    return _whole_set(files[0]) if is_one else []


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds; raises `FormatError` if it is not one."""
    if not path.is_file():  # opening a FIFO would wait for its writer
        raise ConfigError(f"{path} is not a regular file; put the checkpoint's own file there")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, expected an object; download it again")
    return value


def in_words(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = len(names) - FILES_NAMED_MAX
    return ", ".join(names[:FILES_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


def numbered_siblings(path: Path) -> list[Path] | None:
    """Returns all other files of a set that NAME-00001-of-00003 is one of, there or not; None for other names."""
    match = _NUMBERED.search(path.name)
    if match is None or int(match["parts"]) < 2:
        return None
    width, start, end = len(match["part"]), *match.span("part")
    names = (f"{path.name[:start]}{part:0{width}}{path.name[end:]}" for part in range(1, int(match["parts"]) + 1))
    return [path.with_name(name) for name in names if name != path.name]


def refuse_parts(files: list[Path]) -> None:
    """Refuses files whose names say that each holds one rank's part of the tensors."""
    for file in files:
        if _DISTRIBUTED.match(file.name):
            raise ConfigError(
                f"{file} is one rank's file of a torch.distributed checkpoint (DCP), which is a folder with "
                f"{METADATA_NAME}; give the folder: {file.parent}"
            )
        for named in (file, file.parent):
            parts = rank_parts(named)
            if parts:
                raise ConfigError(split_by_rank(file, parts))


def split_by_rank(file: Path, parts: list[str]) -> str:
    """Returns the message for a file that holds one rank's part of every table."""
    return (
        f"{file} is one part of a checkpoint that was split by rank ({in_words(parts)}): each holds some rows of a "
        "table, or some columns; give the checkpoint as it was published, "
        "or put the parts together with the tool that split it"
    )


def rank_parts(path: Path) -> list[str]:
    """Returns the names of all parts if the name of a file or folder is one rank's of several, else none."""
    match = next((found for found in (name.search(path.name) for name in _RANK_NAMES) if found), None)
    if match is None:
        return []
    start, end = match.span("rank")
    same = re.compile(re.escape(path.name[:start]) + r"\d+" + re.escape(path.name[end:]))
    parts = sorted(other.name for other in path.parent.iterdir() if same.fullmatch(other.name))
    world = match.groupdict().get("world")
    if world is not None:
        return [f"{path.name[:start]}{rank}{path.name[end:]}" for rank in range(int(world))] if int(world) > 1 else []
    return parts if len(parts) > 1 or int(match["rank"]) > 0 else []


def _snapshot_of(folder: Path) -> Path:
    """Returns the snapshot of a repository's folder in the Hugging Face cache; any other folder as it is."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir() or not (folder / "refs").is_dir():
        return folder
    revisions = sorted(each.name for each in snapshots.iterdir() if each.is_dir())
    main = folder / "refs" / "main"
    revision = main.read_text().strip() if main.is_file() else ""
    if revision in revisions:
        return snapshots / revision
    if len(revisions) == 1 and not revision:
        return snapshots / revisions[0]
    raise ConfigError(
        f"{folder} is a repository in the Hugging Face cache, its refs/main names revision {revision or 'none'}, and "
        f"snapshots/ has {in_words(revisions) or 'none'}; give {snapshots}/REVISION, or download it again"
    )


def _index_of(folder: Path) -> Path | None:
    """Returns the index of the folder's checkpoint: the usual one, else the only one;
    None if none says which counts."""
    if (folder / INDEX_NAME).exists():
        return folder / INDEX_NAME
    others = _visible(folder, ".safetensors.index.json")
    if len(others) == 1:
        return others[0]
    has_safetensors = bool(others or _visible(folder, ".safetensors"))
    return folder / TORCH_INDEX_NAME if not has_safetensors and (folder / TORCH_INDEX_NAME).exists() else None


def _visible(folder: Path, suffix: str, prefix: str = "") -> list[Path]:
    """Returns the files of a name, in order; hidden ones, such as the sidecars ._NAME of macOS, are not looked at."""
    names = (file.name for file in folder.iterdir())
    found = sorted(n for n in names if n.endswith(suffix) and n.startswith(prefix) and not n.startswith("."))
    return [folder / name for name in found]


def _weight_map(index: Path) -> dict[str, str]:
    assigned = read_json(index).get("weight_map")
    if not isinstance(assigned, dict) or not assigned or not all(isinstance(name, str) for name in assigned.values()):
        raise FormatError(f"{index}: it has no weight_map of tensor names to file names; download it again")
    if any("/" in name or name.startswith(".") or not name for name in assigned.values()):
        raise FormatError(f"{index}: it names files outside its folder; download it again")
    return assigned


def why_absent(file: Path) -> str:
    """Returns why a file that should be there is not, with the remedy."""
    command = download_of(file)
    by = f": {command}" if command else ""
    if file.is_symlink():
        return f"it is a link to {file.readlink()}, which is not there; download it again{by}"
    unfinished = unfinished_download(file)
    return unfinished or f"it was not downloaded; download it{by}"


def _what_is_there(folder: Path) -> str:
    """Returns what a folder without safetensors files holds instead, and what to give."""
    names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    if any(map(_DISTRIBUTED.match, names)):
        return (
            f"it is a torch.distributed checkpoint (DCP) without {METADATA_NAME}, which the save writes last: it did "
            f"not finish, or each rank kept its own; give another step's folder, or save with collectives"
        )
    repositories = [name for name in names if name.startswith("models--")]
    if repositories:
        return f"it is a Hugging Face cache: give one of its repositories ({in_words(repositories)})"
    inner = [name for name in names if (folder / name).is_dir() and _visible(folder / name, ".safetensors")]
    if inner:
        return f"its folders {in_words(inner)} do: give one of them"
    unfinished = [name for name in names if unfinished_download(folder / name)]
    if unfinished:
        return f"it holds unfinished downloads ({in_words(unfinished)}): finish them"
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"of GGUF files give one by its own name ({in_words(gguf)})"
    torch_files = [name for name in names if name.endswith((".pt", ".pth", ".bin"))]
    if torch_files:
        return f"of PyTorch files give one by its own name ({in_words(torch_files)})"
    return "give the folder of a checkpoint, or one .safetensors or .pt file"
