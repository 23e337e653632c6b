"""The rows of a commit: which records are the newest, and which of them changed since another commit.

Input: a commit, and one to compare with. Output: row ids with the places of their newest records, and these records.
Errors: those of `RunReader`; `ConfigError` if runs of a commit that was forgotten would be needed.

Memory: 18 bytes a row that the commit has, and some MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from .. import kernels
from ..errors import ConfigError, FormatError
from ..formats.run import ROW_IDS_OF_STRETCH, Run, RunLayout
from .commits import Commit
from .runs import RunReader

ROWS_MAX = (1 << 48) - 1
PART_ROWS = 128 * ROW_IDS_OF_STRETCH  # 65,280: by default, that are looked at together
NO_RUN = 65535

LiveRows = tuple[np.ndarray, np.ndarray, np.ndarray]  # row_ids int64 [n], runs uint16 [n], places uint32 [n]


class CommitRows:
    """The records of one table in one commit, open for reading. Any number of threads may read."""

    def __init__(
        self, store: Path, commit: Commit, layout: RunLayout, num_rows: int = ROWS_MAX, io: str = "auto"
    ) -> None:
        """Opens the commit's runs and reads their row ids: at most a microsecond a row. Raises as `RunReader.add` does.

        layout: `layouts_of(training)[table]`. num_rows: of the table.
        """
        self.places = kernels.RowPlaces(num_rows)
        self.reader = RunReader(store, layout, io)
        self._store, self._layout, self._num_rows = store, layout, num_rows
        self._others: dict[Run, RunReader] = {}  # of the commit that `hold` was given
        try:
            self.ordinals = [self.reader.add(run) for run in commit.runs.get(layout.table, ())]
            for ordinal in self.ordinals:
                self.reader.load(ordinal, self.places)
        except BaseException:
            self.close()
            raise

    @property
    def num_found(self) -> int:
        """How many rows have a record."""
        return self.places.num_found

    def hold(self, since: Commit) -> None:
        """Opens the runs that `parts(since)` will need, so that a training that forgets that commit does no harm.

        Raises `ConfigError` if it has forgotten it.
        """
        shared = set(self.reader.runs.values())
        for run in since.runs.get(self._layout.table, ()):
            if run not in shared and run not in self._others:
                self._others[run] = self._open_other(run)

    def parts(self, since: Commit | None = None, part_rows: int = PART_ROWS) -> Iterator[LiveRows]:
        """Yields rows that have a record, each once, run by run in the order of places, out of about part_rows at once.

        With `since`, those alone that may differ from that commit: all that do, and some that were only moved by a
        merge. A row that `since` has a record of and this commit has not, because it was gone back to an earlier one,
        comes with run NO_RUN: its value is the base's. Blocks on the disk.
        """
        shared = set() if since is None else set(since.runs.get(self._layout.table, ()))
        runs = self.reader.runs
        for ordinal in self.ordinals:
            if runs[ordinal] not in shared:
                yield from live_of_run(self.reader, self.places, ordinal, part_rows)
        mine = {runs[ordinal] for ordinal in self.ordinals}
        of_both = np.array(
            [ordinal for ordinal in self.ordinals if runs[ordinal] in shared] + [NO_RUN], dtype=np.uint16
        )
        given = kernels.RowPlaces(self._num_rows)
        for run in sorted(shared - mine, key=lambda run: run.number):
            yield from self._of_other(run, of_both, given, part_rows)

    def read(self, rows: LiveRows, out: np.ndarray) -> None:
        """Reads the records of a part, all of which have one, to out, uint8 [n, record_bytes]. See `RunReader.read`."""
        row_ids, runs, places = rows
        self.reader.read(row_ids, runs, places, out)

    def close(self) -> None:
        """Closes the runs. Any number of times."""
        self.reader.close()
        while self._others:
            self._others.popitem()[1].close()

    def _of_other(self, run: Run, of_both: np.ndarray, given: kernels.RowPlaces, part_rows: int) -> Iterator[LiveRows]:
        """Rows of a run that only the other commit lists, unless they lie in a run that it does not list."""
        row_ids = self._row_ids_of(run)
        for start in range(0, len(row_ids), part_rows):
            part = np.unique(row_ids[start : start + part_rows])
            part = part[_found(given, part)[1] == NO_RUN]
            given.put(part, 0, 0)
            rows, runs, places = _found(self.places, part)
            differs = np.isin(runs, of_both)
            if differs.any():
                yield rows[differs], runs[differs], places[differs]

    def _row_ids_of(self, run: Run) -> np.ndarray:
        """Row ids of a run that this commit does not list."""
        held = self._others.get(run)
        reader = held or self._open_other(run)
        try:
            return reader.row_ids(0)
        finally:
            if held is None:
                reader.close()

    def _open_other(self, run: Run) -> RunReader:
        """Opens a reader of one run that this commit does not list."""
        reader = RunReader(self._store, self._layout, "pread", depth=1, calls=1)
        try:
            reader.add(run)
        except BaseException as error:
            reader.close()
            if isinstance(error, FormatError) and not (self._store / run.file).exists():
                raise ConfigError(
                    f"{self._store / run.file} is gone: the commit to compare with was forgotten, and with it its "
                    f"runs; compare with one that is kept, or with none"
                ) from error
            raise
        return reader

    def __enter__(self) -> CommitRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def live_rows(
    store: Path, commit: Commit, layout: RunLayout, since: Commit | None = None, num_rows: int = ROWS_MAX
) -> LiveRows:
    """Returns all that `CommitRows.parts` yields, in arrays: 14 bytes a row. Runs are indexes in the commit's list."""
    with CommitRows(store, commit, layout, num_rows) as rows:
        parts = list(rows.parts(since))
    if not parts:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.uint32)
    row_ids, runs, places = (np.concatenate(of) for of in zip(*parts, strict=True))
    return row_ids, runs, places


def live_of_run(
    reader: RunReader, places: kernels.RowPlaces, ordinal: int, part_rows: int = PART_ROWS
) -> Iterator[LiveRows]:
    """Yields the live records of a run, in the order of places, out of part_rows at once. Blocks on the disk."""
    step = max(1, part_rows // ROW_IDS_OF_STRETCH) * ROW_IDS_OF_STRETCH
    for start in range(0, reader.runs[ordinal].num_records, step):
        row_ids, runs, found = _found(places, reader.row_ids(ordinal, start, step))
        live = (runs == ordinal) & (found == np.arange(start, start + len(row_ids), dtype=np.uint32))
        if live.any():
            yield row_ids[live], runs[live], found[live]


def _found(places: kernels.RowPlaces, row_ids: np.ndarray) -> LiveRows:
    runs, found = np.empty(len(row_ids), dtype=np.uint16), np.empty(len(row_ids), dtype=np.uint32)
    places.find(row_ids, runs, found)
    return row_ids, runs, found
