"""Mooncake as the home of a store's shards: a process of ours asks it for pages, or puts stretches of shards into it.

    mooncake://HOST:PORT[?metadata=URL&host=ADDRESS]    its master; its metadata server, else none (P2PHANDSHAKE); what
                                                        this host is called, else its address on the way to the master

Each stretch of a shard, the whole pages of 4 MiB, is an object, tierstore/DIGEST/TABLE/SHARD/NUMBER: DIGEST is the
base's, so objects of another build are other ones. The client library runs in a process of its own
(`mooncake_worker`): its calls have no time limit, and cannot be ended otherwise. If the process ends, it is started
again, however often that fails. The folder of its socket goes with the store; if we are killed, the worker removes it,
and if that was killed, too, the next start.

Input: an address and a catalog. Output: a `ServedBy`. Errors: `ConfigError` (an address, no library, nobody there),
`StoreNotReadyError` (objects are missing).
"""

from __future__ import annotations

import collections
import contextlib
import errno
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, urlsplit

from ..errors import ConfigError, StoreNotReadyError
from ..extras import missing
from ..formats.catalog import CatalogImage
from ..layout import TableLayout
from .served import SERVED_WAIT_S, ServedBy

logger = logging.getLogger("tierstore")

SCHEME = "mooncake"
WITHOUT_METADATA = "P2PHANDSHAKE"
STRETCH_BYTES = 4 << 20
WORKER_FILE = Path(__file__).with_name("mooncake_worker.py")
START_LIMIT_S = 30.0  # to connect, and to look whether all objects are there
CLOSE_LIMIT_S = 5.0
START_PAUSE_S, START_PAUSE_S_MAX = 1.0, 30.0  # before a worker that ended is started again; doubled if that fails
FOLDER = "tierstore-mooncake-"
SOCKET = "pages"
LEFT_S = 60.0  # of age, from which a folder whose socket nobody serves is one that was left behind
BACKLOG = 1024
LINES_KEPT = 20  # of what the library logs


@dataclass(frozen=True)
class Address:
    """Where a Mooncake is, as its client wants it."""

    text: str
    master: str
    metadata: str
    host: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads an address; raises `ConfigError` for one of another form."""
        form = "mooncake://HOST:PORT, of its master"
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{text!r}: {error}; give {form}") from error
        options = parse_qs(parts.query, strict_parsing=bool(parts.query))
        unknown = sorted(set(options) - {"metadata", "host"})
        if parts.scheme != SCHEME or not parts.hostname or port is None or parts.path.strip("/") or unknown:
            raise ConfigError(f"{text!r} is not an address of the form {form}" + (f" ({unknown})" if unknown else ""))
        host = options["host"][0] if "host" in options else _own_address(parts.hostname, port)
        metadata = options.get("metadata", [WITHOUT_METADATA])[0]
        return cls(text, f"{parts.hostname}:{port}", metadata, host)


def _own_address(host: str, port: int) -> str:
    """Returns the address of this host that packets to another one come from."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"mooncake://{host}:{port}: {error}; is the name right?") from error


