"""Placements: right rows whatever is placed, damage noticed and named,
the old epoch kept until the new one is whole."""

from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.marks import slow_but
from support.repository import TESTS
from support.shapes import HEADS, POISON, ROW_BYTES
from support.stores import Model, open_behind_hbm, place_some, random_keys

import tierstore
from tierstore.formats import catalog
from tierstore.formats import placement as placement_format
from tierstore.formats.catalog import read_catalog, set_epoch
from tierstore.formats.catalog_records import write_records
from tierstore.offline import place, placement_file
from tierstore.offline.place import place_entries, prune_placements
from tierstore.offline.placement_file import Chosen
from tierstore.offline.verify import verify_store

NAME = "layers.1"


def file_of_placement(store: Path, epoch: int | None = None) -> Path:
    image = read_catalog(store)
    number = epoch or image.epoch
    assert number is not None
    return store / image.placements[number].file


def some_chosen(seed: int = 0, count: int = 300) -> Chosen:
    rng = np.random.default_rng(seed)
    keys = np.unique(rng.integers(0, 2**63 - 1, count, dtype=np.int64))
    keys = rng.permutation(keys)
    return Chosen((np.arange(len(keys)) % 3).astype(np.uint8), keys)


def place_at(static_fraction: float, store: Path, chosen: dict[str, Chosen]) -> place.PlaceReport:
    return place_entries(store, {name: replace(part, static_fraction=static_fraction) for name, part in chosen.items()})


def tokens_of(chosen: Chosen) -> np.ndarray:
    keys = np.full((len(chosen.keys), 3), -1, dtype=np.int64)
    keys[np.arange(len(keys)), chosen.order_index] = chosen.keys
    return keys


def assert_serves(store: Path, model: Model, keys: np.ndarray, **options: object) -> dict:
    arguments: dict = {"dram": "400KiB"} | options
    with tierstore.open(store, **arguments) as opened:
        for _ in range(2):
            np.testing.assert_array_equal(opened[NAME].lookup(keys), model.expected(NAME, keys))
        return opened.stats()


def test_placed_entries_cost_one_read_or_none(own_store: Path, model: Model) -> None:
    chosen = some_chosen()
    place_at(0.25, own_store, {NAME: chosen})
    keys = tokens_of(chosen)
    with tierstore.open(own_store, dram="400KiB") as store:
        loaded = store.stats()["placement"]["static_entries"][NAME]
        assert 0 < loaded < len(keys)
        explained = store[NAME].explain(keys)[np.arange(len(keys)), chosen.order_index]
        assert (explained[:loaded] == "static").all()
        assert (explained[loaded:] == "record").all()
        np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
        stats = store.stats()
        assert stats["pages_read"] == 0
        assert stats["entries_read"] == stats["hits"]["nvme"] == len(keys) - loaded
        assert sum(stats["tables"][NAME]["static_hits"].values()) == stats["hits"]["dram"] == loaded
        other = random_keys(np.random.default_rng(1), 5)
        assert set(store[NAME].explain(other)[other >= 0]) == {"pages"}
        store[NAME].lookup(other)
        assert set(store[NAME].explain(other)[other >= 0]) == {"recency"}
        assert store["plain"].explain(np.array([[3], [-1]])).tolist() == [["resident"], ["none"]]


