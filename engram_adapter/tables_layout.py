"""Which files an export of tables alone consists of, when no checkpoint is there whose layout could be copied.

Input: the catalog, and where each table's rows come from. Output: safetensors files with the tables' tensors under
their published names, an index if there are several, and files of optimizer state. Errors: `ConfigError` for tables
whose tensors have no known names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tierstore.formats.catalog import CatalogImage
from tierstore.formats.checkpoint_files import INDEX_NAME
from tierstore.formats.safetensors_file import divide, file_names, head_bytes, index_bytes
from tierstore.offline.exporting.new_files import NewFile
from tierstore.offline.exporting.parts import BytesPart, FilePart, Part, RowsPart
from tierstore.offline.exporting.touched_rows import ROW_IDS, ROWS, TouchedRows

from .export_layout import TableRows
from .hash_spec import HashSpec
from .named_tensors import NamedTensor, tensors_of_tables

STATES_FOLDER = "states"


def lay_out_tables(image: CatalogImage, rows: Mapping[str, TableRows]) -> list[NewFile]:
    """Returns the files of tensors of all tables, their index last."""
    specs = [table.spec for table in image.tables.values()]
    hash_spec = None if all(spec.is_plain for spec in specs) else HashSpec.from_catalog(image)
    tensors = tensors_of_tables(specs, hash_spec)
    groups = [tensors[part] for part in divide([tensor.num_bytes for tensor in tensors])]
    names = file_names(len(groups))
    files = [
        NewFile(name, (BytesPart(_head(group)), *(_part(image, tensor, rows) for tensor in group)))
        for name, group in zip(names, groups, strict=True)
    ]
    if len(files) == 1:
        return files
    file_of = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = index_bytes(file_of, sum(tensor.num_bytes for tensor in tensors))
    return [*files, NewFile(INDEX_NAME, (BytesPart(index),), is_last=True)]


def _head(tensors: Sequence[NamedTensor]) -> bytes:
    return head_bytes([(each.name, each.dtype, each.shape, each.num_bytes) for each in tensors])


def _part(image: CatalogImage, tensor: NamedTensor, rows: Mapping[str, TableRows]) -> Part:
    if tensor.values is not None:
        return BytesPart(tensor.values)
    table = rows[tensor.table]
    return RowsPart(
        tensor.row_start,
        tensor.shape[0],
        tensor.column_start,
        tensor.width_bytes,
        image.tables[tensor.table].spec.row_bytes,
        table.stored,
        table.touched,
    )


def lay_out_states(touched: Mapping[str, TouchedRows], about: Mapping[str, Any]) -> list[NewFile]:
    """Returns a file of optimizer state for each table: `row_ids`, `values`, and the optimizer's own parts.

    about: what the files' metadata says, each value as JSON: commit, step, optimizer.
    """
    files = []
    for name, rows in touched.items():
        metadata = {key: json.dumps(value) for key, value in about.items()} | {"table": name}
        outputs = [ROW_IDS, *(output for output in rows.widths if output != ROWS)]
        tensors, parts = [], []
        for output in outputs:
            path = rows.file(output)
            num_bytes = path.stat().st_size
            dtype, item = ("I64", 8) if output == ROW_IDS else ("F32", 4)
            width = num_bytes // rows.num_rows // item
            shape = (rows.num_rows,) if width == 1 and output != "values" else (rows.num_rows, width)
            tensors.append((output, dtype, shape, num_bytes))
            parts.append(FilePart(path, 0, num_bytes))
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80]
        head = BytesPart(head_bytes(tensors, metadata))
        files.append(NewFile(f"{STATES_FOLDER}/{readable}.safetensors", (head, *parts)))
    return files
