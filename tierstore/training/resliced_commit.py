"""The commit of several slices, brought to other slices: which commit it is, and its records in new runs.

Input: a `SliceSet` whose stores were trained in lock-step; a new store that holds rows of it. Output: that store's
first commit. Errors: `ConfigError` for slices that hold no commit of one step, or whose commits are not of one
training; `CorruptPageError` for a damaged record. Records are copied as they are, bit for bit.

Memory: 18 bytes a row that a slice's commit has, one slice and table at a time, and some MiB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..formats.catalog import CatalogImage
from ..formats.rates import read_rates
from ..formats.run import RunLayout
from ..formats.training_records import TrainingRecords, layouts_of, read_training
from ..layout import TableLayout
from ..offline.slice_set import SliceSet
from .commits import Commit, create_training, publish_commit
from .live import CommitRows
from .opened import layout_of
from .optimizers import from_dict
from .run_writer import RunWriter
from .writer_lock import WriterLock

STEPS_NAMED_MAX = 8  # in a message
READ_BYTES = 4 << 20  # of records at once
_NOT_ALIKE = "slices are joined if all were trained in the same steps"


@dataclass(frozen=True)
class SlicesCommit:
    """The commits of one step, one of each store of a set, in its order."""

    commits: tuple[Commit, ...]
    rates: Mapping[str, np.ndarray] | None

    @property
    def step(self) -> int:
        """The training's step."""
        return self.commits[0].step

    @property
    def digests(self) -> list[str]:
        """The commits that it is made of."""
        return [commit.digest for commit in self.commits]

    @property
    def numbers(self) -> dict[str, Any]:
        """What commits keep of the optimizer."""
        return dict(self.commits[0].optimizer)


def choose_commit(slices: SliceSet, step: int | None) -> SlicesCommit | None:
    """Returns the newest commit whose step all slices hold, or that of `step`; None if no slice has a commit.

    Raises `ConfigError` if there is not one, or the slices were not trained alike.
    """
    held = [_by_step(image) for image in slices.images]
    if not any(held):
        if step is not None:
            raise ConfigError(f"step {step}: {slices.images[0].path} has no commit, and no other slice has")
        return None
    common = set.intersection(*(set(of) for of in held))
    if not common or (step is not None and step not in common):
        wanted = "a step that all slices hold" if step is None else f"step {step} in every slice"
        lists = "; ".join(
            f"{image.path} holds {_steps_text(of)}" for image, of in zip(slices.images, held, strict=True)
        )
        raise ConfigError(f"there is no commit of {wanted}: {lists}")
    commits = tuple(of[max(common) if step is None else step] for of in held)
    _check_alike(slices.images, commits)
    rates = [
        None if commit.rates is None else read_rates(Path(image.path), commit.rates)
        for image, commit in zip(slices.images, commits, strict=True)
    ]
    for image, of in zip(slices.images, rates, strict=True):
        if not _same_rates(rates[0], of):
            raise ConfigError(f"{slices.images[0].path} and {image.path} had different learning rates: {_NOT_ALIKE}")
    return SlicesCommit(commits, rates[0])


def _by_step(image: CatalogImage) -> dict[int, Commit]:
    """Returns the commits of a store up to the one that it opens at, the newest of each step."""
    records = read_training(image.path)
    if records is None or records.current is None:
        return {}
    _check_build(image, records)
    return {commit.step: commit for number, commit in sorted(records.commits.items()) if number <= records.current}


def _check_build(image: CatalogImage, records: TrainingRecords) -> None:
    if records.training.get("build") != image.base_identity:
        raise ConfigError(f"{image.path} was built anew since its training began: its commits are of other rows")


def _steps_text(of: Mapping[int, Commit]) -> str:
    steps = sorted(of)[-STEPS_NAMED_MAX:]
    return f"steps {', '.join(map(str, steps))}" if steps else "no commit"


def _check_alike(images: Sequence[CatalogImage], commits: Sequence[Commit]) -> None:
    first = commits[0].optimizer
    for image, commit in zip(images, commits, strict=True):
        if commit.optimizer["optimizer"] != first["optimizer"]:
            raise ConfigError(
                f"{images[0].path} was trained with {first['optimizer']}, {image.path} with "
                f"{commit.optimizer['optimizer']}: {_NOT_ALIKE}"
            )
        if commit.optimizer["steps"] != first["steps"]:
            raise ConfigError(
                f"at step {commit.step}, {images[0].path} has applied {first['steps']} steps, {image.path} "
                f"{commit.optimizer['steps']}: {_NOT_ALIKE}"
            )
        if commit.optimizer.get("together") != first.get("together"):
            raise ConfigError(
                f"{images[0].path} and {image.path} have commits of step {commit.step} that ranks did not make "
                f"together: {_NOT_ALIKE}"
            )