@pytest.mark.parametrize("io", ["uring", "mmap", "pread"])
@pytest.mark.parametrize(
    ("hbm_entries", "start"),
    slow_but(
        [(512, 512), (1300, 1024)],
        [(0, 0), (511, 0), (512, 512), (1000, 512), (1300, 1024), (9999, 1024)],
        several=True,
    ),
)
def test_a_static_set_behind_hbm_holds_the_records_from_its_start_on(
    own_store: Path, model: Model, io: str, hbm_entries: int, start: int
) -> None:
    chosen = some_chosen(0, 1300)
    place_at(0.5, own_store, {NAME: chosen})
    keys, each = tokens_of(chosen), np.arange(1300)
    with open_behind_hbm(own_store, hbm_entries, "400KiB", io) as store:
        loaded = store.stats()["placement"]["static_entries"][NAME]
        assert 0 < loaded <= 1300 - start
        static = (each >= start) & (each < start + loaded)
        explained = store[NAME].explain(keys)[each, chosen.order_index]
        np.testing.assert_array_equal(explained, np.where(static, "static", "record"))
        out = np.full((1300, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        np.testing.assert_array_equal(store[NAME].lookup(keys, out), model.expected(NAME, keys))
        stats = store.stats()
        assert stats["pages_read"] == 0
        assert stats["entries_read"] == stats["hits"]["nvme"] == 1300 - loaded
        assert sum(stats["tables"][NAME]["static_hits"].values()) == loaded


def test_damage_below_the_start_of_a_static_set_is_found_when_it_is_read(own_store: Path, model: Model) -> None:
    chosen = some_chosen(0, 900)
    table = place_at(0.5, own_store, {NAME: chosen}).placement.tables[NAME]
    with file_of_placement(own_store).open("r+b") as file:
        for at in (511, 513):
            file.seek(table.byte_start + at * table.record_bytes)
            file.write(b"damaged")
    keys = tokens_of(chosen)
    with open_behind_hbm(own_store, 512) as store:
        explained = store[NAME].explain(keys)[np.arange(900), chosen.order_index]
        assert explained[[511, 512, 513]].tolist() == ["record", "static", "pages"]
        np.testing.assert_array_equal(store[NAME].lookup(keys[512:514]), model.expected(NAME, keys[512:514]))
        with pytest.raises(tierstore.CorruptPageError, match=r"placed entry 511 of table"):
            store[NAME].lookup(keys[511:512])


@pytest.mark.parametrize("io", ["uring", "mmap", "pread"])
@pytest.mark.parametrize("fraction", slow_but([0.3], [0.0, 0.3, 1.0]))
def test_rows_are_the_same_with_any_placement_any_epoch_and_none(
    own_store: Path, model: Model, io: str, fraction: float
) -> None:
    place_some(own_store, fraction)
    place_at(1 - fraction, own_store, {NAME: some_chosen(5)})
    keys = np.concatenate([random_keys(np.random.default_rng(seed), 100) for seed in range(7)])
    for choice in (None, "none", 1, 2):
        stats = assert_serves(own_store, model, keys, placement=choice, io=io)
        assert stats["placement"]["epoch"] == {None: 2, "none": None}.get(choice, choice)


def test_the_budget_holds_with_static_set_and_indexes(own_store: Path) -> None:
    place_some(own_store, 0.9)
    for dram in (150_000, 200_000, 300_000, 400_000):
        with tierstore.open(own_store, dram=dram) as store:
            stats = store.stats()
            assert stats["memory"]["dram_bytes"] <= dram
            assert stats["placement"]["index_bytes"] > 0


def test_a_budget_below_the_index_is_refused_with_the_remedy(own_store: Path, model: Model) -> None:
    place_at(0.5, own_store, {NAME: some_chosen(1, 4000)})
    with pytest.raises(tierstore.BudgetError, match=r"placement's index.*placement='none'"):
        tierstore.open(own_store, dram="80KiB")
    assert_serves(own_store, model, random_keys(np.random.default_rng(0), 10), dram="80KiB", placement="none")


def test_many_buckets_make_the_same_file_as_one(own_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {NAME: some_chosen(2, 500), "layers.14": some_chosen(3, 77)}
    place_at(0.5, own_store, chosen)
    monkeypatch.setattr(placement_file, "BUCKET_BYTES", 7000)
    monkeypatch.setattr(placement_file, "READ_BYTES", 3 * 4096)
    monkeypatch.setattr(placement_file, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(placement_file, "DENSE_FRACTION", 0.9)
    place_at(0.5, own_store, chosen)
    one, other = (file_of_placement(own_store, epoch).read_bytes() for epoch in (1, 2))
    head = placement_format.HEAD_BYTES_MAX
    assert one[head:] == other[head:]
    assert_serves(own_store, model, tokens_of(chosen[NAME]))


def test_every_needed_page_is_read_once(own_store: Path) -> None:
    chosen = some_chosen(4, 100)
    report = place_at(0.5, own_store, {NAME: chosen})
    layout = read_catalog(own_store).tables[NAME]
    assert report.pages_read <= layout.num_pages + layout.spec.num_heads  # heads meet within a page


def test_a_damaged_record_costs_its_own_entry_speed_and_no_more(
    own_store: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = some_chosen(6)
    placed = place_at(0.5, own_store, {NAME: chosen}).placement.tables[NAME]
    damage(file_of_placement(own_store), placed.byte_start + 3 * placed.record_bytes + 11)
    keys = tokens_of(chosen)
    with tierstore.open(own_store, dram="400KiB") as store:
        assert "1 placed entries of table layers.1 are damaged" in caplog.text
        assert store[NAME].explain(keys)[3, chosen.order_index[3]] == "pages"
        np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))


def test_a_damaged_record_beyond_dram_is_an_error_that_names_it(own_store: Path, model: Model) -> None:
    chosen = some_chosen(7)
    placed = place_at(0.0, own_store, {NAME: chosen}).placement.tables[NAME]
    damage(file_of_placement(own_store), placed.byte_start + 3 * placed.record_bytes + 11)
    keys = tokens_of(chosen)
    with tierstore.open(own_store, dram="400KiB") as store:
        with pytest.raises(tierstore.CorruptPageError, match=r"placed entry 3 of table layers\.1.*plan again"):
            store[NAME].lookup(keys)
        np.testing.assert_array_equal(store[NAME].lookup(keys[4:]), model.expected(NAME, keys[4:]))


def test_a_record_in_anothers_place_is_never_handed_out(own_store: Path, model: Model) -> None:
    chosen = some_chosen(8)
    placed = place_at(0.5, own_store, {NAME: chosen}).placement.tables[NAME]
    file = file_of_placement(own_store)
    content = bytearray(file.read_bytes())
    first, size = placed.byte_start, placed.record_bytes
    content[first : first + size], content[first + size : first + 2 * size] = (
        content[first + size : first + 2 * size],
        content[first : first + size],
    )
    file.write_bytes(content)
    assert_serves(own_store, model, tokens_of(chosen))


def test_every_flipped_byte_of_head_and_index_is_named_or_harmless(own_store: Path, model: Model) -> None:
    chosen = some_chosen(9, 12)
    placed = place_at(0.5, own_store, {NAME: chosen}).placement.tables[NAME]
    file, keys = file_of_placement(own_store), tokens_of(chosen)
    whole = file.read_bytes()
    head_end = len(placement_format.head_bytes(_placement_of(own_store)))
    places = [*range(0, head_end, 37), *range(placed.indexes[0].byte_start, placed.indexes[0].byte_start + 64)]
    for at in places:
        damage(file, at)
        with pytest.raises(tierstore.FormatError, match="plan again"):
            tierstore.open(own_store, dram="400KiB")
        file.write_bytes(whole)
    assert_serves(own_store, model, keys)


@pytest.mark.parametrize("left", [0, 1, 4095, 4096, 70_000])
def test_a_file_cut_short_is_named_and_the_store_opens_without_it(own_store: Path, model: Model, left: int) -> None:
    place_at(0.5, own_store, {NAME: some_chosen(10)})
    file = file_of_placement(own_store)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(tierstore.FormatError, match=f"{left} bytes on disk"):
        tierstore.open(own_store, dram="400KiB")
    assert_serves(own_store, model, random_keys(np.random.default_rng(0), 20), placement="none")


def test_a_missing_file_and_a_missing_epoch_are_named(own_store: Path) -> None:
    with pytest.raises(tierstore.ConfigError, match="epoch 1 does not exist"):
        tierstore.open(own_store, placement=1)
    with pytest.raises(tierstore.ConfigError, match="is no epoch"):
        tierstore.open(own_store, placement="some")
    place_at(0.5, own_store, {NAME: some_chosen(11)})
    file_of_placement(own_store).unlink()
    with pytest.raises(tierstore.FormatError, match=r"placement 1.*No such file"):
        tierstore.open(own_store)


def test_a_placement_of_another_store_is_refused(own_store: Path, tmp_path: Path) -> None:
    from support.stores import make_model

    other = make_model(tmp_path / "other", seed=5)
    other.build(tmp_path / "other_store")
    for store in (own_store, tmp_path / "other_store"):
        place_at(1.0, store, {NAME: some_chosen(12)})
    file = file_of_placement(own_store)
    file.write_bytes(file_of_placement(tmp_path / "other_store").read_bytes())
    chosen = some_chosen(12)
    with tierstore.open(own_store, dram="400KiB") as store:  # same numbers, another checkpoint: every record is foreign
        assert set(store[NAME].explain(tokens_of(chosen)).reshape(-1)) <= {"pages", "record", "none"}


def test_pruning_keeps_the_current_epoch_and_open_stores(own_store: Path, model: Model) -> None:
    chosen = some_chosen(13)
    for _ in range(4):
        place_at(0.1, own_store, {NAME: chosen})
    set_epoch(own_store, 2)
    keys = tokens_of(chosen)
    with tierstore.open(own_store, dram="400KiB", placement=1) as store:
        assert [record.epoch for record in prune_placements(own_store, keep=1)] == [1, 3]
        np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
    assert sorted(read_catalog(own_store).placements) == [2, 4]
    assert len(list((own_store / placement_format.PLACEMENT_FOLDER).iterdir())) == 2
    assert assert_serves(own_store, model, keys)["placement"]["epoch"] == 2
    with pytest.raises(tierstore.ConfigError, match=r"epoch 1 does not exist.*2, 4"):
        tierstore.open(own_store, placement=1)
    assert place_at(0.1, own_store, {NAME: chosen}).placement.epoch == 5


def test_a_number_is_never_given_to_two_placements(own_store: Path) -> None:
    """Pruning the newest gave its number to the next one: a store pinned to it would have opened another placement."""
    for epoch in (1, 2, 3):
        assert place_at(0.1, own_store, {NAME: some_chosen(epoch)}).placement.epoch == epoch
    set_epoch(own_store, 1)
    assert [record.epoch for record in prune_placements(own_store, keep=0)] == [2, 3]
    assert place_at(0.1, own_store, {NAME: some_chosen(4)}).placement.epoch == 4
    set_epoch(own_store, None)
    assert [record.epoch for record in prune_placements(own_store, keep=0)] == [1, 4]
    assert place_at(0.1, own_store, {NAME: some_chosen(5)}).placement.epoch == 5


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"epoch": 1, "last": 0}, "last epoch is 0"),
        ({"epoch": 1, "last": None}, "last epoch is None"),
        ({"epoch": 1, "last": "1"}, "last epoch is '1'"),
        ({"epoch": 2, "last": 2}, "current epoch 2 is not one of its placements"),
        ({"epoch": [], "last": 1}, r"current epoch \[\] is not one of its placements"),
    ],
    ids=str,
)
def test_an_epoch_that_the_catalog_cannot_have_is_named(own_store: Path, record: dict, message: str) -> None:
    place_at(0.1, own_store, {NAME: some_chosen(1)})
    write_records(own_store / catalog.CATALOG_FILE, {"epoch": json.dumps(record).encode()})
    with pytest.raises(tierstore.FormatError, match=message):
        tierstore.open(own_store, dram="400KiB")


