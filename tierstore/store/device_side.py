"""What a store does for a device: lookups that its kernels make, and what its memory holds.

Input: names of tables; tensors on the device, which the lookups that are opened here take. Output: those lookups.
Errors: `StoreNotReadyError` for a store without an hbm tier.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from ..errors import ConfigError, StoreNotReadyError
from ..tiers.engine import DeviceEngine
from .arguments import checked_range
from .opened import OpenedStore
from .table import Table


class DeviceSide:
    """The part of `Store` that is about its hbm tier."""

    _opened: OpenedStore

    def __getitem__(self, name: str) -> Table:
        """Returns a table by its name."""
        raise NotImplementedError

    @property
    def device(self) -> Any:
        """The `torch.device` of the hbm tier, on which `open_lookup` looks up; None without one."""
        return self._opened.engine.device

    def capture_probe(self) -> Callable[[], bool]:
        """Returns a function that says whether a CUDA graph is being captured on the current stream of `device`."""
        from ..tiers.hbm.device import is_capturing

        return partial(is_capturing, self.device)

    def open_lookup(self, name: str, tokens_max: int) -> Any:
        """Returns buffers for lookups from the device, of up to tokens_max tokens at once: a `DeviceLookup`.

        The adapter's embeddings use it. It may be for fewer tokens, as its `tokens_max` says, where a quarter of the
        page-locked memory holds no more. Its buffers live until the store is closed. Raises `BudgetError` where they do
        not fit in the page-locked memory, `StoreNotReadyError` if there is no hbm tier, or not any more, `ConfigError`
        for a slice whose keys are row ids, or that has none.
        """
        if self[name].spec.is_slice and self[name].spec.local.is_plain:
            raise ConfigError(f"table {name} is a slice whose rows no key gives on a device; look it up from the host")
        return self._device_engine(name, tokens_max).open_lookup(self[name].index, tokens_max)

    def open_rows(self, name: str, tokens_max: int, *, within: tuple[int, int] | None = None) -> Any:
        """Returns buffers for lookups by row id from the device, as an inference engine asks: a `DeviceRows`.

        Its `look_up(row_ids, out)`, or `start` and `finish`, only launch, and so can be captured in a CUDA graph. All
        memory that they need is taken here: open before the capture. A batch of more tokens than `tokens_max`, or than
        a quarter of the page-locked memory holds, goes in parts. The buffers live until the store is closed.

        Args:
            name: The table's.
            tokens_max: The most tokens of one batch.
            within: (start, end), a range of row ids. Ids outside of it give zero rows, whatever they are; None: those
                outside of the table. Nothing is raised for them: a kernel cannot.

        Raises:
            StoreNotReadyError: There is no hbm tier, or not any more.
            BudgetError: The buffers do not fit in the page-locked memory.
            ConfigError: Row ids of the table do not give keys; it is a slice; a graph is being captured.
            TypeError, ValueError: within is not a range of the table's rows.
        """
        table = self[name]
        if table.spec.is_slice:
            raise ConfigError(f"table {name} is a slice: a device takes keys of it, not row ids; use open_lookup")
        wanted = checked_range((0, table.spec.num_rows) if within is None else within, table.spec)
        return self._device_engine(name, tokens_max).open_rows(table.index, tokens_max, wanted)

    def _device_engine(self, name: str, tokens_max: int) -> DeviceEngine:
        engine = self._opened.unrecorded_engine()  # a trace has no lookups from the device
        if not isinstance(engine, DeviceEngine):
            raise StoreNotReadyError(
                f"table {name} of {tokens_max} tokens: this store has no hbm tier; open it with hbm="
            )
        return engine

    def quiet(self) -> AbstractContextManager[None]:
        """A time in which a CUDA graph can be captured, in any mode, by any thread: `with store.quiet(): ...`.

        CUDA ends a capture in global mode if any thread of the process allocates, synchronises, page-locks or copies to
        the host. So this waits until what the store has under way on the device has ended. Until it ends, lookups that
        were opened before launch as ever; lookups from the host read past HBM; `stats` has the device's counts of
        before; `open_lookup`, `open_rows`, `change_hbm`, and moves to another version or epoch of a daemon wait, and
        raise `ConfigError` in the thread that holds it. Do not close the store meanwhile. Without an hbm tier it does
        nothing. Raises `TimeoutError`.
        """
        engine = self._opened.unrecorded_engine()
        return engine.quiet() if isinstance(engine, DeviceEngine) else contextlib.nullcontext()

    def change_hbm(self, placement: int | None = None) -> int:
        """Brings another placement's hottest entries into the hbm tier, under running lookups; returns its epoch.

        placement: its number, None for the current one. What lookups give is the same before, meanwhile and after;
        captured graphs stay good. DRAM keeps the placement that the store was opened with. Blocks on disk and device.
        Raises `ConfigError` (no hbm tier, no such placement), `FormatError` (it is damaged,
        or the store was built anew).
        """
        return self._opened.backing.change_hbm(placement)
