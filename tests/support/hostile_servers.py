"""Servers between a client and a real server of lookups, which do as it does until they are told to do harm.

`Garbling` answers garbage, call by call; `Trickling` sends a byte now and then.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from tierstore.remote.messages import SERVICE

STREAMED = ("LookupStream", "Rows")
PAUSE_S = 0.05  # between bytes
CALL_S = 60


class Garbling(grpc.GenericRpcHandler):
    """Set `garbage` to what it answers: bytes, or a status that calls end with; None: the real server's answers."""

    def __init__(self, address: str) -> None:
        """address: of the real server."""
        self.garbage: bytes | grpc.StatusCode | None = None
        self.spared: tuple[str, ...] = ()  # methods that are answered well all the same
        self.num_garbled = 0
        self._channel = grpc.insecure_channel(address)
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[self])
        self.url = f"grpc://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, call: Any) -> Any:
        name = call.method.rpartition("/")[2]
        if name in STREAMED:
            return grpc.unary_stream_rpc_method_handler(lambda *of: iter(self._answers(name, *of)))
        return grpc.unary_unary_rpc_method_handler(lambda *of: self._answers(name, *of)[0])

    def _answers(self, name: str, request: bytes, context: Any) -> list[bytes]:
        garbage = None if name in self.spared else self.garbage
        self.num_garbled += garbage is not None
        if isinstance(garbage, bytes):
            return [garbage]
        if garbage is not None:
            context.abort(garbage, "out of order")
        make = self._channel.unary_stream if name in STREAMED else self._channel.unary_unary
        found = make(f"/{SERVICE}/{name}")(request, timeout=CALL_S)
        return list(found) if name in STREAMED else [found]

    def close(self) -> None:
        self._server.stop(0).wait()
        self._channel.close()


class Trickling:
    """Passes bytes on both ways; once `trickles` is set, those of the server one at a time."""

    def __init__(self, address: str) -> None:
        """address: of the real server."""
        host, port = address.rsplit(":", 1)
        self.trickles = threading.Event()
        self.num_trickled = 0
        self._to = (host, int(port))
        self._closing = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"grpc://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._to)
                self._sockets += [client, server]
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()
                threading.Thread(target=self._pass_back, args=(server, client), daemon=True).start()

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if not self.trickles.is_set():
                    client.sendall(data)
                    continue
                for at in range(len(data)):
                    if self._closing.wait(PAUSE_S):
                        return
                    client.sendall(data[at : at + 1])
                    self.num_trickled += 1

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        for each in (self._listener, *self._sockets):
            each.close()