def test_what_cannot_be_placed_is_refused(own_store: Path) -> None:
    with pytest.raises(tierstore.ConfigError, match=r"no table layers\.2"):
        place_at(0.5, own_store, {"layers.2": some_chosen()})
    with pytest.raises(ValueError, match="keys below 0"):
        place_at(0.5, own_store, {NAME: Chosen(np.zeros(1, np.uint8), np.array([-1]))})
    with pytest.raises(ValueError, match="orders that it has not"):
        place_at(0.5, own_store, {NAME: Chosen(np.full(1, 3, np.uint8), np.array([1]))})
    with pytest.raises(tierstore.StoreNotReadyError):
        place_at(0.5, own_store / "nowhere", {})
    assert not (own_store / "nowhere").exists()


def test_a_placement_of_nothing_is_one(own_store: Path, model: Model) -> None:
    place_at(0.5, own_store, {NAME: Chosen(np.zeros(0, np.uint8), np.zeros(0, np.int64))})
    assert_serves(own_store, model, random_keys(np.random.default_rng(0), 20))


def test_too_little_disk_is_refused_before_anything_is_written(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(tierstore.BudgetError, match="1000 bytes"):
        place_at(0.5, own_store, {NAME: some_chosen()})
    assert not list((own_store / placement_format.PLACEMENT_FOLDER).iterdir())


def test_a_disk_that_fills_at_any_write_keeps_the_old_epoch(
    own_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_at(0.5, own_store, {NAME: some_chosen(1)})
    real, writes = placement_file.write_all, 0

    for failing in range(100):
        writes = 0

        def pwrite(*arguments: object, failing: int = failing) -> None:
            nonlocal writes
            writes += 1
            if writes > failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(placement_file, "write_all", pwrite)
        try:
            place_at(0.5, own_store, {NAME: some_chosen(2)})
            break
        except tierstore.BudgetError as error:
            refused = str(error)
        assert "keeps epoch 1" in refused
        assert read_catalog(own_store).epoch == 1
        assert [f.name for f in (own_store / placement_format.PLACEMENT_FOLDER).iterdir()] == ["00000001.placement"]
    assert failing >= 3
    assert_serves(own_store, model, tokens_of(some_chosen(1)))


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from offline.test_place import NAME, place_at, some_chosen
from tierstore.offline import placement_file
from tierstore.formats import catalog
placement_file.BUCKET_BYTES = 7000
print("ready", flush=True)
sys.stdin.readline()
place_at(0.5, Path(sys.argv[1]), {NAME: some_chosen(2, 3000)})
"""


def test_making_a_placement_killed_ten_times_keeps_an_epoch_that_serves(own_store: Path, model: Model) -> None:
    place_at(0.5, own_store, {NAME: some_chosen(1)})
    rng = random.Random(0)
    kills = 0
    for _ in range(60):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(own_store), str(TESTS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        try:
            child.wait(timeout=rng.uniform(0.0, 0.25) if kills < 10 else 60)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.communicate(timeout=60)
        assert child.returncode in (0, -signal.SIGKILL)
        assert_serves(own_store, model, tokens_of(some_chosen(2, 60)))
        if kills == 10 and child.returncode == 0:
            break
    assert kills == 10
    assert read_catalog(own_store).epoch != 1
    left = {entry.name for entry in (own_store / placement_format.PLACEMENT_FOLDER).iterdir()}
    assert left == {Path(record.file).name for record in read_catalog(own_store).placements.values()}


def test_verify_checks_every_placed_entry_and_index(own_store: Path) -> None:
    chosen = some_chosen(14)
    report = place_at(0.5, own_store, {NAME: chosen})
    verified = verify_store(own_store)
    assert verified.faults == []
    assert verified.entries_checked == len(chosen.keys)
    table, file = report.placement.tables[NAME], file_of_placement(own_store)
    for at, what in (
        (table.byte_start + 7 * table.record_bytes, "1 of 300 entries"),
        (table.indexes[1].byte_start + 9, "index of its order 1"),
        (12, "head has a wrong checksum"),
    ):
        damage(file, at)
        assert [what in fault for fault in verify_store(own_store).faults] == [True]
        damage(file, at)


def damage(file: Path, at: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 0x10]))


def _placement_of(store: Path) -> placement_format.Placement:
    image = read_catalog(store)
    assert image.epoch is not None
    file = file_of_placement(store)
    with file.open("rb") as stream:
        return placement_format.read_head(file, stream.fileno(), image.placements[image.epoch], image.tables)
