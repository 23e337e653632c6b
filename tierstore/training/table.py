"""One table of an open training: values out, gradients in.

Input: row ids, gradients. Output: float32 values. Errors: `TypeError` and `ValueError` for arrays of other types,
shapes and ranges than the table has, and for gradients that are not finite; `StoreNotReadyError` if the training is
closed or broken.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import kernels
from ..spec import TableSpec
from ..store.arguments import checked_ids, local_ids, refuse_outside
from .health import Health
from .optimizers import DenseAdam, Optimizer
from .rows import CachedRows
from .step import Step

STEP_MAX = 2**31 - 1


class RowPins:
    """Rows that stay in DRAM until `release`, or until nobody holds this. Any thread may call."""

    def __init__(self, pins: kernels.RowPins) -> None:
        """`TrainingTable.pin_rows` is the way in."""
        self._pins = pins
        self._lock = threading.Lock()  # guards `_pins`, which one thread at a time uses

    def release(self) -> None:
        """Lets the rows go. Any number of times."""
        with self._lock:
            self._pins.release()


class StepParts:
    """What the steps of all tables share: one is taken at a time."""

    def __init__(self, scratch_bytes: int, threads: int) -> None:
        self.lock = threading.Lock()  # held by the one step, or freeze, or rollback
        self.update = kernels.RowUpdate(scratch_bytes)
        self.threads = threads
        self.num_changes = 0  # steps that were taken, and steps that were set; guarded by `lock`


class TrainingTable:
    """One table of a `Training`, which closes it. One thread takes steps."""

    def __init__(
        self,
        spec: TableSpec,
        rows: CachedRows,
        parts: StepParts,
        optimizer: Optimizer,
        health: Health,
        wait_for: Callable[[str, np.ndarray], None],
    ) -> None:
        """wait_for: waits for prefetches of distinct rows of a table."""
        self._spec, self._rows, self._parts, self._health = spec, rows, parts, health
        self._lr, self._replays_steps = optimizer.lr, isinstance(optimizer, DenseAdam)
        self._wait_for = wait_for

    def __repr__(self) -> str:
        return f"<tierstore.TrainingTable {self._spec.name}: {self._spec.num_rows} rows>"

    @property
    def spec(self) -> TableSpec:
        """What the table is: rows, codec, address map, fingerprint. Frozen."""
        return self._spec

    @property
    def rows(self) -> CachedRows:
        """Where its records are; for the training itself."""
        return self._rows

    @property
    def num_steps(self) -> int:
        """How many steps were applied; Adam's bias correction counts with it. Kept with a commit."""
        self._health.check_open()
        return int(self._rows.cache.num_steps)

    def set_step(self, step: int) -> None:
        """Sets `num_steps`: for states that come from elsewhere.

        Raises `ValueError` for a step outside of what a table counts. `DenseAdam` keeps the rate of each step, so it
        cannot skip any: apply no gradients instead.
        """
        step = operator.index(step)
        self._health.check()  # a forked child may find the lock held, for ever
        with self._parts.lock:
            self._health.check()
            if not 0 <= step <= STEP_MAX:
                raise ValueError(f"table {self._spec.name}: step {step} is outside 0 to {STEP_MAX}")
            if self._replays_steps and step != self.num_steps:
                raise ValueError(
                    f"table {self._spec.name}: DenseAdam is at step {self.num_steps} and cannot be set to {step}; "
                    f"apply no row ids for each step that is skipped"
                )
            self._parts.num_changes += step != self.num_steps
            self._rows.cache.set_steps(step, np.empty(0))

    def gather(self, row_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Returns the values of rows, as they are now. Blocks on the disk for rows that DRAM does not hold.

        Args:
            row_ids: int64 [...], any strides; row id -1 gives zeros.
            out: float32 [..., dim], C-contiguous, filled and returned; None: a new array.

        Returns:
            A copy, float32 [..., dim].

        Raises:
            TypeError, ValueError: Another type or shape, or an id outside the table.
            CorruptPageError: A row cannot be read as it was written.
        """
        ids = checked_ids(row_ids, "row_ids")
        shape = (*ids.shape, self._spec.dim)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        _check_floats(out, shape, "out")
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError("out must be C-contiguous and writable")
        flat = self._checked_rows(ids)
        self._health.check()  # a forked child may find the lock held, for ever
        with self._parts.lock:
            self._health.check()
            self._rows.gather(flat, out.reshape(-1, self._spec.dim), self._wait)
        return out

    def _wait(self, rows: np.ndarray) -> None:
        self._wait_for(self._spec.name, rows)

    def _checked_rows(self, ids: np.ndarray) -> np.ndarray:
        """Returns a flat copy of row ids, checked: what another thread does to the caller's cannot matter."""
        flat = np.array(ids, dtype=np.int64, order="C", copy=True).reshape(-1)
        return self.local_rows(flat)

    def local_rows(self, row_ids: np.ndarray) -> np.ndarray:
        """Returns row ids, int64 [R], as the table's records are counted; refuses those of no row, or another slice.

        For the training itself.
        """
        refuse_outside(self._spec, row_ids)
        return local_ids(self._spec, row_ids)

    def apply(
        self,
        row_ids: np.ndarray,
        gradients: np.ndarray,
        groups: np.ndarray | None = None,
        lr: float | None = None,
    ) -> None:
        """Takes one step of the optimizer on the rows that are given. Blocks on the disk for rows DRAM does not hold.

        Gradients of equal ids are summed in float32: within a group in the order of the batch, then the groups' sums
        in the order of their numbers. So the bits depend on the groups, and on no thread, cache or disk.

        An exception leaves all rows as they were. If it comes too late for that (Ctrl-C, a disk that fails), the
        training is broken.

        Args:
            row_ids: int64 [...], any strides; -1: the gradient is dropped.
            gradients: float32 [..., dim], one for each row id.
            groups: int32 [...], the group of each row id, 0 or more; None: all are of one group, as torch's dense
                backward sums.
            lr: The learning rate of this step; None: the optimizer's.

        Raises:
            TypeError, ValueError: Another type, shape or range; or a sum of gradients that is not finite: then no row
                was changed.
        """
        ids = checked_ids(row_ids, "row_ids")
        _check_floats(gradients, (*ids.shape, self._spec.dim), "gradients")
        if groups is not None and (groups.dtype != np.int32 or groups.shape != ids.shape):
            raise TypeError(
                f"groups are {groups.dtype} {list(groups.shape)}, expected int32 {list(ids.shape)}: one for each row id"
            )
        rate = self._lr if lr is None else float(lr)
        if not 0 <= rate < float("inf"):
            raise ValueError(f"lr is {lr}, must be finite and at least 0")
        flat = np.ascontiguousarray(gradients).reshape(-1, self._spec.dim)
        step = Step(self._rows, self._parts.update, rate, self._parts.threads, self._health.check_whole)
        steps_before = None
        self._health.check()
        try:
            with self._parts.lock:
                self._health.check()
                steps_before = self._rows.cache.num_steps
                self._begin(ids, flat, groups)
                step.take()
                self._parts.num_changes += 1
                self._parts.update.end()
                if self._rows.has_too_many_dirty() and self._rows.spill is not None:
                    self._rows.spill()
        except BaseException as error:
            self._parts.update.end()
            if step.is_half or (steps_before is not None and self._rows.cache.num_steps != steps_before):
                self._health.mark_broken(f"a step of table {self._spec.name} was interrupted: {error!r}")
            raise

    def _begin(self, ids: np.ndarray, gradients: np.ndarray, groups: np.ndarray | None) -> None:
        flat = np.ascontiguousarray(ids).reshape(-1)
        if self._spec.is_slice:
            flat = self.local_rows(flat.copy())
        of = None if groups is None else np.ascontiguousarray(groups).reshape(-1)
        place, is_group = self._parts.update.begin(flat, gradients, of, self._spec.own_rows)
        if place >= 0 and is_group:
            assert of is not None
            raise ValueError(f"table {self._spec.name}: group {of[place]} is below 0; groups are 0 or more")
        if place >= 0:
            refuse_outside(self._spec.local, flat)
            raise ValueError(f"table {self._spec.name}: row ids changed while they were read")

    def pin_rows(self, row_ids: np.ndarray) -> RowPins:
        """Brings rows, int64 [...], into DRAM and keeps them there until the handle is released, or dropped.

        Blocks on the disk. Results do not depend on it. Half of the table's cache may be pinned at a time; what goes
        beyond is not.

        Raises:
            TypeError, ValueError: As `gather`.
        """
        flat = self._checked_rows(checked_ids(row_ids, "row_ids"))
        self._health.check()  # a forked child may find the lock held, for ever
        with self._parts.lock:
            self._health.check()
            return RowPins(self._rows.pin(kernels.distinct_rows(flat, self._spec.own_rows)[0], self._wait))

    @contextmanager
    def pinned(self, row_ids: np.ndarray) -> Iterator[None]:
        """Keeps rows, int64 [...], in DRAM while the body runs, as `pin_rows` does."""
        pins = self.pin_rows(row_ids)
        try:
            yield
        finally:
            pins.release()

    def stats(self) -> dict[str, Any]:
        """Returns counters: references found and missed, rows read; slots and dirty rows now; bytes."""
        self._health.check_open()
        return {**self._rows.stats(), "num_steps": self.num_steps}


def _check_floats(array: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{what}: {found}, expected a NumPy array of float32 (of a tensor: tensor.numpy())")
    if array.shape != shape:
        raise ValueError(f"{what}: {list(array.shape)}, expected {list(shape)}: one row of values for each row id")
