"""Which rows an export has new: those of a commit of the training, or of a published version.

Input: a store, and a commit or a version. Output: `TouchedTables`, which sort the rows of one table after another.
Errors: `ConfigError` for commits and versions that are not there, and for codecs in which no rows are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tierstore.errors import ConfigError
from tierstore.formats.catalog import CatalogImage
from tierstore.offline.exporting.quantized import kernel_codec
from tierstore.offline.exporting.row_readers import RowOrigin
from tierstore.offline.exporting.touched_rows import TouchedRows, sort_touched_rows
from tierstore.training.exported import CommitRows, Encoder, RunStream, describe, open_commit

FILES_A_TABLE = 2  # records lie on disk once in stretches, and once sorted


@dataclass
class TouchedTables:
    """The rows that an export has new.

    Attributes:
        commit: The number of the commit that they are of, or None.
        version: The number of the version that they are of, or None; 0: no row is new.
        rows: The commit; None without one.
        streams: Its records by table, open until `close`.
        saturated: Changed values beyond the codec's largest, by table, of what was sorted so far.
        with_states: Whether optimizer state is kept.
    """

    commit: int | None = None
    version: int | None = None
    with_states: bool = False
    rows: CommitRows | None = None
    streams: dict[str, RunStream] = field(default_factory=dict)
    saturated: dict[str, int] = field(default_factory=dict)

    @property
    def tables(self) -> Sequence[str]:
        """Names of the tables that have new rows."""
        return [] if self.rows is None else self.rows.touched_tables

    @property
    def about(self) -> Mapping[str, Any]:
        """What files of optimizer state say of themselves."""
        return {} if self.rows is None else describe(self.rows)

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk that sorting takes meanwhile, at most."""
        if self.rows is None:
            return 0
        return sum(
            FILES_A_TABLE * run.num_records * (8 + self.rows.layout(name).record_bytes)
            for name in self.tables
            for run in self.rows.commit.runs[name]
        )

    def close(self) -> None:
        """Closes the runs; twice is harmless."""
        for stream in self.streams.values():
            stream.close()

    def sort(self, name: str, base: RowOrigin, folder: Path, memory_bytes: int) -> TouchedRows:
        """Sorts the new rows of a table into files of a new folder. Blocks on the disk.

        base: the table's rows before any training: bytes that have not changed stay as they are.
        """
        assert self.rows is not None
        encoder = Encoder(self.rows, name, base, self.with_states)
        num_rows = self.rows.tables[name].spec.num_rows
        touched = sort_touched_rows(self.streams[name], num_rows, folder, memory_bytes, encoder)
        if encoder.num_nan:
            raise ConfigError(
                f"table {name}: {encoder.num_nan} values of commit {self.commit} are not numbers; export an older "
                f"commit ('tierstore commits')"
            )
        self.saturated[name] = encoder.num_saturated
        return touched


def open_touched(image: CatalogImage, version: int | None, commit: int | None, *, states: bool) -> TouchedTables:
    """Returns the new rows of a commit or a version; of neither: of the newest commit, if there is one.

    Raises `ConfigError` for one that is not there, `ValueError` for both, and for states of a version.
    """
    if version is not None and commit is not None:
        raise ValueError(f"version {version} and commit {commit}: an export has the rows of one of them; give one")
    if version is not None and states:
        raise ValueError(f"states of version {version}: optimizer state is kept with commits; give one, or none")
    if version == 0:
        return TouchedTables(version=0)
    if version is not None:
        raise ConfigError(f"{image.path} has no version {version}")
    rows = open_commit(image, commit)
    if rows is None:
        if states:
            raise ConfigError(f"{image.path} was never trained: there is no optimizer state")
        return TouchedTables()
    for name in rows.touched_tables:
        kernel_codec(rows.tables[name].spec)  # refuses codecs before anything is written
    touched = TouchedTables(commit=rows.commit.number, with_states=states, rows=rows)
    try:
        for name in rows.touched_tables:
            touched.streams[name] = rows.open_stream(name)
    except BaseException:
        touched.close()
        raise
    return touched
