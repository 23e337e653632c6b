"""A training in memory, for tests of the model's side: the same faces as `tierstore.Training`, no disk and no cache.

The rule is SGD. It shares no code with what it stands for, and counts pins, so that tests see them end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierstore.errors import ConfigError, StoreNotReadyError
from tierstore.spec import TableSpec
from tierstore.training.optimizers import SGD


@dataclass(frozen=True)
class MemoryCommit:
    number: int
    step: int
    payload: bytes
    digest: str


class MemoryTicket:
    def __init__(self, result: Any = None) -> None:
        self.result = result

    def wait(self, timeout_s: float | None = None) -> Any:
        del timeout_s
        return self.result


class MemoryPins:
    """Pins of rows: released once, by the owner or with it."""

    def __init__(self, table: MemoryTable, num_rows: int) -> None:
        self.table, self.num_rows = table, num_rows
        table.num_pinned += num_rows

    def release(self) -> None:
        self.table.num_pinned -= self.num_rows
        self.num_rows = 0

    __del__ = release


class MemoryTable:
    def __init__(self, training: MemoryTraining, spec: TableSpec, values: np.ndarray, lr: float) -> None:
        self.training, self.spec, self.values, self.lr = training, spec, values, lr
        self.num_steps, self.num_pinned = 0, 0
        self.fail_next: BaseException | None = None  # raised by the next apply, before it changes a row

    def gather(self, row_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        self.training.check()
        out = np.empty((*row_ids.shape, self.spec.dim), np.float32) if out is None else out
        out[...] = self.values[row_ids]
        out[row_ids == -1] = 0
        return out

    def apply(
        self, row_ids: np.ndarray, gradients: np.ndarray, groups: np.ndarray | None = None, lr: float | None = None
    ) -> None:
        self.training.check()
        assert groups is None, "the model's side sums by itself"
        assert len(np.unique(row_ids)) == len(row_ids)
        error, self.fail_next = self.fail_next, None
        if error is not None:
            raise error
        if not np.isfinite(gradients).all():
            raise ValueError(f"table {self.spec.name}: a gradient is not finite")
        rate = np.float32(self.lr if lr is None else lr)
        rows = self.values[row_ids].astype(np.float64) - gradients.astype(np.float64) * np.float64(rate)
        self.values[row_ids] = rows.astype(np.float32)
        self.num_steps += 1
        self.training.has_changes = True

    def pin_rows(self, row_ids: np.ndarray) -> MemoryPins:
        return MemoryPins(self, row_ids.size)


class MemoryTraining:
    def __init__(self, specs: Mapping[str, TableSpec], values: Mapping[str, np.ndarray], lr: float = 0.1) -> None:
        self.tables = {name: MemoryTable(self, spec, values[name].copy(), lr) for name, spec in specs.items()}
        self.optimizer = SGD(lr=lr)
        self.commits: list[MemoryCommit] = []
        self.kept = {0: self._state()}
        self.pinned: set[int] = set()
        self.prefetched: list[dict[str, np.ndarray]] = []
        self.has_changes, self.broken, self.path = False, "", "memory"

    def __getitem__(self, name: str) -> MemoryTable:
        return self.tables[name]

    def check(self) -> None:
        if self.broken:
            raise StoreNotReadyError(f"training {self.path} is broken: {self.broken}")

    def mark_broken(self, reason: str) -> None:
        self.broken = reason

    @property
    def is_broken(self) -> bool:
        return bool(self.broken)

    @property
    def at(self) -> int:
        return self.commits[-1].number if self.commits else 0

    def prefetch(self, requests: Mapping[str, np.ndarray]) -> MemoryTicket:
        self.prefetched.append(dict(requests))
        return MemoryTicket()

    def commit(self, step: int, payload: bytes = b"", together: str | None = None) -> MemoryTicket:  # noqa: ARG002
        self.check()
        number, state = self.at + 1, self._state()
        digest = hashlib.sha256(b"".join(values.tobytes() for values, _ in state.values())).hexdigest()
        self.kept[number] = state
        self.commits.append(MemoryCommit(number, step, payload, digest))
        self.has_changes = False
        return MemoryTicket(self.commits[-1])

    def pin(self, number: int) -> None:
        self.pinned.add(number)

    def unpin(self, number: int) -> None:
        self.pinned.remove(number)

    def rollback(self, number: int) -> None:
        self.check()
        if number not in self.kept:
            raise ConfigError(f"commit {number} is not kept")
        for name, (values, num_steps) in self.kept[number].items():
            self.tables[name].values[...] = values
            self.tables[name].num_steps = num_steps
        self.commits = [commit for commit in self.commits if commit.number <= number]
        self.has_changes = False

    def _state(self) -> dict[str, tuple[np.ndarray, int]]:
        return {name: (table.values.copy(), table.num_steps) for name, table in self.tables.items()}
