"""Hostile peers of a server of lookups by gRPC: its well-behaved clients get their rows all the while,
and it grows by nothing.

TIERSTORE_SOAK=1 sends 100,000 bodies to every method instead of 1,000.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from support.marks import slow_but
from support.remote_servers import serving_process
from support.stores import Model, random_keys

from tierstore.remote import messages
from tierstore.remote.client import connect_remote
from tierstore.remote.messages import SERVICE
from tierstore.remote.wire import encode

BODIES = 100_000 if os.environ.get("TIERSTORE_SOAK") == "1" else 1_000
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
UNARY, STREAMED = ("Describe", "Lookup", "Locate", "Stats"), ("LookupStream", "Rows")
GROWTH_BYTES_MAX = 64 << 20
CALM_S = 30.0
THREADS_MAX = 8  # more than before; grpc's own pool breathes


class Watched:
    """A server in a process of its own, with a client that looks up all the while."""

    def __init__(self, address: str, model: Model) -> None:
        self.address = address
        host, port = address.rsplit(":", 1)
        self.place = (host, int(port))
        self.process = next(
            process
            for process in psutil.Process().children()
            if any(c.laddr and c.laddr.port == self.place[1] for c in process.net_connections("tcp"))
        )
        self._keys = random_keys(np.random.default_rng(0), 300)
        self._expected = model.expected("layers.1", self._keys)
        self._done = threading.Event()
        self._faults: list[str] = []
        self.num_lookups = 0
        self._thread = threading.Thread(target=self._look_up)

    def _look_up(self) -> None:
        with connect_remote(f"grpc://{self.address}", timeout_s=60) as store:
            while not self._done.is_set():
                for num_tokens in (1, 300):
                    rows = store["layers.1"].lookup(self._keys[:num_tokens])
                    if not np.array_equal(rows, self._expected[:num_tokens]):
                        self._faults.append(f"wrong rows of {num_tokens} tokens")
                    self.num_lookups += 1

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Looks up while an attack lasts; then the client must have had rows, and the server be what it was."""
        self._thread.start()
        before = self._quiet(None)
        try:
            yield
        finally:
            self._done.set()
            self._thread.join(timeout=90)
        assert not self._thread.is_alive()
        assert not self._faults
        assert self.num_lookups > 0
        files, threads, num_bytes = self._quiet(before)
        print(
            f"descriptors {before[0]} to {files}, threads {before[1]} to {threads}, {before[2] >> 20} MiB to "
            f"{num_bytes >> 20} MiB, {self.num_lookups} lookups meanwhile"
        )
        assert files <= before[0]
        assert threads <= before[1] + THREADS_MAX
        assert num_bytes <= before[2] + GROWTH_BYTES_MAX

    def _quiet(self, before: tuple[int, int, int] | None) -> tuple[int, int, int]:
        """Descriptors, threads and bytes of the server: once some lookups are done,
        or descriptors are back where they were."""
        deadline = time.monotonic() + CALM_S
        while time.monotonic() < deadline:
            done = self.num_lookups >= 50 if before is None else self.process.num_fds() <= before[0]
            if done or (before is None and self._faults):
                break
            time.sleep(0.01)
        return self.process.num_fds(), self.process.num_threads(), self.process.memory_info().rss


@pytest.fixture
def watched(built: Path, model: Model) -> Iterator[Watched]:
    with serving_process(built) as address:
        yield Watched(address, model)


def test_bytes_that_are_no_http(watched: Watched) -> None:
    rng = random.Random(0)
    with watched.during():
        for round_number in range(200):
            with socket.create_connection(watched.place, timeout=20) as peer, contextlib.suppress(ConnectionError):
                head = (b"", PREFACE, PREFACE + SETTINGS, b"GET / HTTP/1.1\r\n\r\n")[round_number % 4]
                peer.sendall(head + rng.randbytes(rng.choice([1, 9, 100, 5000])))
                if round_number % 8 < 4:
                    peer.settimeout(0.02)
                    with contextlib.suppress(TimeoutError):
                        peer.recv(4096)


