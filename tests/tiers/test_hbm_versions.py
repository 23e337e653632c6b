"""HBM holds entries of the version that the store is opened at, also after its placement changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.device import DEVICE
from support.served import MIB, serving
from support.stores import make_model, place_some, random_keys
from support.versions import VersionedModel, make_versions
from support.waiting import eventually

import tierstore

NAME = "layers.1"
KEYS = random_keys(np.random.default_rng(0), 24, distinct=20)


@pytest.fixture
def versions(tmp_path: Path) -> VersionedModel:
    model = make_model(tmp_path / "model", plain=False)
    model.build(tmp_path / "store")
    place_some(tmp_path / "store")
    return make_versions(model, tmp_path / "store", 2)


def touched_keys(versions: VersionedModel, version: int) -> np.ndarray:
    touched = versions.touched(NAME, version)[versions.model.row_ids(NAME, KEYS)]
    return touched.reshape(*KEYS.shape, -1).any(axis=-1)


def test_entries_in_hbm_are_of_the_stores_version(versions: VersionedModel) -> None:
    for version in (2, 0):
        with tierstore.open(versions.store, "1MiB", hbm="4MiB", device=DEVICE, version=version) as store:
            in_hbm = store[NAME].explain(KEYS) == "hbm"
            assert version == 0 or (in_hbm & touched_keys(versions, version)).any()
            wanted = versions.at(version).expected(NAME, KEYS)
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), wanted)
            assert store.stats()["hits"]["hbm"] > 0
            place_some(versions.store, part=0.8)
            store.change_hbm()
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), wanted)


def test_a_clients_hbm_follows_to_the_newest_version(versions: VersionedModel, tmp_path: Path) -> None:
    socket = tmp_path / "s"
    with (
        serving(versions.store, socket, 2 * MIB, follow=True) as daemon,
        tierstore.connect(socket, hbm="4MiB", device=DEVICE) as store,
    ):
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), versions.at(2).expected(NAME, KEYS))
        number = versions.publish(part=0.05)
        eventually(lambda: daemon.stat().store.published == number)
        eventually(lambda: store.stats()["attached"]["version"] == 2)
        wanted = versions.at(3).expected(NAME, KEYS)
        eventually(lambda: ((store[NAME].explain(KEYS) == "hbm") & touched_keys(versions, 3)).any())
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), wanted)
