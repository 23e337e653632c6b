"""An id that the kernel gives for "unknown" is nobody's: not the daemon's user, nor one who is let in,
nor an ended process."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon_peers import NOBODY, NotingHandler, ServingChild, as_root, become, in_child
from support.repository import REPOSITORY
from support.served import ServeProcess
from support.waiting import WAIT_S

from tierstore.daemon.attachment import Attachment
from tierstore.daemon.server import SocketServer
from tierstore.errors import ConfigError
from tierstore.ipc import identity
from tierstore.ipc.client_socket import ask, dial
from tierstore.ipc.identity import known_ids, process_text, unknown_id, user_text

NEW_USER_NAMESPACE, NEW_PID_NAMESPACE = 0x10000000, 0x20000000
STRANGER = 4242
TRIED = "no namespace"


def shown(monkeypatch: pytest.MonkeyPatch, files: dict[str, list[int]]) -> None:
    monkeypatch.setattr(identity, "_first_numbers", lambda path, _: files.get(path, []))


def test_in_the_first_namespace_every_id_is_somebodys(monkeypatch: pytest.MonkeyPatch) -> None:
    shown(monkeypatch, {"/proc/self/uid_map": [2**32 - 1], "/proc/sys/kernel/overflowuid": [65534]})
    assert unknown_id("uid") is None
    assert known_ids("uid", [0, 65534]) == {0, 65534}
    assert user_text(65534) == "user 65534"


def test_in_a_namespace_that_maps_some_ids_the_overflow_id_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/self/uid_map": [1, 65536], "/proc/sys/kernel/overflowuid": [4321]}
    shown(monkeypatch, files)
    assert unknown_id("uid") == 4321
    assert known_ids("uid", [0, 4321, 65534]) == {0, 65534}
    assert "does not map" in user_text(4321)


def test_without_proc_the_overflow_id_counts_as_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown(monkeypatch, {})
    assert (unknown_id("uid"), unknown_id("gid")) == (65534, 65534)


def test_the_kernel_is_asked_for_both_kinds_of_ids() -> None:
    for kind in ("uid", "gid"):
        num_mapped = sum(int(line.split()[2]) for line in Path(f"/proc/self/{kind}_map").read_text().splitlines())
        overflow = int(Path(f"/proc/sys/kernel/overflow{kind}").read_text())
        assert unknown_id(kind) == (None if num_mapped == 2**32 - 1 else overflow)


def test_a_process_without_a_number_has_words() -> None:
    assert process_text(7) == "process 7"
    assert process_text(0) == "a process of another PID namespace"


def test_an_unknown_id_cannot_be_let_in_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierstore.daemon.handshake.unknown_id", lambda _: NOBODY)
    with pytest.raises(ConfigError, match=f"--allow-user {NOBODY}: .* stands for every user whom it does not map"):
        SocketServer(tmp_path / "socket", NotingHandler(), allowed_users=[7, NOBODY])


@pytest.fixture
def open_path() -> Iterator[Path]:
    """The path of a socket in a folder that all users may enter and write to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder) / "socket"


def unshared(kind: int) -> None:
    """Goes to a new namespace, which takes a process of one thread."""
    if ctypes.CDLL(None, use_errno=True).unshare(kind):
        raise OSError(TRIED)


