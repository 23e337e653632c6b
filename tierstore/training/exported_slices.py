"""The rows of slices' commits, for an export of whole tables.

Input: a `SliceSet` whose stores were trained in lock-step. Output: a `CommitRows` whose streams are those of all
slices, one after the other, under the tables' own row ids. Errors: those of `resliced_commit` and `exported`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import ConfigError
from ..formats.training_records import read_training
from ..layout import TableLayout
from ..offline.exporting.record_streams import RecordPiece
from ..offline.slice_set import SliceSet
from .exported import CommitRows, RunStream
from .optimizers import from_dict
from .resliced_commit import choose_commit


def open_commit_of_slices(
    slices: SliceSet, tables: Mapping[str, TableLayout], number: int | None
) -> SlicesCommitRows | None:
    """Returns the commit of slices, None if none was trained. number: of the first slice's; None: the newest of all.

    tables: the whole tables' layouts. Raises `ConfigError` as `choose_commit`.
    """
    step = None
    if number is not None:
        records = read_training(slices.images[0].path)
        if records is None:
            raise ConfigError(f"{slices.images[0].path} has no commit {number}: it was never trained")
        step = records.commit(number).step
    chosen = choose_commit(slices, step)
    if chosen is None:
        return None
    optimizer = from_dict(dict(chosen.numbers["optimizer"]))
    parts = tuple(
        CommitRows(Path(image.path), commit, optimizer, image.tables)
        for image, commit in zip(slices.images, chosen.commits, strict=True)
    )
    runs = {name: tuple(run for part in parts for run in part.commit.runs.get(name, ())) for name in tables}
    return SlicesCommitRows(parts[0].store, replace(chosen.commits[0], runs=runs), optimizer, tables, parts)


@dataclass(frozen=True)
class SlicesCommitRows(CommitRows):
    """The commit of several slices. commit: the first slice's, with the runs of all."""

    parts: tuple[CommitRows, ...]

    def open_stream(self, name: str) -> RunStream:
        """See `CommitRows`."""
        return SlicesStream(self.parts, name)


class SlicesStream(RunStream):
    """The records of a table's runs in all slices; keeps the `RecordStream` contract."""

    def __init__(self, parts: Sequence[CommitRows], name: str) -> None:
        """Opens the runs and checks their heads. Raises `FormatError`."""
        self._stack = contextlib.ExitStack()
        self._streams: list[tuple[RunStream, int]] = []
        self._layout = parts[0].layout(name)
        try:
            for part in parts:
                if part.commit.runs.get(name):
                    stream = part.open_stream(name)
                    self._stack.callback(stream.close)
                    self._streams.append((stream, part.tables[name].public_spec.row_start))
        except BaseException:
            self.close()
            raise

    def row_ids(self) -> Iterator[np.ndarray]:
        """See `RecordStream`."""
        for stream, row_start in self._streams:
            for row_ids in stream.row_ids():
                yield row_ids + row_start

    def pieces(self) -> Iterator[RecordPiece]:
        """See `RecordStream`."""
        for stream, row_start in self._streams:
            for piece in stream.pieces():
                yield replace(piece, row_ids=piece.row_ids + row_start)

    def close(self) -> None:
        """Closes the runs; twice is harmless."""
        self._stack.close()
