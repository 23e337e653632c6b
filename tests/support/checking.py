"""Clients in processes of their own that check every row, and the two versions of a model that they check by.

The versions differ in the values of all rows, so that a row says which version it came from. A client reads what to
look up from a file (`Versions.truth`); it ends, with a report, when its input ends.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.served import ServeProcess
from support.stores import Model, make_model, place_some, random_keys
from support.waiting import WAIT_S

TABLES = ("layers.1", "layers.14")
POOL_TOKENS = 3000
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
    versions: Versions, daemon: ServeProcess, count: int, *options: str
) -> Iterator[list[CheckingClient]]:
    """So many clients, attached; at the end each must have looked up, and found nothing wrong."""
    attached = daemon.ask("stat")["clients"]["attached"]
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