def _same_rates(one: Mapping[str, np.ndarray] | None, other: Mapping[str, np.ndarray] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def write_commit(store: Path, image: CatalogImage, slices: SliceSet, chosen: SlicesCommit) -> None:
    """Writes the chosen commit's records of the rows that a new store holds, and publishes them as its first commit.

    image: the new store's. Blocks on the disk. If it is killed, the store has no commit, and what was written goes with
    the next call.
    """
    optimizer = from_dict(dict(chosen.numbers["optimizer"]))
    layouts = {name: layout_of(table, optimizer) for name, table in image.tables.items()}
    with WriterLock(store), contextlib.ExitStack() as stack:
        if read_training(store) is None:
            record = {
                "build": image.base_identity,
                "optimizer": optimizer.to_dict(),
                "layouts": {name: layout.to_dict() for name, layout in layouts.items()},
            }
            create_training(store, record)
        records = read_training(store)
        assert records is not None, "it was just made"
        written = _Runs(store, records.last_run, stack)
        for name, table in image.tables.items():
            written.begin(name, layouts[name])
            for commit, (part, layout) in _parts_of(slices, chosen, table):
                for row_ids, rows in _records(commit, part, layout, table):
                    written.add(row_ids, rows)
            written.end()
        publish_commit(
            store,
            step=chosen.step,
            payload=chosen.commits[0].payload,
            runs=written.runs,
            unnamed=written.writers,
            optimizer=chosen.numbers,
            rates=chosen.rates,
        )


class _Runs:
    """The runs of one commit on their way: records of one table after the other. `stack` discards what is not kept."""

    def __init__(self, store: Path, last_run: int, stack: contextlib.ExitStack) -> None:
        self._store, self._number, self._stack = store, last_run, stack
        self._name, self._layout = "", RunLayout("", 1, 0, 0)
        self._writer: RunWriter | None = None
        self.writers: list[RunWriter] = []
        self.runs: dict[str, list[Any]] = {}

    def begin(self, name: str, layout: RunLayout) -> None:
        self._name, self._layout = name, layout
        self.runs[name] = []

    def add(self, row_ids: np.ndarray, records: np.ndarray) -> None:
        """Adds records, uint8 [n, record_bytes]."""
        done = 0
        while done < len(row_ids):
            if self._writer is None:
                self._number += 1
                self._writer = self._stack.enter_context(RunWriter(self._store, self._number, self._layout))
            buffer = self._writer.buffer()
            part = np.s_[done : done + len(buffer)]
            ids = row_ids[part]
            buffer[: len(ids), : records.shape[1]] = records[part]
            self._writer.write(len(ids), ids)
            done += len(ids)
            if self._writer.is_full:
                self.end()

    def end(self) -> None:
        """Finishes the run, if one was begun."""
        if self._writer is not None:
            self.runs[self._name].append(self._writer.finish())
            self.writers.append(self._writer)
            self._writer = None


def _parts_of(
    slices: SliceSet, chosen: SlicesCommit, table: TableLayout
) -> Iterator[tuple[Commit, tuple[CatalogImage, TableLayout]]]:
    commits = {image.path: commit for image, commit in zip(slices.images, chosen.commits, strict=True)}
    spec = table.public_spec
    for image, layout in slices.parts(spec.name, spec.row_start, spec.row_end):
        yield commits[image.path], (image, layout)


def _records(
    commit: Commit, image: CatalogImage, layout: TableLayout, table: TableLayout
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the records of a slice's commit that belong to another table's rows: (row ids there, records)."""
    store, spec, name = Path(image.path), table.public_spec, layout.spec.name
    records = read_training(store)
    run_layout = layouts_of(records.training)[name] if records is not None else None
    if run_layout is None or not commit.runs.get(name):
        return
    shift = layout.public_spec.row_start - spec.row_start
    with CommitRows(store, commit, run_layout, layout.spec.num_rows) as rows:
        for row_ids, runs, places in rows.parts():
            mine = np.flatnonzero((row_ids + shift >= 0) & (row_ids + shift < spec.own_rows))
            step = max(1, READ_BYTES // run_layout.record_bytes)
            for start in range(0, len(mine), step):
                part = mine[start : start + step]
                out = np.empty((len(part), run_layout.record_bytes), dtype=np.uint8)
                rows.read((row_ids[part], runs[part], places[part]), out)
                yield row_ids[part] + shift, out