def test_connections_that_say_nothing_more(watched: Watched) -> None:
    """They may stay for a while; others are served all the same, and they are gone in the end."""
    with watched.during(), contextlib.ExitStack() as stack:
        for head in (b"", PREFACE, PREFACE[:10], PREFACE + SETTINGS, PREFACE + SETTINGS + bytes((0, 1, 0, 1))) * 8:
            peer = stack.enter_context(socket.create_connection(watched.place, timeout=20))
            peer.sendall(head)
        looked_up = watched.num_lookups
        deadline = time.monotonic() + 30
        while watched.num_lookups < looked_up + 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watched.num_lookups >= looked_up + 100


def test_streams_that_send_no_request_and_read_no_answer(watched: Watched) -> None:
    """The first time, the pool gets its threads and the allocator its memory; no other time adds to them."""
    stuck_streams(watched, num_lookups=0)
    with watched.during():
        for _ in range(3):
            stuck_streams(watched, num_lookups=20)


def stuck_streams(watched: Watched, num_lookups: int) -> None:
    """Leaves 40 calls under way until the well-behaved client has done so many lookups more."""
    silent = threading.Event()

    def nothing() -> Iterator[bytes]:
        silent.wait(60)
        yield from ()

    keys = np.ones((20_000, 3), dtype="<i8").tobytes()
    with grpc.insecure_channel(watched.address) as channel, connect_remote(f"grpc://{watched.address}") as store:
        tables = [messages.TableKeys("layers.1", 20_000, keys)]
        request = encode(messages.LookupRequest(store._engine._asked.requests.identity, tables))
        calls = [channel.stream_unary(f"/{SERVICE}/Lookup").future(nothing(), timeout=60) for _ in range(20)]
        streams = [channel.unary_stream(f"/{SERVICE}/LookupStream")(request, timeout=60) for _ in range(20)]
        for stream in streams:
            next(stream)
        looked_up = watched.num_lookups
        deadline = time.monotonic() + 30
        while watched.num_lookups < looked_up + num_lookups and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watched.num_lookups >= looked_up + num_lookups
        silent.set()
        for call in (*calls, *streams):
            call.cancel()


def test_messages_that_are_too_long(watched: Watched) -> None:
    with watched.during(), grpc.insecure_channel(watched.address, [("grpc.max_send_message_length", -1)]) as channel:
        for method in ("Lookup", "Describe"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{SERVICE}/{method}")(bytes(80 << 20), timeout=60)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def bodies(identity: bytes, seed: int) -> Iterator[bytes]:
    """Requests that were cut short, had bytes changed, or are random from the start."""
    rng = random.Random(seed)
    keys = np.random.default_rng(seed).integers(-1, 2**63 - 1, (4, 3), dtype="<i8").tobytes()
    of_table = messages.TableKeys("layers.1", 4, keys)
    sound = [
        encode(messages.LookupRequest(identity, [of_table, messages.TableKeys("plain", 1, bytes(8))])),
        encode(messages.LocateRequest(identity, of_table)),
        encode(messages.RowsRequest(identity, "layers.1", bytes(80))),
    ]
    for _ in range(BODIES):
        body = bytearray(rng.choice(sound))
        what = rng.randrange(4)
        if what == 0:
            del body[rng.randrange(len(body)) :]
        elif what == 1:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        elif what == 2:
            for _ in range(5):
                body[rng.randrange(len(body))] = rng.randrange(256)
        else:
            body = bytearray(rng.randbytes(rng.randrange(200)))
        yield bytes(body)


@pytest.mark.parametrize("method", slow_but(["Rows", "LookupStream"], [*UNARY, *STREAMED]))
def test_random_and_damaged_requests(watched: Watched, method: str) -> None:
    """Each is answered or refused for a reason; none is a fault of the server's own."""
    refusals = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    codes: dict[grpc.StatusCode | None, int] = {}
    with watched.during(), grpc.insecure_channel(watched.address) as channel:
        with connect_remote(f"grpc://{watched.address}") as store:
            identity = store._engine._asked.requests.identity
        make = channel.unary_stream if method in STREAMED else channel.unary_unary
        ask = make(f"/{SERVICE}/{method}")
        for body in bodies(identity, seed=len(method)):
            code = None
            try:
                answer = ask(body, timeout=60)
                if method in STREAMED:
                    list(answer)
            except grpc.RpcError as error:
                code = error.code()
            codes[code] = codes.get(code, 0) + 1
    print(f"{method}: {BODIES} bodies, {codes}")
    assert set(codes) <= refusals | {None}
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > BODIES / 10
