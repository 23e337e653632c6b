"""Shards that another process of this host serves, wherever it has them from: the files of a table that are not here.

    reader -> server   one connection (Unix, SOCK_SEQPACKET) for each reader
      HELLO            magic, slots, bytes of a slot, what for (READS ...); with a descriptor of memory
      REQUEST [n]      slot, table, shard, bytes; first byte in the shard
    server -> reader
      REPLY [n]        slot, 0 or what went wrong: an errno, -1 if the shard ends early; the bytes are in the slot

Input: a catalog's layouts and a socket's address. Output: what `load_rows` and page readers need of a table; the C++
side speaks the same protocol (kernels/cpu/served_queue.cpp). Errors: `fault_of` names them.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import kernels
from ..errors import CorruptPageError, StoreNotReadyError, TierStoreError
from ..formats.page import FAULTS, PAGE_VERSION
from ..layout import TableLayout
from .version_files import VersionFiles

MAGIC = 0x31505354  # "TSP1"
HELLO = struct.Struct("<IIII")
REQUEST = np.dtype([("slot", "<u4"), ("table", "<u4"), ("shard", "<u4"), ("num_bytes", "<u4"), ("byte_start", "<u8")])
REPLY = np.dtype([("slot", "<u4"), ("error", "<i4")])
REQUESTS_MAX = 1024  # of one message
CUT_SHORT = -1
READS, WRITES, REPLACES = range(3)

SERVED_WAIT_S = 30.0  # for any answer


@dataclass(frozen=True)
class ServedBy:
    """Who serves the shards, and what errors say of it.

    Attributes:
        socket_path: Where it listens.
        what: Names it: an address.
        name_of: (table, shard, first byte) -> what it calls the bytes there.
        remedy: What to do about bytes that are not there or not right.
        wait_s: How long the server may take for any answer; a reader waits longer by a fifth, in case that it says
            nothing at all.
    """

    socket_path: Path
    what: str
    name_of: Callable[[int, int, int], str]
    remedy: str
    wait_s: float = SERVED_WAIT_S

    @property
    def patience_s(self) -> float:
        """How long a reader waits."""
        return 1.2 * self.wait_s

    def fault_of(self, layout: TableLayout, table: int, page: int, kind: str, detail: int) -> Exception:
        """Returns the error for a page; kind and detail are those of `tiers.faults.FaultNames`."""
        shard, place = divmod(page, layout.pages_per_shard)
        name = self.name_of(table, shard, place * layout.page_bytes)
        where = f"page {page} of table {layout.spec.name}, in {name} of {self.what}"
        if kind == "page":
            return CorruptPageError(f"{where}: {FAULTS[detail]}; {self.remedy}")
        if detail == CUT_SHORT:
            return CorruptPageError(f"{where}: the object ends before it; {self.remedy}")
        if detail == errno.ENOENT:
            return CorruptPageError(f"{where}: there is no such object; {self.remedy}")
        if detail == errno.ETIMEDOUT:
            return TimeoutError(f"{where}: no answer within {self.wait_s:g} s; look whether its servers run")
        return self._unreachable(where, detail)

    def _unreachable(self, where: str, detail: int) -> TierStoreError:
        why = {
            errno.EHOSTDOWN: "its master does not answer; start it, then try again",
            errno.EHOSTUNREACH: "whoever holds the object does not answer; start it, and put the shards again",
            errno.ECONNRESET: "the process that reads it has ended, and starts anew; try again",
            errno.ECONNREFUSED: "the process that reads it has ended; open the store again",
        }
        return StoreNotReadyError(f"{where}: {why.get(detail, os.strerror(detail))}")


class ServedConnection:
    """A connection of Python's own, with slots of shared memory. Of one thread at a time.

    Attributes:
        slots: uint8 [slots, bytes of a slot].
    """

    def __init__(self, served: ServedBy, num_slots: int, slot_bytes: int, *, purpose: int = READS) -> None:
        """Connects; raises `OSError`.

        purpose: READS has slots filled, WRITES has their bytes put, REPLACES also over what is there.
        """
        fd = os.memfd_create("tierstore pages", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, num_slots * slot_bytes)
            memory = mmap.mmap(fd, num_slots * slot_bytes)
            self.slots = np.frombuffer(memory, dtype=np.uint8).reshape(num_slots, slot_bytes)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                self._socket.settimeout(served.patience_s)
                self._socket.connect(os.fspath(served.socket_path))
                socket.send_fds(self._socket, [HELLO.pack(MAGIC, num_slots, slot_bytes, purpose)], [fd])
            except BaseException:
                self._socket.close()
                raise
        finally:
            os.close(fd)

    def exchange(self, requests: np.ndarray) -> np.ndarray:
        """Sends requests, REQUEST [n] of distinct slots, and waits; returns the error of each, int32 [n].

        Without an answer within the limit, if the server ends, or if it answers what was not asked, those that are left
        have ETIMEDOUT, ECONNRESET or EPROTO, and the connection is of no more use.
        """
        errors = np.full(len(self.slots), errno.ETIMEDOUT, dtype=np.int32)
        left = len(requests)
        try:
            for start in range(0, len(requests), REQUESTS_MAX):
                self._socket.send(requests[start : start + REQUESTS_MAX].tobytes())
            while left:
                message = self._socket.recv(REQUESTS_MAX * REPLY.itemsize)
                if not message:
                    errors[errors == errno.ETIMEDOUT] = errno.ECONNRESET
                    break
                replies = np.frombuffer(message[: len(message) // REPLY.itemsize * REPLY.itemsize], dtype=REPLY)
                if len(message) != replies.nbytes or not np.isin(replies["slot"], requests["slot"]).all():
                    errors[errors == errno.ETIMEDOUT] = errno.EPROTO
                    break
                errors[replies["slot"]] = replies["error"]
                left -= len(replies)
        except TimeoutError:
            pass
        except OSError as error:
            errors[errors == errno.ETIMEDOUT] = error.errno or errno.ECONNRESET
        return errors[requests["slot"]]

    def close(self) -> None:
        """Ends it; the memory goes with the last reference to `slots`."""
        self._socket.close()


class ServedFiles:
    """The shards of one table, served. See `RowFiles` and `TableFiles`; any number of threads may read."""

    versions: VersionFiles | None = None

    def __init__(self, served: ServedBy, table: TableLayout, index: int, shard_bytes: Sequence[int]) -> None:
        """index: of the table, as the server counts them; shard_bytes: of each shard, as the catalog has them."""
        self.table = table
        self.served = served
        self._index = index
        self._shard_bytes = shard_bytes
        self._lock = threading.Lock()  # guards _connection
        self._connection: ServedConnection | None = None

    has_direct = True  # nothing of it is in the page cache

    def handles(self) -> list[tuple[int, int, int]]:
        """Returns (-1, -1, bytes) of every shard: no descriptor of this process."""
        return [(-1, -1, num_bytes) for num_bytes in self._shard_bytes]

    def fault(self, page: int, kind: str, detail: int) -> Exception:
        """Returns the error for a page; see `ServedBy.fault_of`."""
        return self.served.fault_of(self.table, self._index, page, kind, detail)

    def read_rows(self, page_numbers: np.ndarray, scratch: np.ndarray, /) -> np.ndarray:
        """See `RowFiles`. Also raises `StoreNotReadyError` and `TimeoutError`, if nobody answers."""
        table = self.table
        pages = scratch[: len(page_numbers) * table.page_bytes].reshape(-1, table.page_bytes)
        with self._lock:
            self._read(page_numbers, pages)
        status = kernels.check_pages(pages, page_numbers, PAGE_VERSION, table.seed)
        bad = np.flatnonzero(status)
        if len(bad):
            raise self.fault(int(page_numbers[bad[0]]), "page", int(status[bad[0]]))
        return table.shape.rows_of(pages)

    def _read(self, page_numbers: np.ndarray, pages: np.ndarray) -> None:
        table = self.table
        try:
            if self._connection is None or len(self._connection.slots) < len(pages):
                self._disconnect()
                self._connection = ServedConnection(self.served, len(pages), table.page_bytes)
            shard, place = np.divmod(page_numbers, table.pages_per_shard)
            requests = np.zeros(len(pages), dtype=REQUEST)
            requests["slot"], requests["table"], requests["shard"] = np.arange(len(pages)), self._index, shard
            requests["num_bytes"], requests["byte_start"] = table.page_bytes, place * table.page_bytes
            errors = self._connection.exchange(requests)
        except OSError as error:
            raise self.fault(int(page_numbers[0]), "disk", error.errno or errno.ETIMEDOUT) from error
        except BaseException:  # an answer may still come
            self._disconnect()
            raise
        bad = np.flatnonzero(errors)
        if len(bad):
            self._disconnect()
            raise self.fault(int(page_numbers[bad[0]]), "disk", int(errors[bad[0]]))
        pages[:] = self._connection.slots[: len(pages)]

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def drop_cache(self) -> None:
        """Ends the connection: what it was for is read."""
        with self._lock:
            self._disconnect()

    def close(self) -> None:
        """Closes what is open; closing twice is harmless."""
        if self.versions is not None:
            self.versions.close()
        self.drop_cache()
