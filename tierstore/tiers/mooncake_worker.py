"""The process that talks to Mooncake, started by `tiers.mooncake.MooncakeClient`: what hangs or dies in it is not ours.

Input: the descriptor of a listening socket, as an argument; a line of JSON on standard input: address, metadata, host,
tables (folder of names, stretch_bytes, bytes of each shard), wait_s, check, socket (the path of that which listens).
Output: a line of JSON on standard output, {"ready": true}, {"missing": name} or {"error": text}; then it serves what
`tiers.served` describes, until standard input ends, and removes the socket and its folder. A call of Mooncake's that
takes longer than wait_s ends the process: nothing else ends the call.

Imports nothing of tierstore, so that it is up at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

MAGIC = 0x31505354
HELLO = struct.Struct("<IIII")
REQUEST = np.dtype([("slot", "<u4"), ("table", "<u4"), ("shard", "<u4"), ("num_bytes", "<u4"), ("byte_start", "<u8")])
REPLY = np.dtype([("slot", "<u4"), ("error", "<i4")])
MESSAGE_BYTES = 1 << 16
NAMES_AT_ONCE = 1000
BUFFER_BYTES = 16 << 20  # of the client's own; what is read and written goes to registered memory
STUCK_STATUS = 75
CUT_SHORT = -1
READS, WRITES, REPLACES = range(3)
ERRORS = {  # Mooncake's codes, as measured
    -704: errno.ENOENT,  # no such object
    -600: CUT_SHORT,  # a range outside of it
    -800: errno.EHOSTUNREACH,  # its holder does not answer
    -900: errno.EHOSTDOWN,  # the master does not answer
    -200: errno.ENOSPC,
    1: errno.EEXIST,  # what `batch_is_exist` says of one that is there
}


class Watchdog:
    """Ends the process if a call takes longer than a limit; whoever waits for the call gets ETIMEDOUT first."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._calls: dict[int, tuple[float, socket.socket | None, bytes]] = {}  # by thread; each writes its own
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def call(self, connection: socket.socket | None = None, late: bytes = b"") -> Iterator[None]:
        """Watches what is done inside; late: the reply if it takes too long."""
        self._calls[threading.get_ident()] = (time.monotonic(), connection, late)
        try:
            yield
        finally:
            del self._calls[threading.get_ident()]

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._limit_s / 10))
            calls = list(self._calls.values())
            if not any(time.monotonic() - started > self._limit_s for started, _, _ in calls):
                continue
            for _, connection, late in calls:
                if connection is not None:
                    with contextlib.suppress(OSError):
                        connection.send(late, socket.MSG_DONTWAIT)
            os._exit(STUCK_STATUS)


