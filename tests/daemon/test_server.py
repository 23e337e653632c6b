"""The socket's server serves peers side by side, and says by name why it drops one;
none of them costs another anything."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import resource
import signal
import socket
import tempfile
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from support.daemon_peers import (
    HELLO,
    NOBODY,
    NotingHandler,
    as_root,
    bare_socket,
    connect,
    in_child,
    last_words,
    noted_warnings,
    packet,
)
from support.held import held, open_files, running_threads
from support.waiting import WAIT_S

from tierstore.daemon import acceptor, admin, connections, limits, peer, server
from tierstore.daemon.record import ClientsInfo
from tierstore.daemon.server import SocketServer
from tierstore.errors import BudgetError, DaemonError
from tierstore.ipc import client_socket, peer_log
from tierstore.ipc.channel import Channel
from tierstore.ipc.client_socket import ask, dial
from tierstore.ipc.protocol import PROTOCOL_VERSION, ChannelClosed
from tierstore.version import VERSION


@pytest.fixture
def handler() -> NotingHandler:
    return NotingHandler()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def serving(path: Path, handler: NotingHandler) -> Iterator[SocketServer]:
    with SocketServer(path, handler, clients_max=3) as opened:
        opened.start()
        yield opened


@pytest.fixture
def warnings() -> Iterator[queue.Queue[str]]:
    with noted_warnings() as lines:
        yield lines


@pytest.mark.usefixtures("serving")
def test_a_client_attaches_sends_is_sent_and_is_detached(path: Path, handler: NotingHandler) -> None:
    channel, answer, fds = dial(path)
    welcome = {"hello": PROTOCOL_VERSION, "release": VERSION, "pid": os.getpid(), "version": 1}
    assert (json.loads(answer), fds) == (welcome, [])
    attached, _ = handler.next("attach")
    assert (attached.pid, attached.uid, attached.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert (attached.role, attached.release) == ("client", VERSION)
    assert channel.receive(WAIT_S, dict) == ({"early": True}, []), "what is sent while attaching follows the answer"
    channel.send({"echo": [1, "ü"]})
    assert handler.next("message") == (attached, {"echo": [1, "ü"]})
    assert channel.receive(WAIT_S, dict) == ({"echo": [1, "ü"]}, [])
    attached.send({"text": "x" * 900_000})
    assert len(channel.receive(WAIT_S, dict)[0]["text"]) == 900_000
    channel.close()
    assert handler.next("detach") == (attached, None)
    attached.send({"into": "the void"})
    assert handler.calls.empty()


@pytest.mark.usefixtures("serving")
def test_descriptors_go_to_the_client_and_stay_with_the_handler(path: Path, handler: NotingHandler) -> None:
    handler.fds = [os.memfd_create("a"), os.memfd_create("b")]
    before = open_files()
    channel, _, fds = dial(path)
    attached, _ = handler.next("attach")
    os.write(handler.fds[1], b"b")
    assert [os.pread(fd, 9, 0) for fd in fds] == [b"", b"b"]
    attached.send({"more": 1}, handler.fds[1:])
    assert channel.receive(WAIT_S, dict) == ({"early": True}, [])
    _, more = channel.receive(WAIT_S, dict)
    assert os.pread(more[0], 9, 0) == b"b"
    for fd in (*fds, *more):
        os.close(fd)
    channel.close()
    handler.next("detach")
    assert open_files() <= before
    for fd in handler.fds:
        os.close(fd)


@pytest.mark.usefixtures("serving")
def test_an_administrator_is_answered_and_errors_keep_their_class(path: Path) -> None:
    assert ask(path, {"do": "stat"}, dict) == {"ok": True, "did": "stat", "padding": ""}
    assert len(ask(path, {"do": "stat", "bytes": 900_000}, dict)["padding"]) == 900_000
    with pytest.raises(BudgetError, match="2 GiB asked, 1 GiB there"):
        ask(path, {"do": "fail", "how": "budget"}, dict)
    with pytest.raises(DaemonError, match=r"failed with this request \(KeyError\); its log says more"):
        ask(path, {"do": "fail", "how": "mistake"}, dict)
    with pytest.raises(DaemonError, match="cannot be sent, the limit is 1,048,576"):
        ask(path, {"do": "stat", "bytes": 1 << 20}, dict)
    with pytest.raises(DaemonError, match=r"cannot be sent, the limit is 65,536"):
        ask(path, {"do": "x" * 70_000}, dict)
    with connect(path, "admin") as channel:
        for number in range(3):
            channel.send({"do": str(number)})
            assert channel.receive(WAIT_S, dict)[0]["did"] == str(number)


@pytest.mark.usefixtures("serving")
def test_a_long_request_holds_up_nobody(path: Path, handler: NotingHandler) -> None:
    waiting = [connect(path, "admin") for _ in range(2)]
    for channel in waiting:
        channel.send({"do": "wait"})
        assert handler.asking.acquire(timeout=WAIT_S)
    assert ask(path, {"do": "stat"}, dict)["ok"]
    with connect(path) as client:
        client.send({"echo": 1})
        assert client.receive(WAIT_S, dict) == ({"echo": 1}, [])
    waiting[1].send({"do": "stat"})
    assert "ask one at a time" in last_words(waiting[1])
    handler.go_on.set()
    assert waiting[0].receive(WAIT_S, dict)[0]["did"] == "wait"
    waiting[0].close()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("DaemonError", "table layers.9: the store has none; name one of its own"),
        ("other", "its log says more"),
    ],
)
@pytest.mark.usefixtures("serving")
def test_a_message_that_fails_costs_its_sender_alone(
    path: Path, handler: NotingHandler, warnings: queue.Queue[str], fault: str, says: str
) -> None:
    with connect(path) as other:
        handler.next("attach")
        guilty = connect(path)
        attached, _ = handler.next("attach")
        guilty.send({"raise": fault})
        assert says in last_words(guilty)
        assert handler.next("message") == (attached, {"raise": fault})
        assert handler.next("detach") == (attached, None)
        assert "is dropped" in warnings.get(timeout=WAIT_S)
        other.send({"echo": 1})
        assert other.receive(WAIT_S, dict) == ({"echo": 1}, [])


def test_an_attach_that_fails_passes_its_error_on_and_detaches_nothing(
    path: Path, handler: NotingHandler, serving: SocketServer
) -> None:
    handler.fault = BudgetError("3 MiB of staging asked, 2 MiB there")
    with pytest.raises(BudgetError, match="3 MiB of staging"):
        dial(path)
    handler.fault = KeyError("mistake")
    with pytest.raises(DaemonError, match="its log says more"):
        dial(path)
    handler.fault = None
    handler.layout = {"not": object()}
    with pytest.raises(DaemonError, match="its log says more"):
        dial(path)
    handler.next("attach")
    handler.next("detach")  # this one had returned
    handler.layout = {}
    connect(path).close()
    handler.next("attach")
    handler.next("detach")
    assert handler.calls.empty()
    assert serving.info().refused == 2


def test_another_version_is_refused_by_both_numbers(
    path: Path, serving: SocketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_socket, "PROTOCOL_VERSION", 7)
    with pytest.raises(DaemonError, match=r"you speak version 7 .* version 1 .*: install one release for both"):
        dial(path)
    with pytest.raises(DaemonError, match=r"version 7"):
        ask(path, {"do": "stat"}, dict)
    monkeypatch.setattr(client_socket, "PROTOCOL_VERSION", 1)
    monkeypatch.setattr(server, "PROTOCOL_VERSION", 2)  # a daemon that takes all versions
    with pytest.raises(DaemonError, match=r"speaks version 2 of the protocol, this is version 1 "):
        dial(path)
    assert serving.info().refused == 2


HELLOS = {
    "empty": {},
    "a bool for a version": HELLO | {"hello": True},
    "a text for a version": HELLO | {"hello": "1"},
    "another role": HELLO | {"role": "root"},
    "a list for a role": HELLO | {"role": ["client"]},
    "no process": HELLO | {"pid": None},
    "a number for a release": HELLO | {"release": 1},
    "a long release": HELLO | {"release": "x" * 65},
    "a request": {"do": "stat"},
}


@pytest.mark.parametrize("hello", HELLOS.values(), ids=HELLOS)
def test_a_first_message_that_is_no_hello_is_refused(path: Path, serving: SocketServer, hello: dict[str, Any]) -> None:
    channel = Channel(bare_socket(path))
    channel.send(hello)
    said = last_words(channel)
    assert "expected a hello message with version, role, pid and release" in said or "there is no role" in said
    assert serving.info() == ClientsInfo(attached=0, max=3, refused=1, list=())


@pytest.mark.usefixtures("serving")
def test_descriptors_and_foreign_packets_end_a_client_by_name(path: Path, handler: NotingHandler) -> None:
    before = open_files()
    for data, control, says in (
        (packet(b"{}"), [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [1]))], "more than 0 descriptors"),
        (packet(b"{}", magic=b"HTTP"), [], "not of this protocol"),
        (packet(b"x" * 32756, 65537, flags=1), [], "65,537 bytes, the limit is 65,536"),
        (packet(b"[[[]]]"), [], "Expected `object`, got `array`"),
    ):
        channel = connect(path)
        with socket.socket(fileno=os.dup(channel.fileno())) as sock:
            sock.sendmsg([data], control)
        assert says in last_words(channel)
        handler.next("attach")
        handler.next("detach")
    assert open_files() <= before


def test_a_connection_without_a_hello_in_time_is_closed(
    path: Path, serving: SocketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_S", 0.2)
    silent, half = bare_socket(path), bare_socket(path)
    half.send(packet(b"x" * 32756, 40000, flags=1))
    for sock in (silent, half):
        assert "no hello came within 0.2 s" in last_words(Channel(sock))
    assert serving.info().refused == 2


@pytest.mark.usefixtures("serving")
def test_connections_without_a_hello_over_the_limit_close_the_oldest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_S", WAIT_S)
    silent = [Channel(bare_socket(path)) for _ in range(limits.HANDSHAKES_MAX + 2)]
    for channel in silent[:2]:
        assert "33 connections sent no hello yet, the limit is 32" in last_words(channel)
    connect(path).close()
    assert "33 connections" in last_words(silent[2])
    silent[3].send(HELLO)
    assert silent[3].receive(WAIT_S, dict)[0]["hello"] == PROTOCOL_VERSION
    for channel in silent[3:]:
        channel.close()


@as_root
def test_one_users_silent_connections_do_not_push_out_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKES_MAX", 4)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path, handler = Path(folder) / "socket", NotingHandler()
        with SocketServer(path, handler, allowed_users=[NOBODY]) as opened:
            opened.start()
            with bare_socket(path) as ours:  # the oldest of all

                def flood() -> str:
                    peers = [bare_socket(path) for _ in range(8)]
                    return str(b"sent no hello yet" in peers[0].recv(4096))

                assert in_child(flood, NOBODY) == "True"
                ours.sendall(packet(json.dumps(HELLO).encode()))
                assert b"early" not in ours.recv(4096)
                handler.next("attach")


def test_clients_are_limited_and_a_place_is_free_again(
    path: Path, handler: NotingHandler, serving: SocketServer
) -> None:
    clients = [connect(path) for _ in range(3)]
    with pytest.raises(DaemonError, match=r"3 clients are attached, the limit is 3 \(--clients\): end some"):
        dial(path)
    assert serving.info() == ClientsInfo(attached=3, max=3, refused=1, list=())
    assert ask(path, {"do": "stat"}, dict)["ok"], "administrators have places of their own"
    for _ in range(3):
        handler.next("attach")
    clients.pop().close()
    handler.next("detach")
    clients.append(connect(path))
    for channel in clients:
        channel.close()


@pytest.mark.usefixtures("serving")
def test_administrators_and_their_requests_are_limited(path: Path, handler: NotingHandler) -> None:
    for _ in range(admin.REQUESTS_MAX):  # who asks and goes leaves a request under way
        with connect(path, "admin") as channel:
            channel.send({"do": "wait"})
            assert handler.asking.acquire(timeout=WAIT_S)
    with pytest.raises(DaemonError, match="8 requests are under way, which is the limit"):
        ask(path, {"do": "stat"}, dict)
    handler.go_on.set()
    administrators = [connect(path, "admin") for _ in range(limits.ADMINS_MAX)]
    with pytest.raises(DaemonError, match="8 administrators are connected, the limit is 8"):
        ask(path, {"do": "stat"}, dict)
    for channel in administrators:
        channel.close()


@pytest.mark.usefixtures("serving")
def test_an_idle_administrator_makes_room_and_a_waiting_one_stays(
    path: Path, handler: NotingHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = connect(path, "admin")
    waiting.send({"do": "wait"})
    assert handler.asking.acquire(timeout=WAIT_S)
    monkeypatch.setattr(limits, "ADMIN_IDLE_S", 0.1)
    assert "no request came within 0.1 s" in last_words(connect(path, "admin"))
    handler.go_on.set()
    assert waiting.receive(WAIT_S, dict)[0]["did"] == "wait"
    assert "no request came within 0.1 s" in last_words(waiting)


@pytest.mark.usefixtures("serving")
def test_an_answer_that_comes_late_is_given_up(path: Path, handler: NotingHandler) -> None:
    with pytest.raises(DaemonError, match=r"does not answer within 0.2 s"):
        ask(path, {"do": "wait"}, dict, timeout_s=0.2)
    handler.go_on.set()


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("forks", [False, True])
def test_a_killed_client_is_detached_also_where_a_fork_holds_its_socket(
    path: Path, handler: NotingHandler, forks: bool
) -> None:
    child = os.fork()
    if not child:
        try:
            channel = connect(path)
            grandchild = os.fork() if forks else 1
            if grandchild:
                channel.send({"fork": grandchild})
            signal.pause()
        finally:
            os._exit(0)
    attached, _ = handler.next("attach")
    _, message = handler.next("message")
    assert attached.pid == child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert handler.next("detach") == (attached, None)
    if forks:
        assert message is not None
        os.kill(message["fork"], signal.SIGKILL)


def test_the_last_message_of_a_process_that_ended_is_read(path: Path, handler: NotingHandler) -> None:
    """More than is read of a peer in one round, and all there, like the process's end, before the server looks."""
    last = range(connections.PACKETS_A_ROUND + 3)

    def send_and_end() -> str:
        sock = bare_socket(path)
        for message in (HELLO, *({"number": number} for number in last)):
            sock.send(packet(json.dumps(message).encode()))
        return "sent"

    with SocketServer(path, handler) as opened:
        assert in_child(send_and_end, before_reaping=opened.start) == "sent"
        handler.next("attach")
        assert [handler.next("message")[1] for _ in last] == [{"number": number} for number in last]
        handler.next("detach")


