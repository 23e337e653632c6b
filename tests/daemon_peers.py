"""What tests of the daemon's socket share: a handler that notes its calls, and what a process has open."""

from __future__ import annotations

import os
import queue
import struct
import threading
from collections.abc import Sequence
from typing import Any

from tierstore.daemon.peer import Peer
from tierstore.errors import BudgetError, DaemonError

WAIT_S = 30.0  # for what must happen; nothing that works takes nearly as long


class NotingHandler:
    """Answers, and puts ("attach" | "message" | "detach", peer, message) on `calls`. Messages choose what it does."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[str, Peer, dict[str, Any] | None]] = queue.Queue()
        self.answer: dict[str, Any] = {"version": 1}
        self.fds: Sequence[int] = ()
        self.fault: Exception | None = None
        self.go_on = threading.Event()  # what {"do": "wait"} waits for
        self.asking = threading.Semaphore(0)  # released as each of them begins

    def attach(self, peer: Peer) -> tuple[dict[str, Any], Sequence[int]]:
        if self.fault is not None:
            raise self.fault
        peer.send({"early": True})  # must not come before the answer
        self.calls.put(("attach", peer, None))
        return self.answer, self.fds

    def message(self, peer: Peer, message: dict[str, Any]) -> None:
        self.calls.put(("message", peer, message))
        if message.get("raise") == "DaemonError":
            raise DaemonError("table layers.9: there is none; name one of the store's")
        if message.get("raise"):
            raise BlockingIOError("a mistake of the daemon's")
        if "echo" in message:
            peer.send({"echo": message["echo"]})

    def detach(self, peer: Peer) -> None:
        self.calls.put(("detach", peer, None))

    def ask(self, _: Peer, message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] == "wait":
            self.asking.release()
            assert self.go_on.wait(WAIT_S)
        if message["do"] == "fail":
            raise {"budget": BudgetError("2 GiB asked, 1 GiB there"), "mistake": KeyError("x")}[message["how"]]
        return {"ok": True, "did": message["do"], "padding": "x" * message.get("bytes", 0)}

    def next(self, kind: str) -> tuple[Peer, dict[str, Any] | None]:
        """The next call, which must be of that kind."""
        found, peer, message = self.calls.get(timeout=WAIT_S)
        assert found == kind, (found, message)
        return peer, message


def packet(part: bytes, num_bytes: int | None = None, *, flags: int = 0, magic: bytes = b"tsd\n") -> bytes:
    """A packet, drawn by hand as the protocol's table says."""
    return magic + bytes([flags, 0, 0, 0]) + struct.pack("<I", len(part) if num_bytes is None else num_bytes) + part


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
