"""Repair: exactly what is damaged becomes what was built, bit for bit; anything else is refused and changes nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.served import KIB, serving
from support.stores import Model, make_model, place_some, random_keys

import tierstore
from tierstore.formats.catalog import read_catalog
from tierstore.offline.store_lock import locked_store

NAME = "layers.1"


def everything(store: Path) -> dict[str, str]:
    """Digests of all files of a store but the catalog's lock."""
    files = (file for file in store.rglob("*") if file.is_file() and not file.name.endswith("-lock"))
    return {str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    return {
        str(file.relative_to(store)): (file.stat().st_ino, file.stat().st_mtime_ns) for file in store.rglob("*.shard")
    }


def shard_file(store: Path, index: int = 1, name: str = NAME) -> Path:
    return store / read_catalog(store).shards[name][index].file


def placement_file(store: Path) -> Path:
    image = read_catalog(store)
    assert image.epoch is not None
    return store / image.placements[image.epoch].file


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x40
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda file: flip(file, 5000),
    "missing": Path.unlink,
    "cut": cut,
    "too long": lambda file: os.truncate(file, file.stat().st_size + 4096),
    "a pipe": replace_by_pipe,
    "the folder is missing": lambda file: shutil.rmtree(file.parent),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_becomes_what_was_built_and_no_other_is_touched(
    own_store: Path, model: Model, damage: str
) -> None:
    before, old_stamps = everything(own_store), stamps(own_store)
    DAMAGE[damage](shard_file(own_store))
    assert tierstore.verify(own_store).faults
    report = tierstore.verify(own_store, model, repair=True)
    assert report.faults == []
    assert everything(own_store) == before
    files = set(before) if damage == "the folder is missing" else {str(shard_file(own_store).relative_to(own_store))}
    touched = {file for file, stamp in stamps(own_store).items() if old_stamps[file] != stamp}
    assert touched == {
        file for file in files if file.startswith(str(shard_file(own_store).parent.relative_to(own_store)))
    }
    assert len(report.repaired) == len(touched)
    assert report.rows_compared > 0
    assert tierstore.verify(own_store, model).faults == []


def test_several_damaged_shards_of_several_tables_are_repaired_at_once(own_store: Path, model: Model) -> None:
    before = everything(own_store)
    shard_file(own_store, 0).unlink()
    flip(shard_file(own_store, 2), 100)
    cut(shard_file(own_store, 0, "layers.14"))
    flip(shard_file(own_store, 0, "plain"), 4000)
    seen: list[tuple[int, int]] = []
    report = tierstore.verify(own_store, model, repair=True, on_progress=lambda *step: seen.append(step))
    assert report.faults == []
    assert sorted(report.repaired) == sorted(set(report.repaired))
    assert len(report.repaired) == 4
    assert everything(own_store) == before
    assert seen[-1] == (4, 4)


def test_a_sound_store_is_left_alone(own_store: Path, model: Model) -> None:
    old_stamps = stamps(own_store)
    report = tierstore.verify(own_store, model, repair=True)
    assert (report.faults, report.repaired, report.remedy) == ([], [], "")
    assert stamps(own_store) == old_stamps


def test_the_rows_of_another_checkpoint_are_refused_and_nothing_changes(own_store: Path, tmp_path: Path) -> None:
    flip(shard_file(own_store), 5000)
    before = everything(own_store)
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(tierstore.ConfigError, match=r"shard 1 of table layers\.1.*another checkpoint"):
        tierstore.verify(own_store, other, repair=True)
    assert everything(own_store) == before
    with pytest.raises(tierstore.ConfigError, match=r"table layers\.1: .*other2 gives .*another checkpoint"):
        tierstore.verify(own_store, make_model(tmp_path / "other2", layers=(14, 1)), repair=True)
    assert everything(own_store) == before


def test_a_checkpoint_whose_config_alone_changed_still_repairs(own_store: Path, tmp_path: Path) -> None:
    """The catalog's SHA-256 of the shard decides, and not the digest of the whole checkpoint:
    these rows are the same."""
    before = everything(own_store)
    flip(shard_file(own_store), 5000)
    again = make_model(tmp_path / "again")
    (again.folder / "config.json").write_text('{"transformers_version": "6.0.0"}')
    assert tierstore.verify(own_store, again, repair=True).faults == []
    assert everything(own_store) == before


def test_without_a_source_shards_stay_and_the_command_that_repairs_them_is_named(own_store: Path) -> None:
    flip(shard_file(own_store), 5000)
    report = tierstore.verify(own_store, repair=True)
    assert any("page 1" in fault or "SHA-256" in fault for fault in report.faults)
    assert report.remedy == f"tierstore verify {own_store} --repair --source CHECKPOINT"
    assert list(report.damaged_shards) == [(NAME, 1)]


def test_a_shard_that_may_not_be_read_is_no_damage(
    own_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file would not mend permissions, nor a process's limit of open files."""
    real_open = os.open
    for code in (errno.EACCES, errno.EMFILE):

        def refuse(path: object, *arguments: int, code: int = code, **options: int) -> int:
            if str(path).endswith("00001.shard"):
                raise OSError(code, os.strerror(code), str(path))
            return real_open(path, *arguments, **options)  # type: ignore[call-overload]

        old_stamps = stamps(own_store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            report = tierstore.verify(own_store, model, repair=True)
        assert all(os.strerror(code) in fault for fault in report.faults)
        assert report.faults
        assert (report.damaged_shards, report.repaired, report.remedy) == ({}, [], "")
        assert stamps(own_store) == old_stamps


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "missing"])
def test_a_damaged_catalog_is_refused_by_name_and_with_what_to_do(own_store: Path, model: Model, damage: str) -> None:
    file = own_store / "catalog.mdb"
    if damage == "a flipped bit":
        for at in range(len(file.read_bytes()) - 1, 0, -97):
            flip(file, at)
    else:
        cut(file) if damage == "cut" else file.unlink()
    with pytest.raises(tierstore.FormatError, match=r"repair needs the catalog.*catalog\.mdb.*(restore|copy|path)"):
        tierstore.verify(own_store, model, repair=True)


def test_a_sample_and_a_repair_exclude_each_other(own_store: Path, model: Model) -> None:
    with pytest.raises(ValueError, match="repair without it"):
        tierstore.verify(own_store, model, repair=True, sample_rows=5)


def test_a_repair_waits_for_no_build_or_plan_but_says_that_one_runs(own_store: Path, model: Model) -> None:
    with locked_store(own_store), pytest.raises(tierstore.ConfigError, match="another build or plan"):
        tierstore.verify(own_store, model, repair=True)


def test_a_folder_in_the_place_of_a_shard_is_named_and_not_removed(own_store: Path, model: Model) -> None:
    file = shard_file(own_store)
    file.unlink()
    file.mkdir()
    (file / "mine").touch()
    with pytest.raises(tierstore.ConfigError, match=f"{re.escape(str(file))}: .*move it away"):
        tierstore.verify(own_store, model, repair=True)
    assert (file / "mine").exists()
    assert not list(own_store.rglob("*.new"))


def test_a_full_disk_is_named_before_anything_is_written(
    own_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(shard_file(own_store), 5000)
    before = everything(own_store)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(tierstore.BudgetError, match=r"needs .*\(\d+ bytes\).*\(100 bytes\)"):
        tierstore.verify(own_store, model, repair=True)
    assert everything(own_store) == before


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_a_repair_that_fails_anywhere_leaves_each_file_old_or_whole(
    own_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Fails operation 1, 2, 3, ... until none is hit; the same command then mends the rest."""
    good = everything(own_store)
    for countdown in range(50):
        for index in (0, 1):
            flip(shard_file(own_store, index), 5000)
        damaged = everything(own_store)
        left = [countdown]
        owner: object = Path if operation == "rename" else os
        real = getattr(owner, operation)

        def fail(*arguments: object, left: list[int] = left, real: Callable = real) -> object:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, operation, fail)
            try:
                tierstore.verify(own_store, model, repair=True, jobs=1)
            except tierstore.BudgetError:
                assert left[0] < 0
        now = everything(own_store)
        assert now.keys() == good.keys()
        assert all(now[file] in (good[file], damaged[file]) for file in now)
        assert tierstore.verify(own_store, model, repair=True).faults == []
        assert everything(own_store) == good
        if left[0] >= 0:
            assert countdown > 1
            return
    raise AssertionError("it never came to an end")


def test_an_open_store_answers_right_rows_or_named_errors_while_it_is_repaired(own_store: Path, model: Model) -> None:
    layout = read_catalog(own_store).tables[NAME]
    flip(shard_file(own_store), 5000)
    bad_page = layout.shard_pages(1)[0] + 1
    row_ids = np.arange(layout.spec.num_rows)
    bad = row_ids // layout.rows_per_page == bad_page
    answers = {"right": 0, "named": 0}
    ended = threading.Event()

    def look() -> None:
        with tierstore.open(own_store, dram="600KiB") as store:
            while not ended.is_set() or not answers["named"]:
                np.testing.assert_array_equal(store[NAME].rows(row_ids[~bad]), model.rows[NAME][~bad])
                answers["right"] += 1
                with pytest.raises(tierstore.CorruptPageError, match=f"page {bad_page} of table .*--repair"):
                    store[NAME].rows(row_ids[bad])
                answers["named"] += 1

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(5):
            assert tierstore.verify(own_store, model, repair=True).faults == []
    finally:
        ended.set()
        looker.join(60)
    assert min(answers.values()) > 0
    with tierstore.open(own_store, dram="600KiB") as store:
        np.testing.assert_array_equal(store[NAME].rows(row_ids), model.rows[NAME])


def test_a_daemon_and_its_clients_go_on_while_their_store_is_repaired(
    own_store: Path, model: Model, tmp_path: Path
) -> None:
    """They read the old file, damage and all, until the store is served anew; none of them sees half a shard."""
    layout = read_catalog(own_store).tables[NAME]
    flip(shard_file(own_store), 5000)
    row_ids = np.arange(layout.spec.num_rows)
    bad = row_ids // layout.rows_per_page == layout.shard_pages(1)[0] + 1
    for repaired in (False, True):
        with serving(own_store, tmp_path / "s", 900 * KIB), tierstore.connect(tmp_path / "s") as store:
            for _ in range(2):
                np.testing.assert_array_equal(store[NAME].rows(row_ids[~bad]), model.rows[NAME][~bad])
                if repaired:
                    np.testing.assert_array_equal(store[NAME].rows(row_ids[bad]), model.rows[NAME][bad])
                else:
                    with pytest.raises(tierstore.CorruptPageError, match="--repair"):
                        store[NAME].rows(row_ids[bad])
                assert tierstore.verify(own_store, model, repair=True).faults == []


def heads_of(store: Path) -> dict:
    data = placement_file(store).read_bytes()
    return json.loads(data[16 : 16 + int.from_bytes(data[12:16], "little")])


def damage_index(store: Path) -> None:
    flip(placement_file(store), heads_of(store)["tables"][NAME]["indexes"][1]["byte_start"] + 70)


def damage_records(store: Path) -> None:
    table = heads_of(store)["tables"][NAME]
    for place in (0, 7, table["num_entries"] - 1):
        flip(placement_file(store), table["byte_start"] + place * table["record_bytes"] + 3)


def damage_other_tables_index(store: Path) -> None:
    damage_records(store)
    flip(placement_file(store), heads_of(store)["tables"]["layers.14"]["indexes"][0]["byte_start"] + 70)


def cut_records(store: Path) -> None:
    os.truncate(placement_file(store), heads_of(store)["tables"]["layers.14"]["byte_start"] + 5000)


MENDABLE = [damage_index, damage_records, damage_other_tables_index, cut_records]


@pytest.mark.parametrize("damage", MENDABLE, ids=lambda damage: damage.__name__)
def test_a_placement_is_remade_from_what_is_left_of_it(
    own_store: Path, model: Model, damage: Callable[[Path], None]
) -> None:
    place_some(own_store)
    before = everything(own_store)
    damage(own_store)
    found = tierstore.verify(own_store)
    assert list(found.damaged_placements) == [1]
    assert found.remedy == f"tierstore verify {own_store} --repair"
    report = tierstore.verify(own_store, repair=True)
    assert report.faults == []
    assert report.repaired == ["placement 1 (placements/00000001.placement)"]
    assert everything(own_store) == before
    keys = np.concatenate([random_keys(np.random.default_rng(seed), 100) for seed in range(7)])
    with tierstore.open(own_store, dram="400KiB") as store:
        np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))


def damage_head(store: Path) -> None:
    flip(placement_file(store), 30)


def damage_index_and_record(store: Path) -> None:
    head = heads_of(store)["tables"][NAME]
    for index in head["indexes"]:
        flip(placement_file(store), index["byte_start"] + 70)
    flip(placement_file(store), head["byte_start"] + 3)


@pytest.mark.parametrize(
    "damage",
    [damage_head, damage_index_and_record, lambda store: placement_file(store).unlink()],
    ids=["head", "index and record", "missing"],
)
def test_a_placement_whose_choice_is_lost_names_the_commands_that_make_another(
    own_store: Path, damage: Callable[[Path], None]
) -> None:
    place_some(own_store)
    damage(own_store)
    before = everything(own_store)
    report = tierstore.verify(own_store, repair=True)
    assert any(
        re.search(
            rf"placement 1: it cannot be remade: .*tierstore plan {own_store} PROFILE --dram SIZE.*epochs .*--prune",
            fault,
        )
        for fault in report.faults
    ), report.faults
    assert list(report.damaged_placements) == [1]
    assert report.repaired == []
    assert everything(own_store) == before


def test_a_placement_is_remade_after_the_shards_that_it_is_made_of(own_store: Path, model: Model) -> None:
    place_some(own_store)
    before = everything(own_store)
    damage_records(own_store)
    for index in range(read_catalog(own_store).tables[NAME].num_shards):
        flip(shard_file(own_store, index), 5000)
    report = tierstore.verify(own_store, repair=True)
    assert any("cannot be remade before the shards are whole" in fault for fault in report.faults)
    assert tierstore.verify(own_store, model, repair=True).faults == []
    assert everything(own_store) == before
