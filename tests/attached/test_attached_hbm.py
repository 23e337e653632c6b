"""An hbm tier of a process that is attached to a daemon, and versions that come while it looks up."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.served import KIB, MIB, Traffic, make_newer, request, serving
from support.shapes import ENTRY_BYTES, HEADS, POISON, ROW_BYTES
from support.stores import Model, random_keys
from support.waiting import eventually

import tierstore
from tierstore.attached.hbm import AttachedHbm

NAME = "layers.1"
KEYS = random_keys(np.random.default_rng(0), 60, distinct=40)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    return make_newer(tmp_path_factory.mktemp("newer"))


def test_hot_keys_come_from_hbm_and_follow_the_daemons_version(
    placed: Path, newer: tuple[Path, Model], model: Model, tmp_path: Path
) -> None:
    socket = tmp_path / "s"
    with (
        serving(placed, socket, 900 * KIB),
        tierstore.connect(socket, hbm="4MiB", device=DEVICE) as store,
    ):
        hot = store[NAME].explain(KEYS) == "hbm"
        assert hot.any()
        rows = {1: model.expected(NAME, KEYS), 2: newer[1].expected(NAME, KEYS)}
        with Traffic(store, NAME, KEYS, rows[1], rows[2], threads=2) as traffic:
            for version, path in ((2, newer[0]), (3, placed), (4, newer[0])):
                traffic.go_on()
                assert request(socket, "swap", store=str(path))["ok"]
                eventually(lambda version=version: store.stats()["attached"]["version"] == version)
                np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[2 - version % 2])
        eventually(lambda: np.array_equal(store[NAME].explain(KEYS) == "hbm", hot))  # filled again, in its own time
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[2])
        assert store.stats()["hits"]["hbm"] > 0


def test_every_lookup_from_the_device_is_of_one_version_whole(
    placed: Path, newer: tuple[Path, Model], model: Model, tmp_path: Path
) -> None:
    socket = tmp_path / "s"
    tokens = KEYS[:20]
    rows = [each.expected(NAME, tokens).reshape(-1, ENTRY_BYTES) for each in (model, newer[1])]
    with (
        serving(placed, socket, 900 * KIB),
        tierstore.connect(socket, hbm="256KiB", device=DEVICE, staging="1MiB") as store,
    ):
        lookup = store.open_lookup(NAME, len(tokens))
        keys = torch.from_numpy(tokens).to(DEVICE)
        seen, wrong, ended = [0, 0], [], threading.Event()

        def look_up() -> None:
            while not ended.is_set():
                out = torch.full((len(tokens), HEADS, ROW_BYTES), POISON, dtype=torch.uint8, device=DEVICE)
                lookup.start(keys, out)
                lookup.finish()
                found = out.cpu().numpy().reshape(-1, ENTRY_BYTES)
                which = [bool(np.array_equal(found, right)) for right in rows]
                seen[0] += which[0]
                seen[1] += which[1]
                if not any(which):
                    wrong.append(found)

        thread = threading.Thread(target=look_up)
        thread.start()
        try:
            for version, path in ((2, newer[0]), (3, placed), (4, newer[0]), (5, placed)):
                before = list(seen)
                assert request(socket, "swap", store=str(path))["ok"]
                eventually(lambda version=version: store.stats()["attached"]["version"] == version)
                eventually(lambda before=before, now=(version - 1) % 2: seen[now] > before[now])
        finally:
            ended.set()
            thread.join(timeout=60)
        assert not thread.is_alive()
        lookup.check()
        assert not wrong
        assert min(seen) > 0


def test_a_refill_that_fails_leaves_hbm_empty_and_the_store_attached(
    placed: Path,
    newer: tuple[Path, Model],
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    socket = tmp_path / "s"

    def fail(_hbm: AttachedHbm) -> None:
        raise MemoryError("no room for records")

    with (
        serving(placed, socket, 900 * KIB),
        tierstore.connect(socket, hbm="1MiB", device=DEVICE, staging="1MiB") as store,
    ):
        monkeypatch.setattr(AttachedHbm, "fill", fail)
        for version, path in ((2, newer[0]), (3, placed)):
            assert request(socket, "swap", store=str(path))["ok"]
            eventually(lambda version=version: store.stats()["attached"]["version"] == version)
        eventually(lambda: "hbm stays empty: no room for records" in caplog.text)
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), model.expected(NAME, KEYS))
        assert not (store[NAME].explain(KEYS) == "hbm").any()


def test_hbm_is_for_a_daemon_of_this_host(tmp_path: Path, placed: Path) -> None:
    with pytest.raises(tierstore.ConfigError, match="hbm and device are for a daemon of this host"):
        tierstore.connect("grpc://127.0.0.1:1", hbm="1GiB")
    with serving(placed, tmp_path / "s", 16 * MIB) as daemon:
        for options, error, says in (
            ({"device": DEVICE}, tierstore.ConfigError, "is for the hbm tier"),
            ({"hbm": "1KiB", "device": DEVICE}, tierstore.BudgetError, "hbm: 1024 bytes"),
            ({"hbm": "1MiB", "device": "nowhere"}, tierstore.ConfigError, "no device"),
        ):
            with pytest.raises(error, match=says):
                tierstore.connect(tmp_path / "s", **options)
        eventually(lambda: daemon.stat().clients.attached == 0)  # a refused tier leaves nobody attached
