"""A daemon in a process of its own, and clients in processes of theirs that check every row:
what tests of faults share.

Two versions of one model differ in the values of all rows, so that a row says which version it came from. A client is
told what to look up by files (`Truth`) and ends, with a report, when its input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.stores import Model, make_model, place_some, random_keys

from tierstore.ipc.client_socket import ask

WAIT_S = 60.0  # for what must happen; nothing that works takes nearly as long
POLL_S = 0.01
TABLES = ("layers.1", "layers.14")
POOL_TOKENS = 3000
DRAM = "1300KiB"  # nothing but the plain table is kept whole
CLIENT = Path(__file__).with_name("checking_client.py")


@dataclass(frozen=True)
class Versions:
    """Two stores of the same tables, all of whose rows differ, and what clients check by."""

    stores: tuple[Path, Path]
    models: tuple[Model, Model]
    truth: Path  # an .npz: pool, int64 [P, 3]; layers.1 and layers.14 with their version, uint8 [P, 24, 40]
    pool: np.ndarray

    def expected(self, version: int, name: str, which: np.ndarray) -> np.ndarray:
        """Rows of tokens of the pool, of the first version (0) or the second."""
        return self.models[version].expected(name, self.pool[which])


def make_versions(folder: Path) -> Versions:
    """Builds both. Blocks, a few seconds."""
    models = make_model(folder / "one", seed=0), make_model(folder / "two", seed=1)
    stores = folder / "one.tier", folder / "two.tier"
    for model, store in zip(models, stores, strict=True):
        model.build(store, shard_bytes=65536)
    place_some(stores[0])
    pool = random_keys(np.random.default_rng(0), POOL_TOKENS)
    arrays = {f"{name}/{v}": models[v].expected(name, pool) for name in TABLES for v in range(2)}
    np.savez(folder / "truth.npz", pool=pool, **arrays)
    return Versions(stores, models, folder / "truth.npz", pool)


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        yield Path(folder)


def wait_for(condition: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> float:
    """Polls, since what is waited for is in another process; returns the seconds that it took."""
    started, pause = time.monotonic(), threading.Event()
    while not condition():
        assert time.monotonic() - started < wait_s, f"{what}: not within {wait_s} s"
        pause.wait(POLL_S)
    return time.monotonic() - started


class DaemonProcess:
    """`tierstore serve` of a store, from when it is ready until it is killed; also a context manager.
    `log` is what it said."""

    def __init__(self, store: Path, socket: Path, *options: str, replan: str = "off", dram: str = DRAM) -> None:
        arguments = ["serve", str(store), "--socket", str(socket), "--dram", dram, "--replan", replan, *options]
        code = "from tierstore.tools.cli import main; main()"
        self.socket, self.log = socket, list[str]()
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", code, *arguments], stderr=subprocess.PIPE, text=True
        )
        self._ready, self._ended = threading.Event(), threading.Event()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        if not self._ready.wait(WAIT_S) or self.process.poll() is not None:
            self.kill()
            raise AssertionError("".join(self.log))

    @property
    def pid(self) -> int:
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if "event=ready" in line:
                self._ready.set()
        self._ready.set()

    def ask(self, what: str, **rest: Any) -> dict[str, Any]:
        return ask(self.socket, {"do": what, **rest}, WAIT_S)

    def stat(self) -> dict[str, Any]:
        return self.ask("stat")

    def wait_attached(self, count: int, wait_s: float = WAIT_S) -> float:
        """Waits until so many clients are attached; returns the seconds that it took."""
        return wait_for(lambda: self.stat()["clients"]["attached"] == count, f"{count} clients attached", wait_s)

    def use(self) -> Use:
        """What it holds now."""
        return use_of(self.pid)

    def kill(self) -> None:
        self.process.kill()
        self._join()

    def stop(self) -> int:
        """Ends it as a service manager does; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        self._join()
        return self.process.returncode

    def _join(self) -> None:
        self.process.wait(WAIT_S)
        self._reading.join(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        assert not any("Traceback" in line or "Fatal" in line for line in self.log), "".join(self.log)


@dataclass(frozen=True)
class Use:
    """What a process holds: open descriptors, threads, bytes of memory that are its own, and that are anybody's."""

    descriptors: int
    threads: int
    own_bytes: int
    resident_bytes: int


def use_of(pid: int) -> Use:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kilobytes = {name: int(status[name].split()[0]) for name in ("RssAnon", "VmRSS")}
    return Use(
        len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), kilobytes["RssAnon"] << 10, kilobytes["VmRSS"] << 10
    )


class CheckingClient:
    """A process that looks up and checks rows until `stop`, which returns its report."""

    def __init__(self, versions: Versions, socket: Path, seed: int, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(CLIENT), str(socket), str(versions.truth), str(seed), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> dict[str, Any]:
        """Returns {"lookups", "keys", "hits", "faults": [text], "threads", "longest_s", ...}."""
        said, _ = self.process.communicate("", timeout=WAIT_S)
        assert self.process.returncode == 0, (self.process.returncode, said)
        report: dict[str, Any] = json.loads(said)
        return report

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.contextmanager
def checking_clients(
    versions: Versions, daemon: DaemonProcess, count: int, *options: str
) -> Iterator[list[CheckingClient]]:
    """So many clients, attached; at the end each must have looked up, and found nothing wrong."""
    attached = daemon.stat()["clients"]["attached"]
    clients = [CheckingClient(versions, daemon.socket, seed, *options) for seed in range(count)]
    try:
        daemon.wait_attached(attached + count)
        yield clients
        reports = [client.stop() for client in clients]
    finally:
        for client in clients:
            if client.process.poll() is None:
                client.kill()
    for report in reports:
        assert not report["faults"], report["faults"][:3]
        assert report["lookups"] > 10, report
    lookups, longest_s = sum(each["lookups"] for each in reports), max(each["longest_s"] for each in reports)
    print(f"{count} clients: {lookups} lookups checked, the longest took {longest_s:.3f} s")
