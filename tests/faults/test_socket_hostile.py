"""Peers that break the protocol in every way cost the daemon nothing: others are served meanwhile,
and nothing is left of them.

TIERSTORE_SOAK=1 raises the number of hostile acts from 2,500 to 100,000.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import tempfile
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.daemon_peers import HELLO, NOBODY, as_root, in_child, packet
from support.held import held, open_files
from support.waiting import WAIT_S

from tierstore.daemon import limits
from tierstore.daemon.peer import Peer
from tierstore.daemon.server import SocketServer
from tierstore.errors import DaemonError
from tierstore.ipc.client_socket import ask, dial
from tierstore.ipc.messages import from_json

ACTS = 100_000 if os.environ.get("TIERSTORE_SOAK") == "1" else 2_500
THREADS = 4
HELD_MAX = 20  # connections that an attacker keeps open
RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
BOMBS = [
    b'{"a":' + b"[" * 60_000,
    b'{"a":' * 10_000,
    b'{"a":' + b"9" * 60_000 + b"}",
    b'{"echo":1,"echo":1}',
    b'{"echo":NaN}',
    b'{"echo":"\\udc00"}',
    b'{"echo":"\xff"}',
    b"[]",
]


class PeerCounter:
    """A handler that echoes, and notes who is attached; `left` is notified of each that goes. Knows no {"do": ...}."""

    def __init__(self) -> None:
        self.attached: set[Peer] = set()  # written by the server's thread
        self.faults: list[str] = []
        self.num_attached = 0
        self.left = threading.Condition()

    def attach(self, peer: Peer) -> tuple[dict[str, Any], Sequence[int]]:
        self.attached.add(peer)
        self.num_attached += 1
        return {}, [0]

    def message(self, peer: Peer, data: bytes) -> None:
        message = from_json(data, dict)
        if peer not in self.attached:
            self.faults.append(f"a message of {peer}, which is not attached: {message}")
        peer.send({"echo": message["echo"]})

    def detach(self, peer: Peer) -> None:
        if peer not in self.attached:
            self.faults.append(f"{peer} is detached twice")
        with self.left:
            self.attached.discard(peer)
            self.left.notify_all()

    def answer(self, _: Peer, request: bytes) -> dict[str, Any]:
        return {"ok": from_json(request, dict)["do"]}


def packets_of(data: bytes) -> list[bytes]:
    """A whole message of bytes, drawn by hand."""
    parts = [data[start : start + 32756] for start in range(0, len(data), 32756)]
    return [packet(part, len(data), flags=int(part is not parts[-1])) for part in parts]


class Attacker:
    """Commits hostile acts, drawn by a seed. Every act opens a connection; some stay open unread."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.rng = np.random.default_rng(seed)
        self.held: list[socket.socket] = []

    def act(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(1.0)
        with contextlib.suppress(OSError):  # refused, or ended in the middle: as it should be
            sock.connect(os.fspath(self.path))
            if self.rng.random() < 0.6:
                role = "client" if self.rng.random() < 0.7 else "admin"
                sock.send(packet(json.dumps(HELLO | {"role": role}).encode()))
                if self.rng.random() < 0.5:
                    sock.recv(1 << 16)  # without room for its descriptors
            getattr(self, str(self.rng.choice(ACT_NAMES)))(sock)
        if self.rng.random() < 0.3:
            self.held.append(sock)  # neither read nor written again
        else:
            sock.close()
        if len(self.held) > HELD_MAX:
            self.held.pop(0).close()

    def close(self) -> None:
        for sock in self.held:
            sock.close()

    def send_noise(self, sock: socket.socket) -> None:
        sock.send(self.rng.bytes(int(self.rng.integers(1, 2000))))

    def send_noise_in_a_packet(self, sock: socket.socket) -> None:
        sock.send(packet(self.rng.bytes(int(self.rng.integers(1, 2000)))))

    def send_a_flipped_bit(self, sock: socket.socket) -> None:
        data = bytearray(packet(b'{"echo":[1,"two",3.5,null]}'))
        data[int(self.rng.integers(len(data)))] ^= 1 << int(self.rng.integers(8))
        sock.send(data)

    def send_a_cut_packet(self, sock: socket.socket) -> None:
        data = packet(b'{"echo":1}')
        sock.send(data[: int(self.rng.integers(len(data)))])  # of no bytes too

    def send_too_large_a_packet(self, sock: socket.socket) -> None:
        sock.send(packet(bytes(int(self.rng.integers(32757, 100_000)))))

    def announce_too_much(self, sock: socket.socket) -> None:
        sock.send(packet(bytes(32756), int(self.rng.integers(65537, 2**32)), flags=1))

    def send_half_a_message(self, sock: socket.socket) -> None:
        sock.send(packets_of(bytes(60_000))[0])

    def send_the_wrong_half(self, sock: socket.socket) -> None:
        first, second = packets_of(b'{"echo":"' + b"x" * 60_000 + b'"}')
        sock.send(second)
        sock.send(first)

    def send_another_magic(self, sock: socket.socket) -> None:
        sock.send(packet(b'{"echo":1}', magic=b"GET "))

    def send_descriptors(self, sock: socket.socket) -> None:
        fds = [sock.fileno()] * int(self.rng.integers(1, 250))
        sock.sendmsg([packet(b'{"echo":1}')], [(*RIGHTS, array("i", fds))])

    def send_a_bomb(self, sock: socket.socket) -> None:
        for part in packets_of(BOMBS[int(self.rng.integers(len(BOMBS)))]):
            sock.send(part)

    def flood(self, sock: socket.socket) -> None:
        for number in range(250):
            sock.send(packet(b'{"echo":%d}' % number), socket.MSG_DONTWAIT)

    def ask_for_much_and_read_nothing(self, sock: socket.socket) -> None:
        for part in packets_of(b'{"echo":"' + b"x" * 60_000 + b'"}') * 50:
            sock.send(part, socket.MSG_DONTWAIT)

    def send_another_hello(self, sock: socket.socket) -> None:
        sock.send(packet(json.dumps(HELLO | {"hello": int(self.rng.integers(-5, 5))}).encode()))

    def ask_what_there_is_not(self, sock: socket.socket) -> None:
        sock.send(packet(b'{"what":1}'))
        sock.send(packet(b'{"do":2}'))

    def stop_sending(self, sock: socket.socket) -> None:
        sock.shutdown(socket.SHUT_WR)

    def say_nothing(self, _: socket.socket) -> None:
        self.held.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self.held[-1].settimeout(1.0)
        self.held[-1].connect(os.fspath(self.path))


ACT_NAMES = [name for name in vars(Attacker) if name not in ("act", "close") and not name.startswith("_")]


class ServedClient:
    """A client that echoes all the while, in a thread; `close` returns how long each answer took, in seconds."""

    def __init__(self, path: Path) -> None:
        self._channel, _, fds = dial(path, timeout_s=WAIT_S)
        os.close(*fds)
        self._seconds: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(0.01):  # less often than is too fast
            started = time.monotonic()
            self._channel.send({"echo": len(self._seconds)})
            assert self._channel.receive(WAIT_S, dict) == ({"echo": len(self._seconds)}, [])
            self._seconds.append(time.monotonic() - started)

    def close(self) -> list[float]:
        self._done.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._channel.close()
        return self._seconds


def wait_for_descriptors(path: Path, before: frozenset[str]) -> None:
    """Waits until the server, in the same process, has closed what its peers left.
    Each request is a round of its loop."""
    deadline = time.monotonic() + WAIT_S
    while not open_files() <= before and time.monotonic() < deadline:
        ask(path, {"do": "stat"}, dict, WAIT_S)
    assert open_files() <= before


@pytest.mark.parametrize("seed", [0])
def test_hostile_peers_leave_others_served_and_nothing_behind(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PEER_SEND_S", 0.5)
    monkeypatch.setattr(limits, "HANDSHAKE_S", 0.5)
    path, handler = tmp_path / "socket", PeerCounter()
    before = held()
    with SocketServer(path, handler) as opened:
        opened.start()
        serving = open_files()
        client = ServedClient(path)
        attackers = [Attacker(path, seed * 1000 + number) for number in range(THREADS)]

        def attack(attacker: Attacker) -> None:
            for _ in range(ACTS // THREADS):
                attacker.act()

        threads = [threading.Thread(target=attack, args=(attacker,)) for attacker in attackers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3600)
            assert not thread.is_alive()
        for attacker in attackers:
            attacker.close()
        with handler.left:
            assert handler.left.wait_for(lambda: len(handler.attached) == 1, WAIT_S), handler.attached
        assert opened.info().refused > ACTS / 20
        assert handler.num_attached > ACTS / 20
        seconds = client.close()
        wait_for_descriptors(path, serving)
    assert held() <= before
    assert not handler.faults
    assert not handler.attached
    assert len(seconds) > 20
    assert max(seconds) < 20, "hostile peers must not hold up others"


@as_root
def test_another_users_hostile_acts_reach_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_S", 0.5)
    handler = PeerCounter()

    def attack(path: Path) -> str:
        attacker = Attacker(path, 7)
        for _ in range(ACTS // 5):
            attacker.act()
        return "done"

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "socket"
        with SocketServer(path, handler) as opened:
            opened.start()
            path.chmod(0o666)  # as if the file let everybody in
            serving = open_files()
            client = ServedClient(path)
            assert in_child(lambda: attack(path), NOBODY) == "done"
            client.close()
            wait_for_descriptors(path, serving)
            assert handler.num_attached == 1
            assert opened.info().refused >= ACTS // 5


def test_killed_peers_are_detached_whatever_they_were_doing(tmp_path: Path) -> None:
    path, handler = tmp_path / "socket", PeerCounter()
    with SocketServer(path, handler) as opened:
        opened.start()
        serving = open_files()
        client = ServedClient(path)
        for number in range(30):
            read, write = os.pipe()
            child = os.fork()
            if not child:
                try:
                    attacker = Attacker(path, number)
                    os.write(write, b"1")
                    while True:
                        attacker.act()
                finally:
                    os._exit(0)
            os.close(write)
            os.read(read, 1)
            ask(path, {"do": "stat"}, dict, WAIT_S)  # it is at it meanwhile
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
        with handler.left:
            assert handler.left.wait_for(lambda: len(handler.attached) == 1, WAIT_S), handler.attached
        client.close()
        wait_for_descriptors(path, serving)
    assert not handler.faults


def test_a_daemon_that_lies_to_its_client_is_a_daemon_error(tmp_path: Path) -> None:
    """The client's side of the same: what comes instead of an answer to its hello leaves an error and no descriptor."""
    path = tmp_path / "socket"
    lies = [
        b"",
        b"x",
        *map(packet, BOMBS[3:]),
        packet(b"{}"),
        packet(b'{"hello":"1"}'),
        packet(b'{"hello":{"hello":1}}'),
        packet(b'{"error":["x"],"message":{}}'),
        packet(b'{"error":"__builtins__","message":"x"}'),
        packet(b'{"error":"TierStoreError2"}'),
        packet(b'{"bye":1}'),
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        before = open_files()
        for lie in lies:

            def lie_once(lie: bytes = lie) -> None:
                sock, _ = listener.accept()
                with sock:
                    sock.sendmsg([lie], [(*RIGHTS, array("i", [0, 1, 2]))])

            thread = threading.Thread(target=lie_once)
            thread.start()
            with pytest.raises(DaemonError):
                dial(path, timeout_s=WAIT_S)
            thread.join(WAIT_S)
            assert open_files() <= before
