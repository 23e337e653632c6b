"""Columns of Parquet and Arrow files as documents, a row each, by a worker process that has pyarrow.

Input: a path, what `content` says it is, and the field. Output: `Piece`s of ids, or texts, in bounded memory.
Errors: those of `WorkerProcess`; `ConfigError` without pyarrow, and for a file that unfolds to far more than it holds;
`ValueError` naming file, row and place for ids outside the vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tierstore.errors import FormatError
from tierstore.extras import missing
from tierstore.formats.trace import check_token_ids

from .fields import CHAT, Field, NoField, choose_field
from .ids import Piece
from .processes import WorkerProcess
from .token_input import Document
from .unfolding import Unfolding

KINDS = {"parquet", "arrow-file", "arrow-stream"}


class ColumnReader:
    """Reads columns; use it with `with`. The worker is started for the first file and ends with the last."""

    def __init__(self) -> None:
        self._worker = WorkerProcess("column_worker")

    def field_of(
        self, path: Path, kind: str, wanted: str | None, part: tuple[int, int] | None = None
    ) -> Field | NoField:
        """Returns which column of a file holds documents. kind: of KINDS. wanted: the user's name for it.

        part: (first byte, bytes) of the Arrow file within it, None if it is all.
        """
        if importlib.util.find_spec("pyarrow") is None:
            raise missing(f"{path}: a file of columns", "data", ImportError("No module named 'pyarrow'"))
        answers = list(self._worker.ask(path, {"do": "describe", "path": str(path), "format": kind, "part": part}))
        fields = answers[0][0]["fields"]
        found = choose_field({name: sort for name, sort, _ in fields}, wanted, "it")
        if isinstance(found, NoField) and (dtype := {name: dtype for name, _, dtype in fields}.get(wanted or "")):
            return NoField(f"its column {wanted} is {dtype}, which is neither text nor lists of integers")
        return found

    def id_pieces(
        self, path: Path, kind: str, field: Field, vocab_size: int | None, part: tuple[int, int] | None = None
    ) -> Iterator[Piece]:
        """Yields the ids of a column of lists, a document a row. They are overwritten by those of the next piece."""
        row = 0
        for head, ends, values, taken in self._batches(path, kind, field, part):
            ids = np.frombuffer(values, dtype=head["dtype"])
            if len(ends) == 0 or int(ends[-1]) != len(ids) or (np.diff(ends, prepend=0) < 0).any():
                raise FormatError(f"{path}: rows from {row} on do not add up to their {len(ids)} ids; copy it again")
            _check_rows(ids, ends, vocab_size, path, row)
            yield Piece(ids, ends, taken)
            row += len(ends)

    def texts(self, path: Path, kind: str, field: Field, part: tuple[int, int] | None = None) -> Iterator[Document]:
        """Yields the text of each row. Of chat the messages in JSON."""
        row = 0
        for head, ends, values, taken in self._batches(path, kind, field, part):
            start = 0
            for end in ends.tolist():
                data = bytes(values[start:end])
                start = end
                yield Document(data.decode(errors="replace"), taken, f"{path}, row {row}")
                row, taken = row + 1, 0
            if start != len(values) or head["sort"] not in (field.sort, CHAT):
                raise FormatError(f"{path}: a batch of {len(values)} bytes has texts of {start}; copy it again")

    def _batches(
        self, path: Path, kind: str, field: Field, part: tuple[int, int] | None
    ) -> Iterator[tuple[dict[str, Any], np.ndarray, memoryview, int]]:
        """Yields (head, where each row ends in the values, int64 [rows], values, bytes of the file that they took).

        The values are overwritten by the next ones.
        """
        size = path.stat().st_size
        unfolding, done = Unfolding(path, size), 0
        request = {"do": "read", "path": str(path), "format": kind, "column": field.name, "part": part}
        for head, body in self._worker.ask(path, request):
            dtype = np.dtype("<i8" if head["bounds"] == "<i8" else "<i4")
            bounds_bytes = (head["rows"] + 1) * dtype.itemsize
            bounds = np.frombuffer(body[:bounds_bytes], dtype=dtype).astype(np.int64)
            unfolding.add(len(body) - bounds_bytes)
            taken = max(0, int(head["done"] * size) - done)
            done += taken
            yield head, bounds[1:] - bounds[0], body[bounds_bytes:], taken

    def __enter__(self) -> ColumnReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.close()


def _check_rows(ids: np.ndarray, ends: np.ndarray, vocab_size: int | None, path: Path, row: int) -> None:
    """Checks the ids of rows, of which the first is `row`; names row and place of one outside the vocabulary."""
    try:
        check_token_ids(ids, vocab_size, str(path))
    except ValueError:
        for index, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
            check_token_ids(ids[start:end], vocab_size, f"{path}, row {row + index}")
        raise
