"""Builds in place: what they write, what resumes, what is refused, and what happens to files that others change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from support.stores import Model, make_model, random_keys

import tierstore
from engram_adapter import build_checkpoint, open_checkpoint
from tierstore.formats import catalog, in_place
from tierstore.formats.catalog import read_catalog
from tierstore.formats.checkpoint import Checkpoint, Plane, PlaneReader, TableSource
from tierstore.formats.in_place import InPlaceLayout
from tierstore.offline.build import build_from_store, build_store
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen
from tierstore.offline.verify import verify_store
from tierstore.spec import TableSpec
from tierstore.tiers.in_place import InPlaceFiles
from tierstore.tiers.nvme import load_rows
from tierstore.tools.cli import cli
from tierstore.tools.synth import write_checkpoint

KEYS = random_keys(np.random.default_rng(1), 60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A checkpoint and a store in place of it, which tests copy."""
    folder = tmp_path_factory.mktemp("in_place")
    model = make_model(folder / "model")
    model.build(folder / "store", in_place=True, shard_bytes=65536)
    return model, folder / "store"


@pytest.fixture
def own(tmp_path: Path) -> tuple[Model, Path]:
    """A checkpoint and a store in place that a test may damage."""
    model = make_model(tmp_path / "model", layers=(1,))
    model.build(tmp_path / "store", in_place=True)
    return model, tmp_path / "store"


def checkpoint_file(model: Model) -> Path:
    return model.folder / "model.safetensors"


def write_at(file: Path, byte_start: int, data: bytes) -> None:
    """Overwrites bytes, and gives the file its old time: as a fault of the disk would."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(byte_start)
        stream.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(file: Path, byte: int) -> None:
    data = file.read_bytes()
    write_at(file, byte, bytes([data[byte] ^ 1]))


def values_of(model: Model) -> int:
    """The byte at which the values of the first table begin."""
    return model.checkpoint.tensors["layers.1.weight"].byte_start


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_store_in_place_holds_checksums_and_scales_and_no_rows(made: tuple[Model, Path]) -> None:
    model, store = made
    image = read_catalog(store)
    assert image.format_version == 2
    assert set(image.paged) == {
        f"{name}/{kind}" for name in ("layers.1", "layers.14") for kind in ("checksums", "plane-1")
    } | {"plain/checksums"}
    spec = image.tables["layers.1"].spec
    blocks = image.paged["layers.1/checksums"].spec.num_rows
    assert 0 <= blocks - spec.num_rows * 32 / 4096 < 3
    assert image.paged["layers.1/plane-1"].spec.table_bytes == spec.num_rows * 8
    assert verify_store(store, sources=model.sources, origin=model.to_dict()).faults == []


def test_verify_counts_blocks_and_compares_rows(made: tuple[Model, Path]) -> None:
    model, store = made
    report = verify_store(store, sources=model.sources)
    assert report.rows_compared == sum(len(rows) for rows in model.rows.values())
    assert report.blocks_checked >= sum(rows.nbytes * 32 // 40 // 4096 for rows in model.rows.values())
    sampled = verify_store(store, sources=model.sources, sample_rows=20)
    assert not sampled.faults
    assert 0 < sampled.rows_compared < report.rows_compared


def test_an_older_reader_refuses_it_by_its_version(made: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "KNOWN_FORMAT_VERSIONS", (1,))  # what the release before knew
    with pytest.raises(tierstore.FormatError, match=r"store format 2, this tierstore .* reads 1"):
        tierstore.open(made[1])


def test_shards_made_of_a_store_in_place_are_those_of_its_checkpoint(made: tuple[Model, Path], tmp_path: Path) -> None:
    model, store = made
    build_from_store(store, tmp_path / "new", shard_bytes=65536)
    model.build(tmp_path / "direct", shard_bytes=65536)
    new, direct = (files_under(tmp_path / name / "shards") for name in ("new", "direct"))
    assert new == direct
    assert read_catalog(tmp_path / "new").identity == read_catalog(tmp_path / "direct").identity
    assert verify_store(tmp_path / "new", sources=model.sources).faults == []
    with pytest.raises(tierstore.ConfigError, match="a store with shards already"):
        build_from_store(tmp_path / "new", tmp_path / "other")


def command(*arguments: object) -> str:
    """What a command prints that ends well."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_every_command_knows_a_store_in_place(own: tuple[Model, Path], tmp_path: Path) -> None:
    model, _ = own
    store, file = tmp_path / "plain.tier", checkpoint_file(model)
    assert "of rows stay in place" in command("build", file, store, "--tensor", "plain", "--in-place")
    record = json.loads(command("inspect", store, "--json"))
    assert [found["path"] for found in record["files_in_place"]] == [str(file)]
    assert record["tables"][0]["in_place"]
    assert f"rows in place: {file}" in command("inspect", store).replace("\n", "")
    assert "1 block of the checkpoint checked" in command("verify", store, "--source", file)
    assert "1 file of the checkpoint, unchanged" in " ".join(command("doctor", store).split())
    assert "is ready" in command("build", store, tmp_path / "shards.tier")
    assert "33 rows compared" in command("verify", tmp_path / "shards.tier", "--source", file)
    with pytest.raises(tierstore.ConfigError, match="only a store with shards can be made of it"):
        build_checkpoint(store, tmp_path / "x", in_place=True)


