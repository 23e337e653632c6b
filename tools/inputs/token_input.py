"""One file that tokens are read from: what its content is, and what a reader needs to know of it.

Input: none. Output: types that the finder, the readers and the command share. Errors: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .fields import CHAT, Field


@dataclass(frozen=True)
class SampleLayout:
    """Where the field lies in each sample of a shard of Mosaic or litdata.

    sizes: bytes of each column, None for those whose size a sample states first, a u32 each; empty if the sample is the
    field. column: the field's place among them. encoding: how its bytes become a document. num_samples: of the file, by
    the index. packing: "", "batch" or "sample": what of litdata's zstd is a frame, within the file.
    """

    sizes: tuple[int | None, ...]
    column: int
    encoding: str
    num_samples: int
    packing: str = ""


FileIdentity = tuple[int, int, int, int]


@dataclass(frozen=True)
class TokenInput:
    """One file. kind: "text", "json-lines", "npy", "raw", "llmc", "megatron", "parquet", "arrow-file", "arrow-stream",
    "mosaic", "litdata" or "tar"; codec: what compressed it, "" for nothing.

    dtype: NumPy's name of the ids of raw, llmc and megatron. field: of lines, columns, samples and members. index:
    Megatron's .idx. layout: of samples. part: (first byte, bytes) of the Arrow file within it, None if it is all.
    unfolds: what compressed a file whose reader seeks, and reads a copy therefore; num_bytes is of the copy.
    """

    path: Path
    kind: str
    num_bytes: int
    codec: str = ""
    dtype: str = ""
    field: Field | None = None
    index: Path | None = None
    layout: SampleLayout | None = None
    part: tuple[int, int] | None = None
    unfolds: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it needs a tokenizer."""
        return self.kind == "text" or (self.field is not None and not self.field.is_ids)

    @property
    def is_chat(self) -> bool:
        """Whether it needs the tokenizer's chat template too."""
        return self.field is not None and self.field.sort == CHAT


class Document(NamedTuple):
    """A text, the messages of a chat in JSON, or ids [tokens]; the bytes of the file that were read for it; its place,
    with the file's path, for errors."""

    content: str | np.ndarray
    input_bytes: int
    where: str


class LeftOut(NamedTuple):
    """A file of a folder that is not traced, and why."""

    path: Path
    why: str


def file_identity(path: Path) -> FileIdentity:
    """Returns what changes if somebody replaces a file or writes to it."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