def test_all_who_said_hello_at_once_are_attached(path: Path, handler: NotingHandler) -> None:
    with SocketServer(path, handler) as opened:
        waiting = [Channel(bare_socket(path)) for _ in range(server.CLIENTS_MAX)]
        for channel in waiting:
            channel.send(HELLO)
        opened.start()
        for channel in waiting:
            assert channel.receive(WAIT_S, dict)[0]["hello"] == PROTOCOL_VERSION
            channel.close()


def test_nothing_of_a_dropped_peer_reaches_the_handler(path: Path, handler: NotingHandler) -> None:
    with SocketServer(path, handler) as opened, Channel(bare_socket(path)) as channel:
        for message in (HELLO, {"drop": "no more of this"}, {"after": "that"}):
            channel.send(message)
        opened.start()
        handler.next("attach")
        handler.next("message")
        handler.next("detach")


@pytest.mark.usefixtures("serving")
def test_a_client_that_does_not_read_is_disconnected_in_time(
    path: Path, handler: NotingHandler, warnings: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PEER_SEND_S", 0.2)
    file = os.memfd_create("file")
    before = open_files()
    with connect(path):
        attached, _ = handler.next("attach")
        for _ in range(3):
            attached.send({"text": "x" * 900_000}, [file])
        assert handler.next("detach") == (attached, None)
        assert "nothing was read within 0.2 s" in warnings.get(timeout=WAIT_S)
    assert open_files() <= before
    os.close(file)


@pytest.mark.usefixtures("serving")
def test_all_that_is_queued_comes_in_order(path: Path, handler: NotingHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "QUEUE_BYTES_MAX", 64 << 20)
    with connect(path) as client:
        attached, _ = handler.next("attach")
        for number in range(peer.QUEUE_MESSAGES_MAX):
            attached.send({"number": number, "text": "x" * 900_000})
        for number in range(peer.QUEUE_MESSAGES_MAX):
            assert client.receive(WAIT_S, dict)[0]["number"] == number


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("limit", ["messages", "bytes"])
def test_a_full_queue_ends_its_peer_and_no_other(
    path: Path, handler: NotingHandler, warnings: queue.Queue[str], limit: str
) -> None:
    file = os.memfd_create("file")
    before = open_files()
    with connect(path):
        attached, _ = handler.next("attach")
        num_messages, num_bytes = (7, 900_000) if limit == "bytes" else (peer.QUEUE_MESSAGES_MAX + 30, 30_000)
        for _ in range(num_messages):
            attached.send({"text": "x" * num_bytes}, [file])
        assert handler.next("detach") == (attached, None)
        assert "wait for you, which is the limit: read them" in warnings.get(timeout=WAIT_S)
    assert open_files() <= before
    os.close(file)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("role", ["client", "admin"])
def test_a_client_that_sends_too_fast_is_disconnected(
    path: Path, warnings: queue.Queue[str], monkeypatch: pytest.MonkeyPatch, role: Literal["client", "admin"]
) -> None:
    monkeypatch.setattr(peer, "MESSAGES_A_SECOND_MAX", 50)

    def flood(channel: Channel) -> None:
        for _ in range(100_000):
            channel.send({"do": "stat"} if role == "admin" else {"n": 1})
            if role == "admin" and "error" in channel.receive(WAIT_S, dict)[0]:
                return

    with connect(path) as other, connect(path, role) as hostile:
        if role == "client":
            with pytest.raises(ChannelClosed):
                flood(hostile)
        else:
            flood(hostile)
        assert "more than 50 messages came within a second" in warnings.get(timeout=WAIT_S)
        other.send({"echo": 1})
        assert other.receive(WAIT_S, dict) == ({"echo": 1}, [])


@pytest.mark.usefixtures("serving")
def test_the_handler_may_drop_a_peer(path: Path, handler: NotingHandler) -> None:
    channel = connect(path)
    attached, _ = handler.next("attach")
    attached.send({"before": 1})
    attached.drop("your store was swapped: attach again")
    assert channel.receive(WAIT_S, dict) == ({"before": 1}, [])
    assert last_words(channel) == "your store was swapped: attach again"
    assert handler.next("detach") == (attached, None)


def test_closing_says_goodbye_and_detaches(path: Path, handler: NotingHandler, serving: SocketServer) -> None:
    client, administrator = connect(path), connect(path, "admin")
    silent = bare_socket(path)
    handler.next("attach")
    administrator.send({"do": "wait"})
    assert handler.asking.acquire(timeout=WAIT_S)
    assert not serving.close(timeout_s=0.2, reason="the machine restarts"), "a request is still under way"
    for channel in (client, administrator):
        assert channel.receive(WAIT_S, dict) == ({"bye": "the machine restarts"}, [])
        with pytest.raises(ChannelClosed):
            channel.receive(WAIT_S, dict)
        channel.close()
    silent.close()
    handler.next("detach")
    handler.go_on.set()
    assert serving.close()
    assert serving.close(), "closing again is harmless"
    assert not list(path.parent.iterdir())
    with pytest.raises(DaemonError, match="there is no socket"):
        dial(path)


def test_a_goodbye_instead_of_an_answer_is_an_error(path: Path, handler: NotingHandler, serving: SocketServer) -> None:
    said: list[str] = []

    def wait() -> None:
        try:
            ask(path, {"do": "wait"}, dict, WAIT_S)
        except DaemonError as error:
            said.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert handler.asking.acquire(timeout=WAIT_S)
    serving.close(timeout_s=0)
    thread.join(WAIT_S)
    handler.go_on.set()
    assert said == ["the daemon ended the connection: the daemon ends"]


def test_a_server_leaves_neither_descriptors_nor_threads(path: Path, handler: NotingHandler) -> None:
    before = held()
    for turn in range(3):
        opened = SocketServer(path, handler)
        if turn:
            opened.start()
            channels = [connect(path), connect(path, "admin"), Channel(bare_socket(path))]
            ask(path, {"do": "stat"}, dict)
        assert opened.close()
        if turn:
            for channel in channels:
                channel.close()
        assert held() <= before


def test_idle_clients_wake_nobody(path: Path, handler: NotingHandler) -> None:
    before = running_threads()
    with SocketServer(path, handler) as opened:
        opened.start()
        clients = [connect(path) for _ in range(server.CLIENTS_MAX)]
        assert len(running_threads() - before) == 1
        assert opened._connections.seconds_left() is None
        for number, channel in enumerate(clients):
            channel.send({"echo": number})
            assert channel.receive(WAIT_S, dict) == ({"echo": number}, [])
            channel.close()


def test_out_of_descriptors_connections_wait_and_nothing_spins(
    path: Path, handler: NotingHandler, warnings: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "ACCEPT_PAUSE_S", 0.5)
    monkeypatch.setattr(limits, "HANDSHAKE_S", 0.2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    with SocketServer(path, handler) as opened, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late:
        opened.start()
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            while len(taken) < 256:
                taken.append(fcntl.fcntl(late.fileno(), fcntl.F_DUPFD_CLOEXEC, 0))
        except OSError:  # none is left
            late.connect(os.fspath(path))
            assert "a connection cannot be accepted: Too many open files" in warnings.get(timeout=WAIT_S)
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(taken) < 256
        connect(path).close()
        with Channel(socket.socket(fileno=os.dup(late.fileno()))) as channel:
            assert channel.receive(WAIT_S, dict)[0]["error"] == "DaemonError", "it was accepted, and said nothing"
        assert warnings.qsize() < 5, "it was not tried again and again"


def test_repeated_refusals_of_one_peer_are_logged_rarely(
    warnings: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_log, "LINES_A_MINUTE_MAX", 5)
    clock = iter([0.0] * 20 + [60.0])
    monkeypatch.setattr(peer_log, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    log = peer_log.PeerLog()
    for number in range(21):
        log.warn(f"refused {number}")
    lines = [warnings.get(timeout=WAIT_S) for _ in range(7)]
    assert lines[:5] == [f"refused {number}" for number in range(5)]
    assert lines[5:] == ["15 lines about peers were left out, of which 5 a minute are logged", "refused 20"]
