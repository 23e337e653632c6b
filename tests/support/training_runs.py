"""Stores with a training, for tests of runs and commits: made of nothing but a catalog."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tierstore.formats.catalog_records import CATALOG_FILE, as_json, write_records
from tierstore.formats.run import Run, RunLayout
from tierstore.training.commits import Commit, create_training, go_back, pin, publish_commit, read_training
from tierstore.training.live import CommitRows
from tierstore.training.run_writer import RunWriter
from tierstore.training.writer_lock import WriterLock

LAYOUTS = {name: RunLayout(name, dim=dim, state_floats=1, seed=seed) for name, dim, seed in (("a", 8, 1), ("b", 30, 2))}
NUM_ROWS = 5000


def make_training(store: Path) -> Path:
    """A catalog with a training of two tables."""
    store.mkdir(exist_ok=True)
    write_records(store / CATALOG_FILE, {"format": as_json({"format_version": 1})})
    create_training(store, {"layouts": {name: layout.to_dict() for name, layout in LAYOUTS.items()}})
    return store


def records_of(rng: np.random.Generator, layout: RunLayout, num: int) -> np.ndarray:
    """Random records as they lie in memory, uint8 [num, record_bytes], their padding zeros."""
    records = np.zeros((num, layout.record_bytes), dtype=np.uint8)
    records[:, : layout.float_bytes] = rng.integers(0, 256, (num, layout.float_bytes), dtype=np.uint8)
    return records


def written(
    store: Path, number: int, layout: RunLayout, row_ids: np.ndarray, records: np.ndarray, buffer_bytes: int = 1 << 16
) -> tuple[RunWriter, Run]:
    """Writes a run in as many buffers as it takes; it is not synced, and has not its name."""
    writer = RunWriter(store, number, layout, buffer_bytes)
    start = 0
    while start < len(row_ids):
        buffer = writer.buffer()
        part = records[start : start + len(buffer)]
        buffer[:] = 0xEE  # what a buffer held before must not show
        buffer[: len(part), : part.shape[1]] = part
        writer.write(len(part), row_ids[start : start + len(part)])
        start += len(part)
    return writer, writer.finish()


Rows = dict[str, dict[int, bytes]]  # the newest record of each row, by table


@dataclass(frozen=True)
class State:
    """What a catalog should say: the current commit, and what each kept one holds."""

    current: int | None
    commits: dict[int, Rows]


def content_of(store: Path, commit: Commit) -> Rows:
    """All records of a commit, by table and row."""
    found: Rows = {name: {} for name in LAYOUTS}
    for name, layout in LAYOUTS.items():
        with CommitRows(store, commit, layout, NUM_ROWS, io="pread") as rows:
            for part in rows.parts(part_rows=977):
                out = np.empty((len(part[0]), layout.record_bytes), dtype=np.uint8)
                rows.read(part, out)
                found[name] |= {row: record.tobytes() for row, record in zip(part[0].tolist(), out, strict=True)}
    return found


class Trained:
    """A training in memory: the newest record of each row, and the runs that a commit lists."""

    def __init__(self, store: Path, seed: int = 0) -> None:
        self.store, self.rng, self.next_run = store, np.random.default_rng(seed), 1
        self.rows: Rows = {name: {} for name in LAYOUTS}
        self.runs: dict[str, list[Run]] = {name: [] for name in LAYOUTS}
        self.unnamed: list[RunWriter] = []

    def spill(self, name: str, num: int) -> None:
        """Changes rows of a table and writes them to a run."""
        row_ids = self.rng.permutation(NUM_ROWS)[:num].astype(np.int64)
        records = records_of(self.rng, LAYOUTS[name], num)
        writer, run = written(self.store, self.next_run, LAYOUTS[name], row_ids, records)
        self.next_run += 1
        self.unnamed.append(writer)
        self.runs[name].append(run)
        self.rows[name] |= {int(row): record.tobytes() for row, record in zip(row_ids, records, strict=True)}

    def commit(self, step: int, payload: bytes = b"", rates: dict[str, np.ndarray] | None = None) -> Commit:
        """Publishes what was spilled."""
        optimizer = {"steps": dict.fromkeys(LAYOUTS, step)}
        commit = publish_commit(
            self.store,
            step=step,
            payload=payload,
            runs=self.runs,
            unnamed=self.unnamed,
            optimizer=optimizer,
            rates=rates,
        )
        self.close()
        return commit

    def close(self) -> None:
        for writer in self.unnamed:
            writer.discard()
        self.unnamed.clear()


def is_state(store: Path, state: State) -> bool:
    """Whether a store is in a state, with all that its commits hold."""
    records = read_training(store)
    assert records is not None
    if (records.current, list(records.commits)) != (state.current, list(state.commits)):
        return False
    return all(content_of(store, records.commits[number]) == rows for number, rows in state.commits.items())


def begin(store: Path) -> tuple[Trained, State]:
    """A training with two commits; the first has a run that the second has not."""
    trained = Trained(make_training(store), seed=6)
    rows = {}
    for step in (1, 2):
        trained.rows["a"], trained.runs["a"] = {}, []
        trained.spill("a", 60)
        trained.spill("b", 40)
        rows[trained.commit(step).number] = {name: dict(of) for name, of in trained.rows.items()}
    return trained, State(2, rows)


def third_commit(store: Path, trained: Trained) -> Rows:
    """Makes another commit of what `begin` left, in a copy of its store; returns what it holds."""
    again = Trained(store, seed=7)
    again.next_run = trained.next_run
    again.rows = {name: dict(of) for name, of in trained.rows.items()}
    again.runs = {name: list(of) for name, of in trained.runs.items()}
    with WriterLock(store):
        try:
            again.spill("a", 30)
            again.spill("b", 30)
            again.commit(3, rates={"a": np.ones(9)})
        finally:
            again.close()
    return again.rows


def play(store: Path, mark: Callable[[int], None]) -> list[State]:
    """Commits, pins and goes back, always the same; `mark` is called after each act that changes the catalog.

    Returns the states, the first that before anything happened.
    """
    trained, states = Trained(store, seed=5), [State(None, {})]
    by_number: dict[int, Rows] = {}

    def done(commit: Commit | None = None) -> None:
        if commit is not None:
            by_number[commit.number] = {name: dict(rows) for name, rows in trained.rows.items()}
        records = read_training(store)
        assert records is not None
        states.append(State(records.current, {number: by_number[number] for number in records.commits}))
        mark(len(states) - 1)

    with WriterLock(store):
        for step in (1, 2, 3):
            for name, num in (("a", 300), ("b", 100), ("a", 50)):
                trained.spill(name, num)
            done(trained.commit(step, payload=f"{step}".encode(), rates={"a": np.ones(step)}))
            if step == 2:
                pin(store, 1)
                done()
        records = go_back(store, 2)
        done()
        trained.rows = {name: dict(rows) for name, rows in by_number[2].items()}
        trained.runs = {name: list(runs) for name, runs in records.commits[2].runs.items()}
        trained.runs["b"] = []  # as after a merge: what only these runs have is gone from later commits
        trained.rows["b"] = {}
        trained.spill("b", 80)
        done(trained.commit(4))
        trained.spill("a", 40)
        done(trained.commit(5))
    return states
