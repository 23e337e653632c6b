"""A server of a store's shards, as `tiers.served` describes one: threads of the test's process, faults on request.

It is given to `tierstore.open(path, pages=...)` in place of Mooncake's client. `answers` is called with (request,
the bytes of the shard there) and returns (bytes, error); None: no answer at all.
"""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tierstore
from tierstore.formats.catalog import CatalogImage, read_catalog
from tierstore.tiers.served import CUT_SHORT, HELLO, MAGIC, REPLY, REQUEST, ServedBy

Answers = Callable[[Any, bytes], tuple[bytes, int] | None]


def from_shards(request: Any, found: bytes) -> tuple[bytes, int]:
    """What a server without faults answers."""
    return (found, 0) if len(found) == request["num_bytes"] else (b"", CUT_SHORT)


class ShardServer:
    """Serves until it is closed."""

    def __init__(self, path: Path, answers: Answers = from_shards, wait_s: float = 20.0) -> None:
        self.image: CatalogImage = read_catalog(path)
        self.answers = answers
        self.connections: list[socket.socket] = []
        self._folder = Path(tempfile.mkdtemp(prefix="tierstore-served-"))
        self.served = ServedBy(self._folder / "pages", "server://test", self._name_of, "put it again", wait_s)
        self._lock = threading.Lock()  # guards _fds
        self._fds: dict[str, int] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(os.fspath(self.served.socket_path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _name_of(self, table: int, shard: int, byte_start: int) -> str:
        return f"object {table}/{shard}/{byte_start >> 22}"

    def open(self, path: Path, **options: Any) -> tierstore.Store:
        """Opens a store whose shards are here; closing it closes this."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tierstore.store.embedded.MooncakeClient", lambda *_: self)
            return tierstore.open(path, pages="mooncake://127.0.0.1:1", **options)

    def _fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                self._fds[file] = os.open(Path(self.image.path) / file, os.O_RDONLY)
            return self._fds[file]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            hello, (fd,), _, _ = socket.recv_fds(connection, HELLO.size, 1)
            magic, num_slots, slot_bytes, _ = HELLO.unpack(hello)
            assert magic == MAGIC
            with mmap.mmap(fd, num_slots * slot_bytes) as memory:
                os.close(fd)
                while message := connection.recv(1 << 16):
                    self._answer(connection, memory, slot_bytes, np.frombuffer(message, dtype=REQUEST))
        except (OSError, ValueError):
            pass  # it was closed
        finally:
            connection.close()

    def _answer(self, connection: socket.socket, memory: mmap.mmap, slot_bytes: int, requests: np.ndarray) -> None:
        tables = list(self.image.tables.values())
        replies = np.zeros(len(requests), dtype=REPLY)
        for i, request in enumerate(requests):
            file = tables[request["table"]].shard_file(int(request["shard"]))
            found = os.pread(self._fd(file), int(request["num_bytes"]), int(request["byte_start"]))
            answer = self.answers(request, found)
            if answer is None:
                return
            start = int(request["slot"]) * slot_bytes
            memory[start : start + len(answer[0])] = answer[0]
            replies[i] = request["slot"], answer[1]
        connection.send(replies.tobytes())

    def drop(self) -> None:
        """Ends every connection, as a server does that dies."""
        while self.connections:
            connection = self.connections.pop()
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its reader was faster

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        for fd in self._fds.values():
            os.close(fd)
        shutil.rmtree(self._folder)
