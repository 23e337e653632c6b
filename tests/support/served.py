"""Daemons for tests, in this process (`serving`) or their own (`ServeProcess`), and lookups without a pause."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from support.shapes import POISON
from support.stores import Model, make_model, place_some
from support.waiting import WAIT_S, eventually

from tierstore.daemon.daemon import Daemon
from tierstore.decisions.shared_budget import divide_shared
from tierstore.errors import BudgetError
from tierstore.formats.catalog import read_catalog
from tierstore.ipc.client_socket import ask
from tierstore.store.store import Store

KIB, MIB = 1 << 10, 1 << 20


@contextlib.contextmanager
def serving(store: Path, socket: Path, dram_bytes: int, **options: Any) -> Iterator[Daemon]:
    """A daemon in this process. It does not replan by itself."""
    daemon = Daemon(store, socket, dram_bytes, **{"replan_s": None} | options)
    daemon.start()
    try:
        yield daemon
    finally:
        assert daemon.close()


@contextlib.contextmanager
def killed(child: int) -> Iterator[None]:
    """Kills a child at the end, whatever came before."""
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def request(socket: Path, do: str, **more: Any) -> dict[str, Any]:
    """A daemon's answer to an administrator."""
    return ask(socket, {"do": do, **more}, dict, timeout_s=WAIT_S)


def least_budget(store: Path) -> int:
    """The smallest budget that a daemon takes for a store without a placement, as its refusal says."""
    try:
        divide_shared(read_catalog(store).tables, 1)
    except BudgetError as error:
        return int(str(error).split("below the ")[1].split()[0])
    raise AssertionError("a budget of one byte was taken")


def other_model(folder: Path, fingerprint: str | None = None) -> Model:
    """A checkpoint with the tables of `make_model`'s default and other rows; with another hash, where one is given."""
    made = make_model(folder, seed=1)
    if fingerprint is None:
        return made
    sources = tuple(replace(each, spec=replace(each.spec, fingerprint=fingerprint)) for each in made.sources)
    return replace(made, sources=sources)


def make_newer(folder: Path) -> tuple[Path, Model]:
    """A store of the same hash as `placed`, with other rows and a placement, and the model of it.
    Tests must not change it."""
    other = other_model(folder / "other")
    other.build(folder / "store", shard_bytes=65536)
    place_some(folder / "store")
    return folder / "store", other


class Traffic:
    """Threads that look up without a pause: every lookup must give all rows of one of the versions, by table and key.

    Leave it by `with`, which ends them and fails where a lookup failed or was wrong.
    """

    def __init__(self, store: Store, name: str, keys: np.ndarray, *versions: np.ndarray, threads: int = 2) -> None:
        """versions: what `keys` may give, each uint8 [N, O * H, row_bytes]."""
        self._store, self._name, self._keys, self._versions = store, name, keys, versions
        self._stop = threading.Event()
        self.seen: list[
            int
        ] = []  # of the latest lookups, the newest last; versions with equal rows are the first of them
        self.done = 0
        self.faults: list[str] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(threads)]

    def _run(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not self._stop.is_set() and not self.faults:
            start = int(rng.integers(0, len(self._keys)))
            part = np.s_[start : start + int(rng.integers(1, 40))]
            out = np.full((len(self._keys[part]), *self._versions[0].shape[1:]), POISON, dtype=np.uint8)
            try:
                self._store[self._name].lookup(self._keys[part], out)
            except Exception as error:  # whatever it is, the test says so
                self.faults.append(f"{type(error).__name__}: {error}")
                return
            found = [number for number, rows in enumerate(self._versions) if np.array_equal(out, rows[part])]
            with self._lock:
                self.done += 1
                self.seen += found if len(found) == 1 else []
                if not found:
                    self.faults.append(f"wrong rows of keys {start} and on")

    def go_on(self, lookups: int = 20) -> None:
        """Waits until so many more lookups are done, or one has failed."""
        end = self.done + lookups
        eventually(lambda: self.done >= end or self.faults)
        assert not self.faults

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert not self.faults, self.faults


@dataclass(frozen=True)
class Use:
    """What a process uses: open descriptors, threads, bytes of memory that are its own, and that are anybody's."""

    descriptors: int
    threads: int
    own_bytes: int
    resident_bytes: int


def use_of(pid: int) -> Use:
    """What a process uses now."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kilobytes = {name: int(status[name].split()[0]) for name in ("RssAnon", "VmRSS")}
    return Use(
        len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), kilobytes["RssAnon"] << 10, kilobytes["VmRSS"] << 10
    )


class ServeProcess:
    """`tierstore serve`, started; `lines` are those of its log so far.

    Leave it by `with`, which kills what still runs and fails if it logged a traceback.
    """

    def __init__(self, store: Path, socket: Path, *options: str, ready: bool = True, **environment: str) -> None:
        """ready: waits until it says so, which it must."""
        self.socket = socket
        command = [sys.executable, "-X", "faulthandler", "-m", "tierstore.tools.cli", "serve", str(store)]
        self.process = subprocess.Popen(
            [*command, "--socket", str(socket), *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if ready:
            self.line("event=ready")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def line(self, part: str, since: int = 0) -> str:
        """The first line with a part, waited for; since: lines before it are passed over."""

        def found() -> str | None:
            ended = self.process.poll() is not None and not self._reader.is_alive()
            here = next((line for line in self.lines[since:] if part in line), None)
            assert here or not ended, f"ended with status {self.process.returncode}: {self.text}"
            return here

        return str(eventually(found, f"a line with {part!r}"))

    @property
    def text(self) -> str:
        """All that it logged."""
        return "\n".join(self.lines)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Its answer to an administrator."""
        return request(self.socket, do, **more)

    def wait_attached(self, count: int) -> float:
        """Waits until so many clients are attached; returns the seconds that it took."""
        started = time.monotonic()
        eventually(lambda: self.ask("stat")["clients"]["attached"] == count, f"{count} clients attached")
        return time.monotonic() - started

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ends it by a signal; returns its status."""
        self.process.send_signal(number)
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return status

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        # An event that was logged has its traceback within a line; a traceback of its own is a crash.
        assert not any(line.startswith(("Traceback", "Fatal")) for line in self.lines), self.text
