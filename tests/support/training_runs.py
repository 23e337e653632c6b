"""Stores with a training, for tests of runs and commits: made of nothing but a catalog."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tierstore.formats.catalog_records import CATALOG_FILE, as_json, write_records
from tierstore.formats.run import Run, RunLayout
from tierstore.training.commits import Commit, create_training, publish_commit
from tierstore.training.run_writer import RunWriter

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


class Trained:
    """A training in memory: the newest record of each row, and the runs that a commit lists."""

    def __init__(self, store: Path, seed: int = 0, first_run: int = 1) -> None:
        self.store, self.rng, self.next_run = store, np.random.default_rng(seed), first_run
        self.rows: dict[str, dict[int, bytes]] = {name: {} for name in LAYOUTS}
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