def test_verify_names_a_checkpoint_that_cannot_be_read_and_goes_on(own: tuple[Model, Path], tmp_path: Path) -> None:
    model, store = own
    model.build(tmp_path / "shards")

    def read(*_: object) -> None:
        raise tierstore.FormatError("the file ends early")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlaneReader, "read", read)
        for path in (store, tmp_path / "shards"):
            faults = verify_store(path, sources=model.sources).faults
            assert any("its rows cannot be compared: the file ends early" in fault for fault in faults)
    assert verify_store(store, sources=model.sources).faults == []


def test_no_shard_is_made_of_a_block_that_changed(own: tuple[Model, Path], tmp_path: Path) -> None:
    model, store = own
    flip(checkpoint_file(model), values_of(model) + 5000)
    with pytest.raises(tierstore.CorruptPageError, match=r"block \d+ of table layers\.1 \(from byte \d+ of "):
        build_from_store(store, tmp_path / "new")
    with pytest.raises(tierstore.StoreNotReadyError):
        tierstore.open(tmp_path / "new")


@pytest.mark.parametrize("io", ["uring", "pread", "mmap"])
def test_a_flipped_bit_in_the_checkpoint_is_named_before_its_row_is_handed_out(
    own: tuple[Model, Path], io: str
) -> None:
    model, store = own
    rows = model.rows["layers.1"]
    flip(checkpoint_file(model), values_of(model) + 32 * 1000 + 7)
    with tierstore.open(store, dram="300KiB", io=io) as opened:
        bad = (values_of(model) + 32 * 1000) // 4096 * 4096
        with pytest.raises(tierstore.CorruptPageError, match=rf"from byte {bad} of .*model\.safetensors"):
            opened["layers.1"].rows(np.array([1000]))
        good = np.array([0, 5000, len(rows) - 1])
        np.testing.assert_array_equal(opened["layers.1"].rows(good), rows[good])
    report = verify_store(store)
    assert len(report.faults) == 1
    assert f"from byte {bad} of" in report.faults[0]


def test_no_flipped_bit_ever_gives_other_bytes(own: tuple[Model, Path]) -> None:
    model, store = own
    rows, rng = model.rows["layers.1"], np.random.default_rng(3)
    shards = [file for file in (store / "shards").rglob("*.shard") if file.parent.name.startswith("0-")]
    for _ in range(40):
        file = [checkpoint_file(model), *shards][int(rng.integers(1 + len(shards)))]
        byte = int(rng.integers(file.stat().st_size))
        flip(file, byte)
        try:
            ids = rng.integers(0, len(rows), 30)
            ids[0] = max(0, min(byte - values_of(model), len(rows) * 32 - 1)) // 32  # that row, if it is of a row
            with tierstore.open(store, dram=["300KiB", "900KiB"][int(rng.integers(2))]) as opened:
                for row_id in ids:
                    try:
                        found = opened["layers.1"].rows(np.array([row_id]))
                    except tierstore.CorruptPageError:
                        continue
                    np.testing.assert_array_equal(found[0], rows[row_id])
        except tierstore.FormatError:  # of a header, say
            pass
        finally:
            flip(file, byte)


def test_a_bad_page_of_scales_is_not_kept_in_memory_and_named_when_it_is_needed(own: tuple[Model, Path]) -> None:
    model, store = own
    flip(next((store / "shards" / "0-plane-1").glob("*.shard")), 4096 * 3 + 8)
    with tierstore.open(store, dram="700KiB") as opened:
        with pytest.raises(tierstore.CorruptPageError, match=r"page 3 of table layers\.1/plane-1"):
            opened["layers.1"].rows(np.arange(len(model.rows["layers.1"])))
        np.testing.assert_array_equal(opened["layers.1"].rows(np.array([0])), model.rows["layers.1"][:1])
    report = verify_store(store)
    assert list(report.damaged_shards) == [("layers.1/plane-1", 0)]


