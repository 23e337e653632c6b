"""A daemon that serves a store in place: clients read the checkpoint's files themselves, checked by its checksums."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from support.served import KIB, MIB, request, serving
from support.stores import Model, make_model, random_keys
from support.waiting import eventually

import tierstore
from tests.attached.test_attached import AttachedContract, served  # noqa: F401

KEYS = random_keys(np.random.default_rng(2), 40)


@pytest.mark.slow
class TestAttachedInPlace(AttachedContract):
    """Checksums and scales in the daemon's memory, blocks by the clients' own reads."""

    fixture = "in_place_placed"
    dram_bytes: ClassVar[int] = 1200 * KIB

    @pytest.fixture
    def built(self, in_place_placed: Path) -> Path:
        return in_place_placed


@pytest.mark.parametrize(
    "dram_bytes", [700 * KIB, 1200 * KIB, 16 * MIB], ids=["scales read", "scales kept", "resident"]
)
def test_clients_of_any_budget_get_the_checkpoints_rows(
    in_place_placed: Path, model: Model, tmp_path: Path, dram_bytes: int
) -> None:
    with serving(in_place_placed, tmp_path / "s", dram_bytes), tierstore.connect(tmp_path / "s") as store:
        for name in ("layers.1", "layers.14"):
            np.testing.assert_array_equal(store[name].lookup(KEYS), model.expected(name, KEYS))
        np.testing.assert_array_equal(store["plain"].rows(np.arange(33)), model.rows["plain"])


def test_the_daemon_keeps_its_budget_with_checksums_of_two_versions(in_place_placed: Path, tmp_path: Path) -> None:
    with serving(in_place_placed, tmp_path / "s", 1200 * KIB) as daemon:
        assert daemon.stat().memory.used_bytes <= 1200 * KIB
        assert daemon.stat().memory.resident_bytes > 100_000
        request(tmp_path / "s", "swap", store=str(in_place_placed))
        assert daemon.stat().memory.used_bytes <= 1200 * KIB


def test_a_client_names_a_block_that_was_overwritten(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    model.build(tmp_path / "store", in_place=True)
    file, tensor = model.folder / "model.safetensors", model.checkpoint.tensors["layers.1.weight"]
    with serving(tmp_path / "store", tmp_path / "s", 700 * KIB), tierstore.connect(tmp_path / "s") as store:
        before = file.stat()
        with file.open("r+b") as stream:
            stream.seek(tensor.byte_start)
            stream.write(bytes(tensor.num_bytes))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(tierstore.CorruptPageError, match=r"block \d+ of table layers\.1 .*its checksum is wrong"):
            store["layers.1"].lookup(KEYS)
        np.testing.assert_array_equal(store["layers.14"].lookup(KEYS), model.expected("layers.14", KEYS))


@pytest.mark.parametrize("in_place_first", [True, False], ids=["to shards", "from shards"])
def test_a_daemon_swaps_between_shards_and_in_place_or_says_why_not(
    in_place_placed: Path, built: Path, model: Model, tmp_path: Path, in_place_first: bool
) -> None:
    first, second = (in_place_placed, built) if in_place_first else (built, in_place_placed)
    with serving(first, tmp_path / "s", 1200 * KIB), tierstore.connect(tmp_path / "s") as store:
        if in_place_first:
            request(tmp_path / "s", "swap", store=str(second))
            eventually(lambda: store.stats()["attached"]["version"] == 2)
        else:
            with pytest.raises(
                tierstore.TierStoreError, match=r"its checksums take .* serve it by a daemon of its own"
            ):
                request(tmp_path / "s", "swap", store=str(second))
        np.testing.assert_array_equal(store["layers.1"].lookup(KEYS), model.expected("layers.1", KEYS))