class MooncakeClient:
    """A running worker, and the socket that it serves. `served` is what readers need of it.

    A thread looks after the worker: it keeps the last lines that the library logs, and starts it anew if it ends.
    """

    def __init__(self, address: Address, image: CatalogImage, *, check: bool = True) -> None:
        """Starts the worker and waits until it is connected; check: and until all objects are known to be there.

        Blocks, START_LIMIT_S at most. Raises `ConfigError` and `StoreNotReadyError`.
        """
        if importlib.util.find_spec("mooncake") is None:
            raise missing(f"pages at {address.text}", "mooncake", ModuleNotFoundError("No module named 'mooncake'"))
        self._address = address
        self._config = _config_of(address, image, SERVED_WAIT_S)
        self._lines: collections.deque[str] = collections.deque(maxlen=LINES_KEPT)
        self._closing = threading.Event()
        self._owner = os.getpid()
        _remove_left()
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[str] | None = None
        put = f"tierstore mooncake put {image.path} {address.text}"
        tables: list[dict[str, Any]] = self._config["tables"]
        self.served = ServedBy(
            self._folder / SOCKET,
            address.text,
            lambda index, shard, start: f"{tables[index]['folder']}/{shard}/{start // tables[index]['stretch_bytes']}",
            f"put it again: {put} --replace",
            SERVED_WAIT_S,
        )
        try:
            self._listener.bind(os.fspath(self.served.socket_path))
            self._listener.listen(BACKLOG)
            self._process = self._start()
            self._await_ready(self._process, check, put)
            self._keeper = threading.Thread(target=self._keep, name="tierstore-mooncake", daemon=True)
            self._keeper.start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> subprocess.Popen[str]:
        fd = self._listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-P", os.fspath(WORKER_FILE), str(fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[fd],
            process_group=0,  # Ctrl-C is for us; a session of its own would be scheduled apart from us
            text=True,
            errors="replace",
        )
        try:
            threading.Thread(target=self._read_log, args=(process.stderr,), daemon=True).start()
        except BaseException:
            process.kill()
            process.wait()
            _close_pipes(process)
            raise
        return process

    def _read_log(self, log: IO[str]) -> None:
        with log:
            self._lines.extend(line.strip() for line in log)

    def _ask(self, process: subprocess.Popen[str], *, check: bool) -> dict[str, Any]:
        """Hands a worker its task; returns its answer within START_LIMIT_S, {} if it ends without one."""
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(START_LIMIT_S, process.kill)
        late.start()
        try:
            process.stdin.write(
                json.dumps(self._config | {"check": check, "socket": os.fspath(self.served.socket_path)}) + "\n"
            )
            process.stdin.flush()
            return dict(json.loads(process.stdout.readline() or "{}"))
        except OSError:  # it has ended
            return {}
        finally:
            late.cancel()

    def _await_ready(self, process: subprocess.Popen[str], check: bool, put: str) -> None:
        answer = self._ask(process, check=check)
        if answer.get("ready"):
            return
        if "missing" in answer:
            raise StoreNotReadyError(f"{self._address.text} has no object {answer['missing']}; put the shards: {put}")
        why = answer.get("error") or f"no answer within {START_LIMIT_S:g} s"
        last = f"; its last words: {self._lines[-1]}" if self._lines else ""
        raise ConfigError(f"{self._address.text}: {why}; look whether its master runs{last}")

    def _keep(self) -> None:
        """Starts the worker again whenever it ends, until `close`; meanwhile readers get named errors."""
        while True:
            assert self._process is not None
            status = self._process.wait()
            if self._closing.is_set():
                return
            logger.warning(
                "%s: the process that reads pages has ended (status %d) and is started again; its last lines: %s",
                self._address.text, status, " | ".join(list(self._lines)[-2:]) or "nothing",
            )  # fmt: skip
            pause_s = START_PAUSE_S
            while not self._closing.wait(pause_s) and not self._is_started_again():
                pause_s = min(2 * pause_s, START_PAUSE_S_MAX)
            if self._closing.is_set():
                return

    def _is_started_again(self) -> bool:
        """Starts a worker in place of one that ended; returns whether it serves."""
        assert self._process is not None
        why = "it ended at once"
        try:
            _close_pipes(self._process)
            self._process = self._start()
            if self._closing.is_set():  # `close` may not have seen this one
                self._process.kill()
            answer = self._ask(self._process, check=False)
            if answer.get("ready"):
                return True
            self._process.kill()
            self._process.wait()
            why = answer.get("error") or why
        except (OSError, RuntimeError, MemoryError, ValueError) as error:  # no process, thread, descriptor or memory
            why = f"{type(error).__name__}: {error}"
        if not self._closing.is_set():
            logger.warning(
                "%s: the process that reads pages cannot be started: %s; it is tried again", self._address.text, why
            )
        return False

    def close(self) -> None:
        """Ends the worker, within CLOSE_LIMIT_S, and its thread; closing twice is harmless."""
        if os.getpid() != self._owner:  # a forked child's copy: the worker is its parent's
            self._listener.close()
            return
        self._closing.set()
        process = self._process
        if process is not None:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
            try:
                process.wait(CLOSE_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if hasattr(self, "_keeper"):
            self._keeper.join(CLOSE_LIMIT_S)
        if self._process is not None:
            _close_pipes(self._process)
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _remove_left() -> None:
    """Removes folders of processes of this user that were killed: nobody listens at their sockets."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError):  # somebody else removes it, or it is somebody else's
            found = folder.lstat()
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < LEFT_S:
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.setblocking(False)
                if probe.connect_ex(os.fspath(folder / SOCKET)) in (errno.ECONNREFUSED, errno.ENOENT):
                    shutil.rmtree(folder)


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()


def _config_of(address: Address, image: CatalogImage, wait_s: float) -> dict[str, Any]:
    tables = [
        {
            "folder": f"tierstore/{image.base_identity}/{layout.spec.name}",
            "stretch_bytes": stretch_bytes(layout),
            "shard_bytes": [image.shards[name][index].num_bytes for index in range(layout.num_shards)],
        }
        for name, layout in image.tables.items()
    ]
    return {
        "address": address.master, "metadata": address.metadata, "host": address.host, "tables": tables,
        "wait_s": wait_s,
    }  # fmt: skip


def stretch_bytes(layout: TableLayout) -> int:
    """Returns how many bytes of a table's shards an object holds: whole pages, at most STRETCH_BYTES."""
    return STRETCH_BYTES // layout.page_bytes * layout.page_bytes