def started(act: str, *arguments: object) -> subprocess.Popen[str]:
    """Runs a function of this file in a process of its own, of one thread:
    a fork of this one may have threads of gRPC's."""
    code = "import sys; from ipc import test_identity; getattr(test_identity, sys.argv[1])(*sys.argv[2:])"
    folders = os.pathsep.join((str(REPOSITORY / "tests"), str(REPOSITORY)))
    return subprocess.Popen(
        [sys.executable, "-c", code, act, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": folders, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip


def dial_unmapped(path: str) -> None:
    """Dials from a user namespace that maps nobody: this process's user looks like the daemon's."""
    become(STRANGER + 1)
    try:
        unshared(NEW_USER_NAMESPACE)
        assert os.geteuid() == unknown_id("uid")
        print(dial(path))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


def serve_unshared(path: str, kind: str, user: str) -> None:
    """Serves from a new namespace; says on a line each who attaches and is detached. user: an id, or nothing."""
    handler = NotingHandler()
    become(int(user) if user else None)
    try:
        unshared(int(kind))
    except OSError as error:
        print(error, flush=True)
        return
    if int(kind) == NEW_PID_NAMESPACE and (child := os.fork()):  # it holds the children of who made it
        print(child, flush=True)
        os.waitpid(child, 0)
        return
    server = SocketServer(path, handler)
    server.start()
    os.chmod(path, 0o666)
    print("serving", flush=True)
    while True:
        called, peer, _ = handler.calls.get()
        print(called, peer.pid, peer.pidfd is not None, flush=True)


@as_root
def test_a_daemon_whom_the_namespace_does_not_map_is_not_taken_for_our_own(open_path: Path) -> None:
    daemon = ServingChild(open_path, STRANGER)
    try:
        open_path.chmod(0o666)
        said, _ = started("dial_unmapped", open_path).communicate(timeout=WAIT_S)
    finally:
        daemon.kill()
    if TRIED in said:
        pytest.skip(said)
    assert said.startswith("DaemonError: ")
    assert "belongs to user 65534 (any user whom this user namespace does not map)" in said


class NamespacedDaemon:
    """A daemon in a namespace of its own; `said` is what it wrote, a line at a time."""

    def __init__(self, path: Path, kind: int, *, user: int | None) -> None:
        self._process = started("serve_unshared", path, kind, "" if user is None else user)
        said = self.said()
        if TRIED in said:
            self._process.wait(WAIT_S)
            pytest.skip(said)
        self._server = int(said) if said.isdecimal() else self._process.pid
        assert "serving" in (said, self.said() if said.isdecimal() else "")

    def said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def kill(self) -> None:
        os.kill(self._server, signal.SIGKILL)
        self._process.wait(WAIT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


@as_root
def test_a_stranger_is_not_taken_for_the_user_of_a_daemon_in_a_namespace(open_path: Path) -> None:
    daemon = NamespacedDaemon(open_path, NEW_USER_NAMESPACE, user=STRANGER)
    try:
        for user in (STRANGER + 1, None):
            said = in_child(lambda: str(ask(open_path, {"do": "stat"}, dict, 10, trusted_uids=[STRANGER])), user)
            assert said.startswith("DaemonError: user 65534 (any user whom this user namespace does not map) "), said
    finally:
        daemon.kill()


def held_open(path: Path) -> subprocess.Popen[bytes]:
    """A process that attaches, forks a child that holds the socket too, and says so."""
    code = (
        "import os, sys, time; from tierstore.ipc.client_socket import dial; found = dial(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(600)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)


@as_root
@pytest.mark.skipif(
    not hasattr(os, "pidfd_open") or tuple(map(int, os.uname().release.split(".")[:2])) < (6, 5),
    reason="the kernel has no SO_PEERPIDFD",
)
def test_a_client_of_another_pid_namespace_lives_until_its_process_ends(open_path: Path) -> None:
    daemon = NamespacedDaemon(open_path, NEW_PID_NAMESPACE, user=None)
    client = held_open(open_path)
    try:
        assert daemon.said() == "attach 0 True"
        assert client.stdout is not None
        fork = int(client.stdout.readline())
        client.kill()
        client.wait(WAIT_S)
        client.stdout.close()
        assert daemon.said().startswith("detach 0")  # though its fork holds the socket
        os.kill(fork, signal.SIGKILL)
    finally:
        client.kill()
        daemon.kill()


def test_a_client_whose_number_is_unknown_may_map_its_block_until_its_process_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        attachment = Attachment(0, on_gpu=True, pidfd=pidfd)
        os.close(pidfd)  # it has its own
        attachment.give_block(1)
        assert attachment.is_mapped()
        process.kill()
        process.wait(WAIT_S)
        assert not attachment.is_mapped()
        attachment.close()


def test_a_client_of_whom_nothing_is_known_counts_as_alive() -> None:
    attachment = Attachment(0, on_gpu=True)
    assert attachment.is_mapped()
    attachment.close()


def test_a_hidden_proc_is_not_taken_for_the_end_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(self)

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        attachment = Attachment(process.pid, on_gpu=True)
        attachment.give_block(1)
        assert not attachment.is_mapped()  # it maps no block
        monkeypatch.setattr(Path, "read_text", hidden)
        assert attachment.is_mapped()
        process.kill()
        process.wait(WAIT_S)
        assert not attachment.is_mapped()
        attachment.close()


def test_a_forked_process_is_another_also_if_its_number_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in a PID namespace of its own
    parent = identity.this_process()
    assert in_child(lambda: str(identity.this_process() != parent)) == "True"
    assert identity.this_process() == parent


@as_root
def test_a_child_of_process_1_in_a_namespace_of_its_own_attaches_by_itself(built: Path, tmp_path: Path) -> None:
    """Both have the number 1, so that a fork cannot be told by it."""
    code = (
        "import ctypes, os, sys, numpy, tierstore\n"
        "def fork():\n"
        "    if ctypes.CDLL(None).unshare(0x20000000): print('no namespace'); os._exit(0)\n"
        "    child = os.fork()\n"
        "    if child: os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "def told():\n"
        "    store['layers.1'].lookup(numpy.ones((1, 3), dtype=numpy.int64))\n"
        "    return [os.getpid(), store.stats()['keys']]\n"
        "fork()\n"
        "store = tierstore.connect(sys.argv[1])\n"
        "print(told(), flush=True)\n"
        "fork()\n"
        "print(told(), flush=True)\n"
        "os._exit(0)\n"
    )
    with ServeProcess(built, tmp_path / "socket", "--dram", "900KiB"):
        command = [sys.executable, "-c", code, str(tmp_path / "socket")]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    if "no namespace" in said:
        pytest.skip(said)
    assert said.splitlines() == ["[1, 3]", "[1, 3]"]  # what the parent counted is the parent's
