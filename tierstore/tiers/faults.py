"""Names what went wrong in a native lookup: which page, record or resource, and what to do about it.

Input: a fault as the C++ side knows it (kernels/cpu/job.h): a kind and three numbers. Output: the exception to raise.
Holds no engine, so that an engine that holds this is freed as soon as nobody else names it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import kernels
from ..errors import CorruptPageError, StoreNotReadyError
from ..formats.page import FAULTS, fault_text, repair_command
from ..formats.version_rows import REMEDY
from .in_place import BlockNames, block_cut
from .placed import fault_text as entry_fault_text


def closed_error(what: str) -> StoreNotReadyError:
    """Returns the error of a lookup in a closed store; `what` names the store."""
    return StoreNotReadyError(f"{what} is closed, as it is when nobody holds it; open it again")


@dataclass(frozen=True)
class FaultNames:
    """The `make_fault` of a `kernels.Engine`. Any thread may call it.

    what: names the store; table_names: in the engine's order; placement_path: of the placement file, if there is one;
    bad_pages: (table, page number) of resident tables that could not be loaded -> why, filled by the engine; in_place:
    what names blocks, of tables in place, by index. versions: of tables by index, their files of versions' rows, oldest
    first: the path of each and its version. served: of tables whose shards another process serves, by index: what makes
    the error of (page, kind, detail).
    """

    what: str
    table_names: Sequence[str]
    placement_path: Path | None
    bad_pages: Mapping[tuple[int, int], str]
    in_place: Mapping[int, BlockNames] = field(default_factory=dict)
    versions: Mapping[int, Sequence[tuple[str, int]]] = field(default_factory=dict)
    served: Mapping[int, Callable[[int, str, int], Exception]] = field(default_factory=dict)

    def __call__(self, kind: str, index: int, page: int, detail: int) -> BaseException:
        """Returns the exception for a fault in table `index`.

        Args:
            kind: "closed", "cancelled", "timeout", "forked", "memory", "page", "disk" or "entry".
            index: the table's index.
            page: a page number; for "entry", a record number of the placement file.
            detail: seconds for "timeout", a page status for "page", else an errno, below 0 if the file ends early.
        """
        if kind == "closed":
            return closed_error(self.what)
        if kind == "cancelled":
            return StoreNotReadyError(f"{self.what}: the lookup was given up; its buffer holds no rows")
        if kind == "timeout":
            return TimeoutError(
                f"{self.what}: no page came, or no staging came free, within {detail} s; the disk has stopped answering"
            )
        if kind == "forked":
            return StoreNotReadyError(f"{self.what}: the lookup was under way in the parent when this process forked")
        if kind == "memory":
            return MemoryError(
                f"{self.what}: no memory for the lookup's own bookkeeping, or for a page reader; nothing of it is "
                f"lost: look up fewer keys at once, or free memory"
            )
        if kind in ("disk", "page") and self._is_served(index, page):
            return self.served[index](page, kind, detail)
        if kind in ("disk", "entry") and detail == errno.EBADF:
            return StoreNotReadyError(
                f"{self.what}: a descriptor of its files or of its I/O ring is closed, and this store did not close "
                f"it: look for os.close or os.closerange in this process; then open the store again"
            )
        return self._damage(kind, index, page, detail)

    def _is_served(self, index: int, page: int) -> bool:
        return index in self.served and not page & kernels.VERSION_READ and (index, page) not in self.bad_pages

    def _damage(self, kind: str, index: int, page: int, detail: int) -> CorruptPageError:
        """Returns the error of a page or a record that cannot be read as it was written."""
        table_name = self.table_names[index]
        if kind == "entry":
            assert self.placement_path is not None, "only a placement file has records"
            return CorruptPageError(entry_fault_text(table_name, self.placement_path, page, detail))
        where = f"page {page} of table {table_name}"
        if index in self.versions and page & kernels.VERSION_READ:
            return self._version_damage(kind, index, page, detail)
        if (index, page) in self.bad_pages:
            return CorruptPageError(self.bad_pages[index, page])
        if index in self.in_place:
            names = self.in_place[index]
            where = names.where(page)
            if names.is_block(page) and (kind == "page" or detail < 0):
                return CorruptPageError(names.fault(page) if kind == "page" else block_cut(where))
        if kind == "page":
            return CorruptPageError(fault_text(where, detail))
        if detail < 0:
            return CorruptPageError(
                f"{where}: its shard ends before it; it was cut while open; repair it: {repair_command()}"
            )
        return CorruptPageError(
            f"{where} cannot be read: {os.strerror(detail)}; check the disk, then run 'tierstore verify'"
        )

    def _version_damage(self, kind: str, index: int, page: int, detail: int) -> CorruptPageError:
        number = page & ~kernels.VERSION_READ
        path, version = self.versions[index][number >> kernels.VERSION_SHIFT]
        where = f"page {number & ((1 << kernels.VERSION_SHIFT) - 1)} of the rows of version {version} ({path})"
        if kind == "page":
            return CorruptPageError(f"{where}, table {self.table_names[index]}: {FAULTS[detail]}; {REMEDY}")
        why = "the file ends before it" if detail < 0 else os.strerror(detail)
        return CorruptPageError(f"{where}, table {self.table_names[index]}, cannot be read: {why}; {REMEDY}")
