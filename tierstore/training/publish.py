"""Publishes a commit: its rows in the tables' codecs, as a version of the store that readers open or follow.

Input: a store with a training; a kept commit, by default the current one. Output: the version's number; how many rows
it has, and how many of their values did not fit the codec. Errors: `ConfigError` if the store was never trained or has
no such commit, or somebody else publishes; `CorruptPageError` for rows or records that are damaged.

A row is rounded beside the base's row, whatever versions came between: its scale stays while it fits, so that a commit
gives the same bytes here and in an export. What is equal to the newest version's bytes is left out. Training goes on
meanwhile, in this process or another.

Memory: 18 bytes for each row that the commit has, and for each that versions have, and some MiB.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import kernels
from ..decisions.budget import divide_dram
from ..errors import BudgetError, ConfigError, FormatError
from ..formats.catalog import CatalogImage, read_catalog
from ..formats.rates import read_rates
from ..formats.run import RunLayout
from ..formats.training_records import Commit, TrainingRecords, layouts_of, read_training
from ..offline.exporting.quantized import quantized
from ..offline.versions import ChangedRows, Chunks, NothingChangedError, locked_for_publish, write_version
from ..process.progress import OnProgress
from ..spec import TableSpec
from ..store.arguments import table_ids
from ..store.embedded import open_store
from ..store.store import Store
from ..tiers.version_files import VersionFiles
from .live import NO_RUN, CommitRows, LiveRows
from .optimizers import DenseAdam

ATTEMPTS_MAX = 3  # at the newest commit: training may have forgotten the one that was the newest
READ_BYTES = 16 << 20  # of DRAM for rows as they are served now, at least
PART_ROWS = 1 << 14  # quantized and compared at once


@dataclass
class PublishReport:
    """What a publish did.

    Attributes:
        version: The version that has the commit's rows: a new one, unless no row changed, or it is there already.
        commit: The commit's number.
        is_new: Whether it is a new version; a slice has one of each commit, with rows or without.
        rows: By table, how many rows were published.
        saturated: By table, values beyond the codec's largest, which they became.
        not_numbers: By table, values that are NaN.
    """

    version: int
    commit: int
    is_new: bool = True
    rows: dict[str, int] = field(default_factory=dict)
    saturated: dict[str, int] = field(default_factory=dict)
    not_numbers: dict[str, int] = field(default_factory=dict)


def publish(
    path: str | os.PathLike[str], commit: int | None = None, on_progress: OnProgress | None = None
) -> PublishReport:
    """Publishes the rows of a commit, and returns what was done. Blocks on the disk. Any process may call.

    Args:
        path: The store's folder.
        commit: The number of a commit that is kept; None: the one that a training opens at.
        on_progress: Gets (rows done, rows in all) now and then: of all that may have changed.

    Raises:
        ConfigError: The store was never trained, or does not have the commit; another process publishes.
        BudgetError: The disk, or the memory, has too little room.
        CorruptPageError: A row or a record is damaged.
    """
    path = Path(path)
    image = read_catalog(path)
    with locked_for_publish(path):
        for attempt in range(1, ATTEMPTS_MAX + 1):
            image, records = read_catalog(path), _training_of(path)
            wanted = _commit_of(path, records, commit)
            with ExitStack() as stack:
                try:
                    tables = _open_tables(path, image, records, wanted, stack)
                except FormatError:
                    if commit is not None or attempt == ATTEMPTS_MAX or wanted.number in _training_of(path).commits:
                        raise
                    continue  # it was forgotten in between: there is a newer one
                return _publish(path, image, wanted, tables, on_progress)
    raise AssertionError("the last attempt returns or raises")


def _training_of(path: Path) -> TrainingRecords:
    records = read_training(path)
    if records is None:
        raise ConfigError(f"{path} was never trained: open it with tierstore.open_training, and commit")
    return records


def _commit_of(path: Path, records: TrainingRecords, number: int | None) -> Commit:
    number = records.current if number is None else number
    if number is None:
        raise ConfigError(f"{path} has no commit yet: there is nothing to publish")
    return records.commit(number)


def _open_tables(
    path: Path, image: CatalogImage, records: TrainingRecords, commit: Commit, stack: ExitStack
) -> list[_Table]:
    """Opens the commit's runs, and the rows as they are served now and as they were built."""
    served = stack.enter_context(_open_rows(image))
    base = stack.enter_context(_open_rows(image.at_version(0))) if image.version else served
    newest = image.versions[image.version].commit if image.version else None
    drifts = commit.optimizer["optimizer"]["rule"] == DenseAdam.rule  # rows change with every step
    since = records.commits.get(newest) if newest is not None and not drifts else None
    tables = []
    for name, layout in layouts_of(records.training).items():
        if name not in image.tables:
            raise FormatError(f"{path}: its training has table {name}, the store has not; restore the catalog")
        spec = image.tables[name].spec
        rows = stack.enter_context(CommitRows(path, commit, layout, spec.num_rows))
        if since is not None:
            try:
                rows.hold(since)
            except ConfigError:  # training has forgotten it meanwhile
                since = None
        history = _history_of(path, commit, name)
        tables.append(_Table(spec, commit, layout, rows, base, served, image, since, history))
    return tables


