"""A worker that reads columns of Parquet and Arrow files with pyarrow, some rows at a time.

Input: requests {"do": "describe", "path", "format"} and {"do": "read", "path", "format", "column"}. Output: what each
column holds; then batches {"sort", "rows", "bounds", "done", of ids "dtype"} with the places at which rows begin and
the last one ends (rows + 1 integers of the type `bounds`, counted from any number), and the values from the first on.
Errors: `RefusedError` naming the row for what is not a document; pyarrow's own, which say that the file is damaged.

Only the wanted column is decoded. A batch has some BATCH_VALUES values: pyarrow decodes a row group piece by piece, and
of an Arrow file a record batch is in memory at once.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

if not __package__:  # as a program
    sys.modules["numpy"] = None  # type: ignore[assignment]  # pyarrow does without it, and starts in half the time
    gc.disable()  # while it starts, which makes objects and hardly any garbage
import pyarrow as pa
import pyarrow.parquet as pq

if __package__:
    from .worker_messages import Message, RefusedError, memory_argument, serve
else:  # as a program
    gc.enable()
    from worker_messages import Message, RefusedError, memory_argument, serve  # type: ignore[import-not-found,no-redef]

BATCH_VALUES = 1 << 19  # ids, or bytes of text: two pieces of a pipe, so that both sides work
READ_BYTES = 1 << 20  # of a column's pages at once
BATCH_ROWS_MAX = 1 << 16
ELEMENTS_OF_CHAT = ("role", "from")


def handle(head: dict[str, Any], _body: memoryview) -> Iterator[Message]:
    """Answers one request."""
    path, format_, part = head["path"], head["format"], head.get("part")
    if head["do"] == "describe":
        yield _describe(path, format_, part), ()
        return
    row, size = 0, max(1, os.path.getsize(path))
    for batch, done in _BATCHES[format_](path, head["column"], part):
        column = _only_column(batch, head["column"])
        if format_ != "parquet":
            column.validate(full=True)  # offsets come from the file as they are
        for start, count in _cut(column):
            yield _document_rows(column.slice(start, count), row, min(1.0, done / size))
            row += count


def _opened(path: str, part: list[int] | None) -> Any:
    """The file, or the part of it (first byte, bytes) that is an Arrow file, which is in memory then."""
    source = pa.OSFile(path)
    if part is None:
        return source
    with source:
        source.seek(part[0])
        return pa.BufferReader(source.read_buffer(part[1]))


def _describe(path: str, format_: str, part: list[int] | None) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if format_ == "parquet":
            file = stack.enter_context(pq.ParquetFile(path))
            schema, rows = file.schema_arrow, file.metadata.num_rows
        else:
            source = stack.enter_context(_opened(path, part))
            opened = pa.ipc.open_file(source) if format_ == "arrow-file" else pa.ipc.open_stream(source)
            schema, rows = stack.enter_context(opened).schema, None
        names = [field.name for field in schema]
        twice = {name for name in names if names.count(name) > 1}
        fields = [[field.name, None if field.name in twice else _sort(field.type), str(field.type)] for field in schema]
        return {"fields": fields, "rows": rows}


def _sort(kind: pa.DataType) -> str | None:
    """What a column of this type holds: "text", "ids", "chat", None for anything else."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if _is_text(kind):
        return "text"
    if _is_list(kind):
        inner = kind.value_type
        if pa.types.is_integer(inner.value_type if pa.types.is_dictionary(inner) else inner):
            return "ids"
        if pa.types.is_struct(inner) and any(inner.get_field_index(name) >= 0 for name in ELEMENTS_OF_CHAT):
            return "chat"
    return None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    checks: tuple[Callable[[pa.DataType], bool], ...] = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(check(kind) for check in checks)