def test_a_bad_page_of_checksums_costs_its_own_blocks_and_is_named(own: tuple[Model, Path]) -> None:
    model, store = own
    file = next((store / "shards" / "0-checksums").glob("*.shard"))
    flip(file, 3)
    with tierstore.open(store, dram="300KiB") as opened:
        with pytest.raises(tierstore.CorruptPageError, match=r"its checksum is lost: page 0 of table layers\.1/check"):
            opened["layers.1"].rows(np.array([0]))
        assert opened["plain"].rows(np.array([0])).tolist() == model.rows["plain"][:1].tolist()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(tierstore.FormatError, match="the catalog says"):
        tierstore.open(store)


def test_damaged_side_tables_are_repaired_from_the_checkpoint(own: tuple[Model, Path]) -> None:
    model, store = own
    before = files_under(store / "shards")
    flip(next((store / "shards" / "0-plane-1").glob("*.shard")), 700)
    next((store / "shards" / "0-checksums").glob("*.shard")).unlink()
    report = tierstore.verify(store, source=model, repair=True)
    assert report.faults == []
    assert len(report.repaired) == 2
    assert files_under(store / "shards") == before


def test_a_file_that_is_cut_while_the_store_is_open_is_named(own: tuple[Model, Path]) -> None:
    model, store = own
    with tierstore.open(store, dram="300KiB") as opened:
        os.truncate(checkpoint_file(model), values_of(model) + 9000)
        with pytest.raises(tierstore.CorruptPageError, match="the file ends before it; it was cut while open"):
            opened["layers.1"].rows(np.array([2000]))
        np.testing.assert_array_equal(opened["layers.1"].rows(np.array([3])), model.rows["layers.1"][[3]])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 4096), "bytes .* then, .* now"),
        (lambda file: file.open("ab").write(b"more"), "bytes .* then, .* now"),
        (lambda file: os.utime(file, ns=(1, 1)), "mtime_ns .* then, 1 now"),
        (lambda file: shutil.copy2(file, file.with_name("x")) and file.with_name("x").rename(file), "inode"),
        (lambda file: file.unlink(), "in which rows lie"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "no regular file"),
    ],
    ids=["cut", "grown", "touched", "replaced", "removed", "fifo"],
)
def test_a_file_that_is_not_the_one_it_was_is_refused_with_what_changed(own: tuple[Model, Path], change, named) -> None:
    model, store = own
    change(checkpoint_file(model))
    with pytest.raises(tierstore.FormatError, match=named) as caught:
        tierstore.open(store)
    assert f"tierstore build --in-place CHECKPOINT {store}" in str(caught.value)
    assert any(str(checkpoint_file(model)) in fault for fault in verify_store(store).faults)