def _publish(
    path: Path, image: CatalogImage, commit: Commit, tables: list[_Table], on_progress: OnProgress | None
) -> PublishReport:
    rows_max, report_rows = sum(table.rows_max for table in tables), on_progress or _no_rows

    def on_seen() -> None:
        report_rows(min(rows_max, sum(table.num_seen for table in tables)), rows_max)

    for table in tables:
        table.on_seen = on_seen
    changed = {table.spec.name: ChangedRows(table.rows_max, table.chunks) for table in tables}
    newest = image.versions.get(image.version)
    # Other slices may have rows that changed: all have a version of the commit, or readers would wait for this one's.
    may_be_empty = image.is_slice and (newest is None or newest.commit != commit.number)
    try:
        version = write_version(path, image, changed, commit.number, commit.common, may_be_empty=may_be_empty)
        report = PublishReport(version, commit.number)
    except NothingChangedError:
        report = PublishReport(image.version, commit.number, is_new=False)
    for table in tables:
        name = table.spec.name
        report.rows[name], report.saturated[name] = table.num_rows, table.num_saturated
        report.not_numbers[name] = table.num_nan
    report_rows(rows_max, rows_max)
    return report


def _no_rows(_done: int, _total: int) -> None:
    """Stands in for a callback that the caller did not give."""


def _open_rows(image: CatalogImage) -> Store:
    """Opens the store at an image's version, with as little memory as does."""
    num_bytes = READ_BYTES
    while True:
        try:
            divide_dram(image.tables, num_bytes, touched=image.touched)
            return open_store(image.path, num_bytes, placement="none", threads=1, version=image.version)
        except BudgetError:
            if num_bytes >> 50:
                raise
            num_bytes *= 2


def _history_of(path: Path, commit: Commit, name: str) -> kernels.StepHistory:
    """Returns the steps of a table up to the commit, with the rates that "dense_adam" replays."""
    history = kernels.StepHistory(kernels.Optimizer(**commit.optimizer["optimizer"]))
    rates = None if commit.rates is None else read_rates(path, commit.rates).get(name)
    history.restart(int(commit.optimizer["steps"].get(name, 0)), rates)
    return history


@dataclass
class _Table:
    """What a commit has of one table, beside the rows that readers have now. since: the commit of the newest version;
    None if that is not kept, or rows change without a gradient. num_rows and the others count what `chunks` gave."""

    spec: TableSpec
    commit: Commit
    layout: RunLayout
    rows: CommitRows
    base: Store
    served: Store
    image: CatalogImage
    since: Commit | None
    history: kernels.StepHistory
    on_seen: Callable[[], None] = lambda: None
    num_seen: int = 0
    num_rows: int = 0
    num_saturated: int = 0
    num_nan: int = 0

    @property
    def rows_max(self) -> int:
        """At most so many rows have changed."""
        name = self.spec.name
        if self.since is None:
            rows_max = self.rows.num_found + self.image.touched.get(name, 0)
        else:
            of_both = set(self.commit.runs.get(name, ())) ^ set(self.since.runs.get(name, ()))
            rows_max = sum(run.num_records for run in of_both)
        return min(self.spec.num_rows, rows_max)

    def chunks(self) -> Chunks:
        """Yields (row ids, rows in the codec) that differ from the newest version, in the order of the runs."""
        name = self.spec.name
        for row_ids, runs, places in self._candidates():
            self.num_seen += len(row_ids)
            self.on_seen()
            of_table = table_ids(self.base[name].spec, row_ids)
            old = np.ascontiguousarray(self.base[name].rows(of_table))
            new = old.copy()
            here = runs != NO_RUN  # the others are the base's again: their steps were gone back on
            if here.any():
                new[here] = self._quantized((row_ids[here], runs[here], places[here]), old[here])
            now = old if self.served is self.base else self.served[name].rows(of_table)
            changed = (new != now).any(axis=1)
            self.num_rows += int(changed.sum())
            if changed.any():
                yield row_ids[changed], new[changed]

    def _candidates(self) -> Iterator[LiveRows]:
        """Yields all rows that may differ from the newest version."""
        if self.since is not None:
            yield from self.rows.parts(self.since, PART_ROWS)
            return
        yield from self.rows.parts(None, PART_ROWS)
        yield from self._published_only()

    def _published_only(self) -> Iterator[LiveRows]:
        """Yields rows that versions have and the commit has not, each once."""
        given = kernels.RowPlaces(self.spec.num_rows)
        with contextlib.closing(VersionFiles(self.image, self.image.tables[self.spec.name])) as files:
            for ids in (ids for file in files.files for ids in files.row_ids(file)):
                for part in np.array_split(ids, -(-len(ids) // PART_ROWS)):
                    mine, places = _found(self.rows.places, part)
                    fresh = (mine == NO_RUN) & (_found(given, part)[0] == NO_RUN)
                    given.put(part[fresh], 0, 0)
                    yield part[fresh], mine[fresh], places[fresh]

    def _quantized(self, live: LiveRows, old: np.ndarray) -> np.ndarray:
        """Reads records, brings them to the commit's step and rounds them."""
        records = np.empty((len(old), self.layout.record_bytes), dtype=np.uint8)
        self.rows.read(live, records)
        floats = records.view(np.float32)
        kernels.catch_up_rows(self.history, self.layout.dim, floats)
        made = quantized(np.ascontiguousarray(floats[:, : self.layout.dim]), self.spec, old)
        self.num_saturated += made.num_saturated
        self.num_nan += made.num_nan
        return made.rows


def _found(places: kernels.RowPlaces, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    runs, found = np.empty(len(row_ids), dtype=np.uint16), np.empty(len(row_ids), dtype=np.uint32)
    places.find(row_ids, runs, found)
    return runs, found
