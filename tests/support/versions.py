"""Versions of a small store for tests: random rows that are published, and all rows of every version."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tierstore.offline.versions import ChangedRows, publish_rows

from .stores import Model


@dataclass
class VersionedModel:
    """A model whose store has versions. rows: of each version, by table; version 0 is the model's own."""

    model: Model
    store: Path
    rows: list[dict[str, np.ndarray]]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(77))

    def at(self, version: int) -> Model:
        """The model with a version's rows."""
        return replace(self.model, rows=self.rows[version])

    def touched(self, name: str, version: int) -> np.ndarray:
        """Which rows of a table versions have changed, bool [num_rows]."""
        return (self.rows[version][name] != self.rows[0][name]).any(axis=1)

    def draw(self, part: float = 0.2) -> dict[str, ChangedRows]:
        """Draws the next version: new values for a part of the rows of each table, but in every second version of the
        last one."""
        rows = {name: of_table.copy() for name, of_table in self.rows[-1].items()}
        names = list(rows)
        if len(self.rows) % 2 == 0 and len(names) > 1:
            names.pop()
        changed = {}
        for name in names:
            ids = self.rng.permutation(len(rows[name]))[: max(1, int(len(rows[name]) * part))]
            rows[name][ids] = self.rng.integers(0, 256, (len(ids), rows[name].shape[1]), dtype=np.uint8)
            changed[name] = ChangedRows.of(ids, rows[name][ids])
        self.rows.append(rows)
        return changed

    def publish(self, part: float = 0.2) -> int:
        """Draws and publishes a version; returns its number."""
        number = publish_rows(self.store, self.draw(part))
        assert number == len(self.rows) - 1
        return number


def make_versions(model: Model, store: Path, count: int, part: float = 0.2) -> VersionedModel:
    """Publishes `count` versions of a built store."""
    versions = VersionedModel(model, store, [model.rows])
    for _ in range(count):
        versions.publish(part)
    return versions