@pytest.mark.parametrize("block_bytes", [-20_000, 5 * 4096, 5 * 4096 + 77], ids=["before it", "a border", "a block"])
def test_a_file_that_is_cut_while_its_rows_are_loaded_loses_those_rows_alone(
    own: tuple[Model, Path], block_bytes: int
) -> None:
    model, store = own
    image = read_catalog(store)
    table, start = image.tables["layers.1"], values_of(model)
    assert isinstance(table, InPlaceLayout)
    files = InPlaceFiles(image, table, direct=False)
    try:
        cut = max(0, start // 4096 * 4096 + block_bytes)
        os.truncate(checkpoint_file(model), cut)
        rows = np.zeros((table.spec.num_rows, table.spec.row_bytes), dtype=np.uint8)
        bad = load_rows(files, rows, np.empty(1 << 16, dtype=np.uint8))
    finally:
        files.close()
    assert all("the file ends before it; it was cut while open" in text for text in bad.values())
    good = np.setdiff1d(np.arange(table.num_pages), list(bad))
    assert len(good) == max(0, (cut - start) // (32 * table.rows_per_page))
    whole = len(good) * table.rows_per_page
    np.testing.assert_array_equal(rows[:whole], model.rows["layers.1"][:whole])


MANY_FILES = """
import resource, sys
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
import tierstore
with tierstore.open(sys.argv[1], dram="1MiB") as store:
    print(store._engine._engine.registered_readers())
"""


def test_planes_in_the_same_files_register_each_of_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "COPIED_FRACTION", 0)
    rng, widths, num_files = np.random.default_rng(0), (64, 32, 16), 40
    (tmp_path / "model").mkdir()
    for number in range(num_files):
        tensors = {f"{width}.{number}": rng.integers(0, 256, (400, width), dtype=np.uint8) for width in widths}
        safetensors.numpy.save_file(tensors, tmp_path / "model" / f"{number}.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model")
    planes = [Plane(width, tuple(checkpoint.tensors[f"{width}.{i}"] for i in range(num_files))) for width in widths]
    source = TableSource(TableSpec.plain("t", 400 * num_files, sum(widths), "raw", 1), tuple(planes))
    build_store(tmp_path / "store", [source], origin=checkpoint.to_dict(), in_place=True)

    def registered(limit: int) -> str:
        command = [sys.executable, "-c", MANY_FILES, str(tmp_path / "store"), str(limit)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    assert registered(2 * num_files + 100) == registered(1000)


def test_the_same_build_again_takes_files_whose_bytes_are_the_same(own: tuple[Model, Path]) -> None:
    model, store = own
    before, identity = files_under(store / "shards"), read_catalog(store).identity
    os.utime(checkpoint_file(model), ns=(5, 5))
    again = Model(model.folder, *make_sources(model.folder, model))
    report = again.build(store, in_place=True)
    assert report.shards_built == 0
    assert files_under(store / "shards") == before
    assert read_catalog(store).identity == identity
    with tierstore.open(store) as opened:
        np.testing.assert_array_equal(opened["layers.1"].lookup(KEYS), model.expected("layers.1", KEYS))


def test_the_same_build_again_refuses_files_with_other_bytes(own: tuple[Model, Path]) -> None:
    model, store = own
    file = checkpoint_file(model)
    flip(file, values_of(model) + 32 * 333)
    os.utime(file, ns=(5, 5))
    with pytest.raises(tierstore.ConfigError, match=r"is a finished store, and model\.safetensors changed"):
        Model(model.folder, *make_sources(model.folder, model)).build(store, in_place=True)


def make_sources(folder: Path, model: Model) -> tuple:
    """A model's checkpoint and sources, opened anew in a folder."""
    checkpoint = Checkpoint.open(folder)
    sources = tuple(
        TableSource(
            source.spec,
            tuple(Plane(p.width_bytes, tuple(checkpoint.tensors[t.name] for t in p.tensors)) for p in source.planes),
        )
        for source in model.sources
    )
    return checkpoint, sources, model.rows


def test_store_and_checkpoint_may_move_together(own: tuple[Model, Path], tmp_path: Path) -> None:
    model, store = own
    (tmp_path / "moved").mkdir()
    for path in (model.folder, store):
        path.rename(tmp_path / "moved" / path.name)
    with tierstore.open(tmp_path / "moved" / "store") as opened:
        np.testing.assert_array_equal(opened["layers.1"].lookup(KEYS), model.expected("layers.1", KEYS))


def test_the_store_alone_may_move(own: tuple[Model, Path], tmp_path: Path) -> None:
    model, store = own
    store.rename(tmp_path / "deeper-than-before")
    (tmp_path / "a").mkdir()
    (tmp_path / "deeper-than-before").rename(tmp_path / "a" / "store")
    with tierstore.open(tmp_path / "a" / "store") as opened:
        np.testing.assert_array_equal(opened["layers.1"].lookup(KEYS), model.expected("layers.1", KEYS))


def test_after_a_checkpoint_moved_the_same_build_notes_where_it_is(own: tuple[Model, Path], tmp_path: Path) -> None:
    model, store = own
    model.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(tierstore.FormatError, match="in which rows lie"):
        tierstore.open(store)
    Model(tmp_path / "elsewhere", *make_sources(tmp_path / "elsewhere", model)).build(store, in_place=True)
    with tierstore.open(store) as opened:
        np.testing.assert_array_equal(opened["layers.1"].lookup(KEYS), model.expected("layers.1", KEYS))


def test_a_folder_of_links_as_in_a_hubs_cache_stays_in_place(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", layers=(1,))
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "r", tmp_path / "hub" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    checkpoint_file(model).rename(blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    linked = Model(snapshot, *make_sources(snapshot, model))
    linked.build(tmp_path / "store", in_place=True)
    assert read_catalog(tmp_path / "store").files[0].path == str(snapshot / "model.safetensors")
    with tierstore.open(tmp_path / "store", dram="300KiB") as opened:
        np.testing.assert_array_equal(opened["layers.1"].lookup(KEYS), model.expected("layers.1", KEYS))
    (snapshot / "model.safetensors").unlink()
    shutil.copy(blobs / "abc", blobs / "def")
    (snapshot / "model.safetensors").symlink_to("../../blobs/def")  # another revision
    with pytest.raises(tierstore.FormatError, match="is not the file that the store was built over"):
        tierstore.open(tmp_path / "store")


def test_a_read_only_checkpoint_is_read_and_never_written(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", layers=(1,))
    before = files_under(model.folder)
    checkpoint_file(model).chmod(0o444)
    model.folder.chmod(0o555)
    try:
        model.build(tmp_path / "store", in_place=True)
        with tierstore.open(tmp_path / "store", dram="300KiB") as opened:
            np.testing.assert_array_equal(opened["layers.1"].lookup(KEYS), model.expected("layers.1", KEYS))
        assert files_under(model.folder) == before
    finally:
        model.folder.chmod(0o755)


def test_a_store_in_its_checkpoints_folder_is_fine_and_the_other_way_round_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", layers=(1,))
    model.build(model.folder / "tier", in_place=True)
    inner = make_model(tmp_path / "store" / "model", layers=(1,))
    with pytest.raises(tierstore.TierStoreError, match="lies in the store's own folder"):
        inner.build(tmp_path / "store", in_place=True)


def test_an_unfinished_build_goes_on_and_ends_with_the_same_bytes(made: tuple[Model, Path], tmp_path: Path) -> None:
    model, _ = made
    model.build(tmp_path / "own", in_place=True, shard_bytes=4096)
    whole = files_under(tmp_path / "own" / "shards")
    shutil.rmtree(tmp_path / "own")

    class Enough(Exception):
        pass

    def stop(bytes_done: int, _: int) -> None:
        if bytes_done:
            raise Enough

    with pytest.raises(Enough):
        model.build(tmp_path / "own", in_place=True, shard_bytes=4096, jobs=1, on_progress=stop)
    with pytest.raises(tierstore.StoreNotReadyError, match="has not finished"):
        tierstore.open(tmp_path / "own")
    model.build(tmp_path / "own", in_place=True, shard_bytes=4096)
    assert files_under(tmp_path / "own" / "shards") == whole


def test_a_store_with_shards_is_not_built_over_in_place(model: Model, own_store: Path) -> None:
    with pytest.raises(tierstore.ConfigError, match="with other tables, shard size or hash"):
        model.build(own_store, in_place=True, shard_bytes=65536)


def test_a_placement_is_made_of_checked_blocks(own: tuple[Model, Path]) -> None:
    model, store = own
    place_some_of_one(store)
    with tierstore.open(store, dram="400KiB") as opened:
        np.testing.assert_array_equal(opened["layers.1"].lookup(KEYS), model.expected("layers.1", KEYS))
    for row in range(0, len(model.rows["layers.1"]), 128):
        flip(checkpoint_file(model), values_of(model) + 32 * row)
    with pytest.raises(tierstore.CorruptPageError, match="its checksum is wrong"):
        place_some_of_one(store)


def place_some_of_one(store: Path) -> None:
    keys = np.unique(KEYS[:, 0][KEYS[:, 0] >= 0])
    place_entries(store, {"layers.1": Chosen(np.zeros(len(keys), dtype=np.uint8), keys, 0.5)})


@pytest.mark.parametrize("family", ["deepseek_v41", "qwen4_exp"])
def test_every_familys_checkpoint_stays_in_place(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path / "model", family, table_bytes=2 << 20, file_bytes=1 << 20)
    build_checkpoint(tmp_path / "model", tmp_path / "store", in_place=True)
    build_checkpoint(tmp_path / "store", tmp_path / "shards")
    source = open_checkpoint(tmp_path / "model")
    for store in ("store", "shards"):
        assert tierstore.verify(tmp_path / store, source=source).faults == []
    with (
        tierstore.open(tmp_path / "store", dram="1MiB") as in_place,
        tierstore.open(tmp_path / "shards", dram="64MiB") as built,
    ):
        for name, table in built.tables.items():
            ids = np.random.default_rng(0).integers(0, table.spec.num_rows, 500)
            np.testing.assert_array_equal(in_place[name].rows(ids), table.rows(ids))
    side_bytes = sum(
        shard.num_bytes for of in read_catalog(tmp_path / "store").shards.values() for shard in of.values()
    )
    if family == "qwen4_exp":
        assert side_bytes < 0.02 * (2 << 20)  # of so small a table; see `tierstore bench inplace`
