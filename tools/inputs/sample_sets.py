"""The index.json of a Mosaic (MDS) or litdata data set: which files it has, in which order, and where a field lies.

Input: a `DataSet`, the field and the type of raw bytes that the user gave. Output: a `TokenInput` for each file, in
the order of the index. Errors: `FormatError` for an index that is not one or disagrees with its files; `ConfigError`
for a field that is missing, holds other things, or is compressed or encrypted in a way that is not read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tierstore.errors import ConfigError, FormatError
from tierstore.formats.content import HEAD_BYTES, recognise

from .byte_streams import CODECS
from .columns import ColumnReader
from .fields import IDS, TEXT, Field, NoField, choose_field
from .folders import DataSet
from .ids import RAW_DTYPES
from .samples import MOSAIC_DTYPES, NUMPY_DTYPES, TORCH_DTYPES
from .token_input import SampleLayout, TokenInput

_ARROW_MARK = b"LDARW01\0"
_MOSAIC_NAMES = {np.dtype(dtype).name: dtype for dtype in MOSAIC_DTYPES.values()}


def inputs_of(data_set: DataSet, columns: ColumnReader, field: str | None, dtype: str | None) -> list[TokenInput]:
    """Returns the files of a data set. columns: looks into chunks of litdata's that are Arrow files.

    dtype: one of RAW_DTYPES, of columns of bytes that do not say their own.
    """
    index_path = data_set.folder / "index.json"
    try:
        if data_set.kind == "mosaic":
            return [_mosaic_input(data_set.folder, shard, field, dtype) for shard in data_set.index["shards"]]
        chunks = [_within(data_set.folder, chunk["filename"]) for chunk in data_set.index["chunks"]]
        if chunks and (part := _arrow_part(chunks[0])) is not None:
            found = columns.field_of(chunks[0], "arrow-file", field, part)
            return [_arrow_input(chunk, found) for chunk in chunks]
        return _litdata_inputs(data_set.folder, data_set.index, field)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError, OverflowError) as error:
        raise FormatError(
            f"{index_path} lacks what an index of {data_set.kind} has ({type(error).__name__}: {error}); copy the "
            f"folder again, or write it with a current version"
        ) from error


def _mosaic_input(folder: Path, shard: dict[str, Any], wanted: str | None, dtype: str | None) -> TokenInput:
    where = folder / "index.json"
    if shard["format"] != "mds" or shard["version"] != 2:
        raise ConfigError(
            f"{where}: a shard of format {shard['format']!r}, version {shard['version']!r}, expected mds, version 2; "
            f"write it as MDS"
        )
    encodings = dict(zip(shard["column_names"], shard["column_encodings"], strict=False))
    sizes = tuple(int(size) if size else None for size in shard["column_sizes"])
    if not len(encodings) == len(sizes) == len(shard["column_encodings"]) or any(size and size < 0 for size in sizes):
        raise FormatError(f"{where}: {len(encodings)} columns and {len(sizes)} sizes of them; copy the folder again")
    decoded = {name: _of_mosaic(str(encoding), dtype) for name, encoding in encodings.items()}
    field = _chosen(where, {name: each and each[0] for name, each in decoded.items()}, wanted, encodings)
    assert field.name is not None
    encoding = decoded[field.name]
    assert encoding is not None
    layout = SampleLayout(sizes, list(encodings).index(field.name), encoding[1], int(shard["samples"]))
    path, codec = _mosaic_file(folder, shard)
    return TokenInput(path, "mosaic", path.stat().st_size, codec, field=field, layout=layout)


def _of_mosaic(encoding: str, dtype: str | None) -> tuple[str, str] | None:
    """What a column holds and how it is decoded; None if it is neither text nor ids."""
    name, *arguments = encoding.split(":")
    if name == "str":
        return TEXT, "text"
    if name == "json":
        return IDS, "json"
    if name == "bytes":
        return (IDS, f"raw:{np.dtype(RAW_DTYPES[dtype]).str}") if dtype else None
    if name != "ndarray" or (arguments and arguments[0] not in _MOSAIC_NAMES):
        return None
    if not arguments:
        return IDS, "mosaic"
    return IDS, f"{'raw' if len(arguments) > 1 else 'mosaic'}:{_MOSAIC_NAMES[arguments[0]]}"


def _mosaic_file(folder: Path, shard: dict[str, Any]) -> tuple[Path, str]:
    """Returns the file of a shard that is there, the plain one first, and what compressed it."""
    plain, packed = shard["raw_data"], shard["zip_data"]
    path = _within(folder, plain["basename"])
    if path.is_file() or not packed:
        _check_size(path, int(plain["bytes"]))
        return path, ""
    path = _within(folder, packed["basename"])
    _check_size(path, int(packed["bytes"]))
    return path, _codec_of(path)


def _litdata_inputs(folder: Path, index: dict[str, Any], wanted: str | None) -> list[TokenInput]:
    where, config = folder / "index.json", index["config"]
    if config.get("encryption"):
        raise ConfigError(f"{where}: its chunks are encrypted; write them without encryption")
    packing = str(config.get("compression_level") or "") if config.get("compression") else ""
    if packing not in ("", "chunk", "batch", "sample"):
        raise ConfigError(f"{where}: its chunks are compressed by {packing}, which is not known; write them without")
    packing = packing.removeprefix("chunk")
    leaves = [str(leaf) for leaf in config["data_format"]]
    decoded = [_of_litdata(leaf) for leaf in leaves]
    names = _names_of_leaves(json.loads(config["data_spec"]), len(leaves))
    if len(leaves) == 1 and decoded[0] is not None and (wanted is None or wanted == names[0]):
        field = Field(names[0], decoded[0][0])
    else:
        sorts = {name: each and each[0] for name, each in zip(names, decoded, strict=True)}
        field = _chosen(where, sorts, wanted, dict(zip(names, leaves, strict=True)))
    column = names.index(str(field.name))
    encoding = decoded[column]
    assert encoding is not None
    sizes = () if config.get("item_loader") == "TokensLoader" else (None,) * len(leaves)
    inputs = []
    for chunk in index["chunks"]:
        path = _within(folder, chunk["filename"])
        codec = _codec_of(path) if config.get("compression") and not packing else ""
        if not codec:
            _check_size(path, int(chunk["chunk_bytes"]))
        layout = SampleLayout(sizes, column, encoding[1], int(chunk["chunk_size"]), packing)
        inputs.append(TokenInput(path, "litdata", path.stat().st_size, codec, field=field, layout=layout))
    return inputs


def _arrow_part(path: Path) -> tuple[int, int] | None:
    """Returns (first byte, bytes) of the Arrow file that a chunk ends in; None if it does not.

    litdata puts rows with lists into one, behind a table whose items are all empty; its length u32 and a mark follow.
    """
    if not path.is_file():
        return None  # its name is in the error of the index
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 12))
        tail = file.read(12)
    num_bytes = int.from_bytes(tail[:4], "little")
    start = size - 12 - num_bytes
    return (start, num_bytes) if len(tail) == 12 and tail.endswith(_ARROW_MARK) and start >= 0 else None


def _arrow_input(path: Path, found: Field | NoField) -> TokenInput:
    part = _arrow_part(path)
    if part is None:
        raise FormatError(f"{path} is missing or does not end in an Arrow file, as the first chunk does; copy it again")
    if isinstance(found, NoField):
        raise ConfigError(f"{path}: {found.why}; name the right column with --field")
    return TokenInput(path, "arrow-file", path.stat().st_size, field=found, part=part)


def _of_litdata(leaf: str) -> tuple[str, str] | None:
    """What a leaf holds and how it is decoded; None if it is neither text nor ids."""
    name, _, code = leaf.partition(":")
    if name in ("str", "string", "text"):
        return TEXT, "text"
    if name in ("tensor", "numpy"):
        return IDS, "torch" if name == "tensor" else "numpy"
    if name in ("no_header_tensor", "no_header_numpy"):
        dtypes = TORCH_DTYPES if name == "no_header_tensor" else NUMPY_DTYPES
        dtype = dtypes.get(int(code)) if code.isdigit() else None
        return None if dtype is None else (IDS, f"raw:{dtype}")
    return None


def _names_of_leaves(spec: Any, num_leaves: int) -> list[str]:
    """Names of the leaves of a sample: the keys of a dict of leaves, else their numbers."""
    tree = spec[1] if isinstance(spec, list) and len(spec) == 2 else {}
    keys = json.loads(tree["context"]) if isinstance(tree.get("context"), str) else None
    if tree.get("type") == "builtins.dict" and isinstance(keys, list) and len(keys) == num_leaves:
        return [str(key) for key in keys]
    return [str(number) for number in range(num_leaves)]


def _chosen(where: Path, sorts: dict[str, str | None], wanted: str | None, encodings: dict[str, Any]) -> Field:
    """The field of documents; raises `ConfigError` that says what there is."""
    found = choose_field(sorts, wanted, "the data set")
    if isinstance(found, Field):
        return found
    named = wanted if wanted is not None else next((name for name in encodings if encodings[name] == "bytes"), None)
    if named in encodings and encodings[named] == "bytes":
        raise ConfigError(
            f"{where}: column {named} is bytes, which do not say their type; give --dtype (int64, as llm-foundry "
            f"writes them by default, or another of {', '.join(RAW_DTYPES)}) and --field {named}"
        )
    if named in encodings:
        raise ConfigError(f"{where}: {named} is {encodings[named]}, which is neither text nor integers; name another")
    assert isinstance(found, NoField)
    raise ConfigError(f"{where}: {found.why}; name the right field with --field")


def _within(folder: Path, name: Any) -> Path:
    """Returns a file of a data set; raises `FormatError` for a name that leads out of its folder."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise FormatError(f"{folder / 'index.json'} lists a file {name!r:.100}, outside its folder; write it again")
    return folder / name


def _check_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise FormatError(f"{path} is missing, the index.json lists it; copy the folder again")
    if path.stat().st_size != num_bytes:
        raise FormatError(
            f"{path} has {path.stat().st_size} bytes, its index.json says {num_bytes}: it was cut; copy the folder "
            f"again"
        )


def _codec_of(path: Path) -> str:
    if not path.is_file():
        raise FormatError(f"{path} is missing, the index.json lists it; copy the folder again")
    with path.open("rb") as file:
        content = recognise(file.read(HEAD_BYTES), path.stat().st_size)
    if content is not None and content.kind in CODECS:
        return content.kind
    raise ConfigError(
        f"{path} is compressed in a way that is not read ({', '.join(CODECS)} are); decompress it beside its index"
    )