class Server:
    """Reads ranges of objects into shared memory, or puts objects from it, for any number of connections."""

    def __init__(self, config: dict[str, Any], watchdog: Watchdog) -> None:
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        self._folders: list[str] = [table["folder"] for table in config["tables"]]
        self._shard_bytes: list[list[int]] = [table["shard_bytes"] for table in config["tables"]]
        self._stretch_bytes: list[int] = [table["stretch_bytes"] for table in config["tables"]]
        self._watchdog = watchdog
        self._pinned = ReplicateConfig()
        self._pinned.with_hard_pin = True  # or it would be evicted like any cached value
        self._pinned.replica_num = config.get("replicas", 1)
        self.store = MooncakeDistributedStore()
        with watchdog.call():
            code = self.store.setup(config["host"], config["metadata"], 0, BUFFER_BYTES, "tcp", "", config["address"])
        if code:
            raise ConnectionError(f"Mooncake's client does not start (code {code})")

    def name_of(self, table: int, shard: int, byte_start: int) -> str:
        """Returns the name of the object that holds a byte of a shard."""
        return f"{self._folders[table]}/{shard}/{byte_start // self._stretch_bytes[table]}"

    def first_missing(self) -> str | None:
        """Returns the name of an object that is not there; None if all are."""
        names = [
            self.name_of(table, shard, start)
            for table, of_table in enumerate(self._shard_bytes)
            for shard, num_bytes in enumerate(of_table)
            for start in range(0, num_bytes, self._stretch_bytes[table])
        ]
        for i in range(0, len(names), NAMES_AT_ONCE):
            with self._watchdog.call():
                found = self.store.batch_is_exist(names[i : i + NAMES_AT_ONCE])
            if any(code < 0 for code in found):
                raise ConnectionError("Mooncake's master does not answer")
            for name, is_there in zip(names[i : i + NAMES_AT_ONCE], found, strict=True):
                if not is_there:
                    return name
        return None

    def serve(self, connection: socket.socket) -> None:
        """Answers one reader until it closes."""
        with connection:
            hello, fds, _, _ = socket.recv_fds(connection, HELLO.size, 1)
            if len(hello) != HELLO.size or len(fds) != 1:
                return
            magic, num_slots, slot_bytes, purpose = HELLO.unpack(hello)
            memory = mmap.mmap(fds[0], num_slots * slot_bytes)
            os.close(fds[0])
            base = np.frombuffer(memory, dtype=np.uint8).ctypes.data
            if magic != MAGIC or self.store.register_buffer(base, len(memory)):
                return
            try:
                while message := connection.recv(MESSAGE_BYTES):
                    requests = np.frombuffer(message, dtype=REQUEST)
                    replies = np.zeros(len(requests), dtype=REPLY)
                    replies["slot"], replies["error"] = requests["slot"], errno.ETIMEDOUT
                    with self._watchdog.call(connection, replies.tobytes()):
                        if purpose == READS:
                            replies["error"] = self._read(requests, base, slot_bytes)
                        else:
                            replies["error"] = self._put(requests, base, slot_bytes, replaces=purpose == REPLACES)
                    connection.send(replies.tobytes())
            except OSError:
                pass  # the reader has closed
            finally:
                self.store.unregister_buffer(base)

    def _read(self, requests: np.ndarray, base: int, slot_bytes: int) -> list[int]:
        """Reads all pages in one call, those of an object together: each name costs a question to the master."""
        parts: dict[str, tuple[list[int], list[int], list[int], list[int]]] = {}
        for i, (slot, table, shard, num_bytes, byte_start) in enumerate(requests.tolist()):
            owners, to, starts, sizes = parts.setdefault(self.name_of(table, shard, byte_start), ([], [], [], []))
            owners.append(i)
            to.append(slot * slot_bytes)
            starts.append(byte_start % self._stretch_bytes[table])  # whole pages: none lies in two objects
            sizes.append(num_bytes)
        _, all_to, all_starts, all_sizes = (list(each) for each in zip(*parts.values(), strict=True))
        (found,) = self.store.get_into_ranges([base], [list(parts)], [all_to], [all_starts], [all_sizes])
        errors = [0] * len(requests)
        for (owners, _, _, sizes), got_all in zip(parts.values(), found, strict=True):
            for owner, size, got in zip(owners, sizes, got_all, strict=True):
                errors[owner] = _error_of_read(got, size)
        return errors

    def _put(self, requests: np.ndarray, base: int, slot_bytes: int, *, replaces: bool) -> list[int]:
        """Puts each slot as an object; EEXIST if there is one already: Mooncake would keep that, and say nothing."""
        errors = []
        for slot, table, shard, num_bytes, byte_start in requests.tolist():
            name = self.name_of(table, shard, byte_start)
            code = self.store.batch_is_exist([name])[0]
            if code == 1 and replaces:
                code = self.store.remove(name, True)
            if code == 0:
                code = self.store.put_from(name, base + slot * slot_bytes, num_bytes, self._pinned)
            errors.append(code and ERRORS.get(code, errno.EREMOTEIO))
        return errors


def _error_of_read(got: int, wanted: int) -> int:
    if got < 0:
        return ERRORS.get(got, errno.EREMOTEIO)
    return 0 if got == wanted else CUT_SHORT


def main() -> None:
    """Runs the process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    config = json.loads(sys.stdin.readline())
    watchdog = Watchdog(config["wait_s"])
    try:
        server = Server(config, watchdog)
        missing = server.first_missing() if config["check"] else None
        answer: dict[str, Any] = {"ready": True} if missing is None else {"missing": missing}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
    if "ready" not in answer:
        os._exit(1)
    listener = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_accept, args=(listener, server), daemon=True).start()
    sys.stdin.read()  # until the store closes, or its process is killed, which removes nothing
    with contextlib.suppress(OSError):
        os.unlink(config["socket"])
        os.rmdir(os.path.dirname(config["socket"]))
    with watchdog.call():
        server.store.close()
    os._exit(0)


def _accept(listener: socket.socket, server: Server) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=server.serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