def _parquet_batches(path: str, column: str, _part: Any) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Yields (rows of the column, about how many bytes of the file they and those before took)."""
    with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
        size = os.path.getsize(path)
        rows_done, rows = 0, max(1, file.metadata.num_rows)
        for group in range(file.metadata.num_row_groups):
            facts = file.metadata.row_group(group)
            count = max(1, facts.num_rows)
            each = max(1, _weight(facts, column) // count)  # values, or bytes of text, of a row
            batch_rows = max(1, min(BATCH_VALUES // each, BATCH_ROWS_MAX, count))
            for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[column], use_threads=False):
                rows_done += batch.num_rows
                yield batch, size * rows_done / rows


def _weight(facts: Any, column: str) -> int:
    """Values of a column in a row group, or the bytes of its pages if those are more."""
    for index in range(facts.num_columns):
        chunk = facts.column(index)
        if chunk.path_in_schema == column or chunk.path_in_schema.startswith(column + "."):
            is_text = chunk.physical_type == "BYTE_ARRAY"
            return int(max(chunk.num_values, chunk.total_uncompressed_size if is_text else 0))
    return 0


def _arrow_file_batches(path: str, column: str, part: list[int] | None) -> Iterator[tuple[pa.RecordBatch, float]]:
    with _opened(path, part) as source:
        schema = pa.ipc.open_file(source).schema
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(column)], use_threads=False)
        file = pa.ipc.open_file(source, options=options)
        for index in range(file.num_record_batches):
            yield file.get_batch(index), source.tell()


def _arrow_stream_batches(path: str, column: str, part: list[int] | None) -> Iterator[tuple[pa.RecordBatch, float]]:
    with _opened(path, part) as source:
        schema = pa.ipc.open_stream(source).schema
        source.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(column)], use_threads=False)
        for batch in pa.ipc.open_stream(source, options=options):
            yield batch, source.tell()


_BATCHES: dict[str, Callable[[str, str, Any], Iterator[tuple[pa.RecordBatch, float]]]] = {
    "parquet": _parquet_batches,
    "arrow-file": _arrow_file_batches,
    "arrow-stream": _arrow_stream_batches,
}


def _only_column(batch: pa.RecordBatch, column: str) -> pa.Array:
    """The column of a batch, as plain values."""
    array = batch.column(column)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _cut(column: pa.Array) -> Iterator[tuple[int, int]]:
    """Yields (first row, rows) of parts of a column that have some BATCH_VALUES values, at least a row each."""
    each = max(1, column.nbytes // max(1, len(column)) // 4)
    rows = max(1, BATCH_VALUES // each)
    for start in range(0, len(column), rows):
        yield start, min(rows, len(column) - start)


def _document_rows(column: pa.Array, row: int, done: float) -> Message:
    """Returns the answer for some rows; row: the index of the first in its file."""
    if column.null_count:
        missing = next(index for index, valid in enumerate(column.is_valid()) if not valid.as_py())
        raise RefusedError("row", f"row {row + missing} is null, expected a document")
    sort = _sort(column.type)
    head = {"sort": sort, "rows": len(column), "done": done}
    if sort == "chat":
        texts = [json.dumps(messages, default=str).encode() for messages in column.to_pylist()]
        bounds = pa.array([0, *itertools.accumulate(map(len, texts))], type=pa.int64())
        return head | {"bounds": _dtype(bounds)}, (_bytes_of(bounds), b"".join(texts))
    if sort == "text":
        bounds, data = _text_parts(column)
        return head | {"bounds": _dtype(bounds)}, (_bytes_of(bounds), data[bounds[0].as_py() : bounds[-1].as_py()])
    bounds, values = _list_parts(column)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.null_count:
        places = bounds.to_pylist()
        index = places[0] + next(index for index, valid in enumerate(values.is_valid()) if not valid.as_py())
        at = bisect.bisect_right(places, index) - 1
        raise RefusedError("row", f"row {row + at} has null at place {index - places[at]}, expected token ids")
    return head | {"bounds": _dtype(bounds), "dtype": _dtype(values)}, (_bytes_of(bounds), _bytes_of(values))


def _text_parts(column: pa.Array) -> tuple[pa.Array, memoryview]:
    """Returns (the rows' bounds, the bytes that they count in)."""
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    offsets, data = column.buffers()[1:]
    kind = pa.int64() if pa.types.is_large_string(column.type) else pa.int32()
    bounds = pa.Array.from_buffers(kind, len(column) + 1, [None, offsets], offset=column.offset)
    return bounds, memoryview(b"" if data is None else data)


def _list_parts(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Returns (the rows' bounds, the values from the first to the last of them).

    Not `flatten` if it can be helped: it loads pyarrow.compute, which takes as long as 5 million ids.
    """
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        bounds = column.offsets
        start, end = bounds[0].as_py(), bounds[-1].as_py()
        return bounds, column.values.slice(start, end - start)
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        start = column.offset * size
        bounds = pa.array([start + size * index for index in range(len(column) + 1)], type=pa.int64())
        return bounds, column.values.slice(start, size * len(column))
    lengths = column.value_lengths().to_pylist()  # views may lie anywhere, in any order
    return pa.array([0, *itertools.accumulate(lengths)], type=pa.int64()), column.flatten()


def _dtype(array: pa.Array) -> str:
    """NumPy's name of the type of integers."""
    kind = array.type
    return f"<{'i' if pa.types.is_signed_integer(kind) else 'u'}{kind.bit_width // 8}"


def _bytes_of(array: pa.Array) -> memoryview:
    """The bytes of integers without nulls. Not by way of NumPy, which is not loaded here."""
    data = array.buffers()[1]
    if data is None:
        return memoryview(b"")
    width = array.type.bit_width // 8
    return memoryview(data)[array.offset * width : (array.offset + len(array)) * width]


if __name__ == "__main__":
    serve(handle, memory_argument())
