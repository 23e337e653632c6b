"""Reslice: other slices, or the whole store again, bit for bit, with what training made of them."""

from __future__ import annotations

import dataclasses
import errno
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.stores import Model, make_model
from support.trainable import in_bits, make_trainable

import tierstore
from tierstore.errors import ConfigError, CorruptPageError
from tierstore.formats.catalog import read_catalog
from tierstore.formats.catalog_records import CATALOG_FILE, as_json, from_json, read_records, write_records
from tierstore.offline import page_writer
from tierstore.offline.init import init_store
from tierstore.tools import cli
from tierstore.training.optimizers import Optimizer

ADAGRAD = tierstore.RowWiseAdagrad(lr=0.05, eps=1e-8)
ROWS = 500
ADAM, DENSE = tierstore.LazyAdam(lr=0.01), tierstore.DenseAdam(lr=0.01)
RULES = [
    pytest.param(ADAGRAD, "built", id="adagrad"),
    pytest.param(DENSE, "from scratch", id="dense, from scratch"),
    pytest.param(ADAM, "built", id="adam", marks=pytest.mark.slow),
    pytest.param(DENSE, "built", id="dense", marks=pytest.mark.slow),
    pytest.param(ADAM, "from scratch", id="adam, from scratch", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"))


def shards(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in sorted(store.glob("shards/*/*"))}


def built(model: Model, folder: Path, num_slices: int, **options: object) -> list[Path]:
    paths = [folder / f"{index}of{num_slices}" for index in range(num_slices)]
    for index, path in enumerate(paths):
        model.build(path, slice=(index, num_slices), **{"shard_bytes": 4096 * 3} | options)
    return paths


@pytest.mark.parametrize(
    ("num_before", "num_after", "in_place"),
    [(3, 2, True), *(pytest.param(before, 3, False, marks=pytest.mark.slow) for before in (2, 29))],
)
def test_resliced_stores_have_the_pages_of_a_build_of_their_slices(
    model: Model, tmp_path: Path, num_before: int, num_after: int, in_place: bool
) -> None:
    before = built(model, tmp_path, num_before, in_place=in_place, shard_bytes=8192)
    report = tierstore.reslice(before[::-1], tmp_path / "new-{}", num_after, shard_bytes=8192)
    assert report.stores == tuple(tmp_path / f"new-{index}" for index in range(num_after))
    for index, path in enumerate(report.stores):
        model.build(tmp_path / f"direct-{index}", slice=(index, num_after), shard_bytes=8192)
        assert shards(path) == shards(tmp_path / f"direct-{index}")
        new, direct = read_catalog(path), read_catalog(tmp_path / f"direct-{index}")
        assert (new.tables, new.shards, new.origin) == (direct.tables, direct.shards, direct.origin)
        assert tierstore.verify(path, source=model).faults == []


def test_slices_join_into_the_store_of_a_direct_build(model: Model, tmp_path: Path) -> None:
    model.build(tmp_path / "whole", shard_bytes=4096 * 3)
    tierstore.reslice(built(model, tmp_path, 3), tmp_path / "joined", 1)
    assert shards(tmp_path / "joined") == shards(tmp_path / "whole")
    joined, whole = read_catalog(tmp_path / "joined"), read_catalog(tmp_path / "whole")
    assert dataclasses.replace(joined, path=whole.path) == whole
    tierstore.reslice([tmp_path / "whole"], tmp_path / "cut", 3)
    for index, path in enumerate(built(model, tmp_path / "direct", 3)):
        assert shards(tmp_path / "cut" / str(index)) == shards(path)


@pytest.mark.parametrize(("optimizer", "kind"), RULES)
def test_a_training_goes_on_in_other_slices_as_if_nothing_had_happened(
    tmp_path: Path, optimizer: Optimizer, kind: str
) -> None:
    rng = np.random.default_rng(1)
    batches = [(rng.integers(0, ROWS, 300), rng.standard_normal((300, 32)).astype(np.float32)) for _ in range(6)]
    make = _maker(tmp_path, kind)
    whole = make("whole", None)
    _train([whole], optimizer, batches, range(1, 7))
    parts = [make(f"half-{index}", (index, 2)) for index in range(2)]
    _train(parts, optimizer, batches, range(1, 3))
    report = tierstore.reslice(parts, tmp_path / "quarter-{}", 4)
    assert report.step == 2
    assert [read_catalog(path, may_be_initial=True).is_initial for path in report.stores] == [kind != "built"] * 4
    _train(report.stores, None, batches, range(3, 5))
    three = tierstore.reslice(report.stores, tmp_path / "third-{}", 3).stores
    _train(three, None, batches, range(5, 7))
    tierstore.reslice(three, tmp_path / "joined", 1)
    with tierstore.open_training(tmp_path / "joined") as found, tierstore.open_training(whole) as expected:
        assert (found.commits[-1].step, found.commits[-1].payload) == (6, b"6")
        assert found.commits[-1].optimizer == expected.commits[-1].optimizer
        ids = np.arange(ROWS)
        for name in ("a", "b"):
            np.testing.assert_array_equal(in_bits(found[name].gather(ids)), in_bits(expected[name].gather(ids)))
    _train([tmp_path / "joined", whole], None, batches, range(1, 2))
    with tierstore.open_training(tmp_path / "joined") as found, tierstore.open_training(whole) as expected:
        np.testing.assert_array_equal(in_bits(found["a"].gather(ids)), in_bits(expected["a"].gather(ids)))


def _maker(folder: Path, kind: str) -> Callable[[str, tuple[int, int] | None], Path]:
    made = make_trainable(folder / "model", ROWS, codecs={"a": "bf16", "b": "fp32"})
    specs = [source.spec for source in made.model.sources]

    def make(name: str, part: tuple[int, int] | None) -> Path:
        if kind == "built":
            made.model.build(folder / name, slice=part)
        else:
            init_store(folder / name, specs, seed=3, deviation=0.02, origin={"digest": "ab" * 32}, slice=part)
        return folder / name

    return make


def _train(paths: list[Path], optimizer: Optimizer | None, batches: list, steps: range) -> None:
    for path in paths:
        with tierstore.open_training(path, optimizer, dram="4MiB") as training:
            for step in steps:
                row_ids, gradients = batches[step - 1]
                for table in training.tables.values():
                    spec = table.spec
                    mine = np.flatnonzero((row_ids >= spec.row_start) & (row_ids < spec.row_end))
                    table.apply(row_ids[mine], gradients[mine])
                training.commit(step, str(step).encode()).wait()


def test_the_newest_step_that_all_slices_hold_is_taken(tmp_path: Path) -> None:
    make = _maker(tmp_path, "built")
    batches = [(np.array([1, 499]), np.full((2, 32), step, dtype=np.float32)) for step in range(1, 6)]
    parts = [make(f"half-{index}", (index, 2)) for index in range(2)]
    _train(parts, ADAGRAD, batches, range(1, 3))
    _train(parts[:1], None, batches, range(3, 4))
    assert tierstore.reslice(parts, tmp_path / "new", 1).step == 2
    with pytest.raises(
        ConfigError, match=r"no commit of step 3 in every slice: .*half-0 holds steps 2, 3; .*steps 1, 2"
    ):
        tierstore.reslice(parts, tmp_path / "other", 1, step=3)
    _train(parts[:1], None, batches, range(4, 5))
    with pytest.raises(ConfigError, match=r"no commit of a step that all slices hold: .*steps 3, 4; .*steps 1, 2"):
        tierstore.reslice(parts, tmp_path / "other", 1)
    never = make("never", (1, 2))
    with pytest.raises(ConfigError, match=r"half-0 holds steps 3, 4; .*never holds no commit"):
        tierstore.reslice([parts[0], never], tmp_path / "other", 1)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match=r"step 9: .*first has no commit, and no other slice has"):
        tierstore.reslice([make("first", (0, 2)), never], tmp_path / "other", 1, step=9)


def test_slices_of_other_trainings_are_not_joined(tmp_path: Path) -> None:
    make = _maker(tmp_path, "built")
    batches = [(np.array([1, 499]), np.full((2, 32), step, dtype=np.float32)) for step in range(1, 6)]
    parts = [make(f"half-{index}", (index, 2)) for index in range(2)]
    _train(parts[:1], ADAGRAD, batches, range(1, 2))
    _train(parts[1:], tierstore.LazyAdam(lr=0.01), batches, range(1, 2))
    with pytest.raises(ConfigError, match=r"half-0 was trained with .*row_wise_adagrad.*half-1 with .*lazy_adam"):
        tierstore.reslice(parts, tmp_path / "new", 1)
    again = make("again", (1, 2))
    with tierstore.open_training(again, ADAGRAD) as training:
        training["a"].apply(np.array([499]), np.ones((1, 32), dtype=np.float32))
        training.commit(1).wait()
    with pytest.raises(ConfigError, match=r"at step 1, .*half-0 has applied .*again"):
        tierstore.reslice([parts[0], again], tmp_path / "new", 1)


def test_slices_at_a_version_are_resliced_to_its_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_trainable(tmp_path / "model", ROWS, codecs={"a": "bf16"})
    parts = [tmp_path / f"{index}of2" for index in range(2)]
    expected = []
    for index, path in enumerate(parts):
        made.model.build(path, slice=(index, 2))
        with tierstore.open_training(path, ADAGRAD) as training:
            start = training["a"].spec.row_start
            training["a"].apply(np.array([start + 7]), np.ones((1, 32), dtype=np.float32))
            training.commit(1).wait()
            training.publish()
        with tierstore.open_training(path, at=0):
            pass  # goes back to the base: what was published stays
        with tierstore.open(path) as store:
            expected.append(store["a"].rows(np.arange(start, start + 250)))
        if index == 0:
            made.model.build(tmp_path / "never", slice=(1, 2))
            with pytest.raises(ConfigError, match=r"no version is in every slice: .*0of2 has versions up to 1; "):
                tierstore.reslice([path, tmp_path / "never"], tmp_path / "new", 1)
    report = tierstore.reslice(parts, tmp_path / "new", 1)
    assert (report.version, report.step) == (1, None)
    with tierstore.open(tmp_path / "new") as store:
        np.testing.assert_array_equal(store["a"].rows(np.arange(ROWS)), np.concatenate(expected))
    with tierstore.open_training(parts[0], ADAGRAD) as training:
        training["a"].apply(np.array([9]), np.ones((1, 32), dtype=np.float32))
        training.commit(2).wait()
        training.publish()
    with tierstore.open_training(parts[0], at=0):
        pass
    with caplog.at_level("WARNING"):
        assert tierstore.reslice(parts, tmp_path / "other", 1).version == 1
    assert "0of2 has versions up to 2; the newest that all slices hold: 1 of " in caplog.text
    assert shards(tmp_path / "other") == shards(tmp_path / "new")
    assert tierstore.reslice(parts, tmp_path / "first", 1, version=1).version == 1
    for commit in (2, 3):  # numbers on the other slice; the last one's version has the number of the first slice's
        with tierstore.open_training(parts[1], ADAGRAD) as training:
            training["a"].apply(np.array([499]), np.ones((1, 32), dtype=np.float32))
            training.commit(commit).wait()
            if commit == 3:
                training.publish()
    with tierstore.open_training(parts[1], at=0):
        pass
    with pytest.raises(ConfigError, match=r"version 2 of .*0of2 and version 2 of .*1of2 were published from different"):
        tierstore.reslice(parts, tmp_path / "mixed", 1, version=2)
    assert tierstore.reslice(parts, tmp_path / "mixed", 1).version == 1
    tierstore.reslice(parts, tmp_path / "base", 1, version=0)
    with tierstore.open(tmp_path / "base") as store:
        np.testing.assert_array_equal(store["a"].rows(np.arange(ROWS)), made.model.rows["a"])


def test_wrong_sets_of_slices_are_refused_by_name(model: Model, tmp_path: Path) -> None:
    first, second, third = built(model, tmp_path, 3)
    halves = built(model, tmp_path, 2)
    new = tmp_path / "new"
    for wrong, what in {
        (first, third): r"rows \d+ to \d+ of the \d+ of table layers.1 are in no slice",
        (second, third): r"rows 0 to \d+ of the \d+ of table layers.1 are in no slice",
        (first, second): r"rows \d+ to (\d+) of the \1 of table layers.1 are in no slice",
        (first, second, second, third): r"rows \d+ to \d+ of table layers.1 are in .*1of3 and in .*1of3",
        (halves[0], second, third): r"rows \d+ to \d+ of table layers.1 are in .*0of2 and in .*1of3",
    }.items():
        with pytest.raises(ConfigError, match=what):
            tierstore.reslice(wrong, new, 1)
    other = make_model(tmp_path / "other", seed=1)
    other.build(tmp_path / "theirs", slice=(1, 2))
    with pytest.raises(ConfigError, match=r"0of2 and .*theirs are of different checkpoints"):
        tierstore.reslice([halves[0], tmp_path / "theirs"], new, 1)
    sources = tuple(
        dataclasses.replace(each, spec=dataclasses.replace(each.spec, fingerprint="7" * 64)) for each in model.sources
    )
    dataclasses.replace(model, sources=sources).build(tmp_path / "hashed", slice=(1, 2))
    with pytest.raises(
        ConfigError, match=r"table layers.1 has fingerprint 0000.* and 7777777.*: they are of different"
    ):
        tierstore.reslice([halves[0], tmp_path / "hashed"], new, 1)
    model.build(tmp_path / "noted", slice=(1, 2), attachments={"note": b"another"})
    with pytest.raises(ConfigError, match="different records of the model"):
        tierstore.reslice([halves[0], tmp_path / "noted"], new, 1)
    make_model(tmp_path / "few", plain=False).build(tmp_path / "fewer", slice=(1, 2))
    with pytest.raises(ConfigError, match=r"has tables layers\.1, layers\.14, .*: they are not slices of one store"):
        tierstore.reslice([halves[0], tmp_path / "fewer"], new, 1)
    with pytest.raises(ConfigError, match="table plain: 34 slices of 33 rows"):
        tierstore.reslice(halves, new, 34)
    with pytest.raises(ConfigError, match="0of2 is one of the slices"):
        tierstore.reslice(halves, halves[0], 1)
    model.build(new, shard_bytes=8192, slice=(0, 4))
    with pytest.raises(ConfigError, match="new holds another store"):
        tierstore.reslice(halves, new, 1)


def test_damage_is_named_and_leaves_no_store(model: Model, tmp_path: Path) -> None:
    parts = built(model, tmp_path, 2)
    file = sorted(parts[1].glob("shards/*/*.shard"))[0]
    good = file.read_bytes()
    file.write_bytes(good[:300] + bytes([good[300] ^ 4]) + good[301:])
    with pytest.raises(CorruptPageError, match=r"page 0 of table layers\.1"):
        tierstore.reslice(parts, tmp_path / "new", 1)
    file.write_bytes(good[:-4096])
    with pytest.raises(tierstore.FormatError, match=file.name):
        tierstore.reslice(parts, tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()
    file.write_bytes(good)
    tierstore.reslice(parts, tmp_path / "new", 1)
    assert tierstore.verify(tmp_path / "new", source=model).faults == []
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_paths_are_those_that_were_given_and_no_lock_stays(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = built(model, tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    given = [Path(path.name) for path in parts]
    report = tierstore.reslice(given, "new/{}", 2)
    assert report.stores == (Path("new/0"), Path("new/1"))
    assert [list((tmp_path / path).glob("*.lock")) for path in report.stores] == [[], []]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").touch()
    with pytest.raises(ConfigError, match=r"^full holds 1 other files"):
        tierstore.reslice(given, "full", 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(page_writer, "write_all", full)
        with pytest.raises(tierstore.BudgetError, match=r"^joined: No space left on device: .*run the same command"):
            tierstore.reslice(given, "joined", 1)
    monkeypatch.chdir(tmp_path / "here")
    made = tierstore.reslice(parts, ".", 1).stores  # its unfinished store needs the folder's name
    assert made == (tmp_path / "here",)
    assert tierstore.verify(tmp_path / "here").faults == []


def test_a_damaged_training_record_is_named(tmp_path: Path) -> None:
    make = _maker(tmp_path, "built")
    batches = [(np.array([1, 2, 499]), np.ones((3, 32), dtype=np.float32))]
    parts = [make(f"half-{index}", (index, 2)) for index in range(2)]
    _train(parts, ADAGRAD, batches, range(1, 2))
    run = sorted((parts[1] / "training").glob("*.run"))[0]
    data = bytearray(run.read_bytes())
    data[4096 + 5] ^= 1
    run.write_bytes(data)
    with pytest.raises(CorruptPageError, match=f"{run.name}.*row 249"):
        tierstore.reslice(parts, tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()


def test_a_catalog_of_a_slice_with_another_range_is_refused(model: Model, tmp_path: Path) -> None:
    (store, _) = built(model, tmp_path, 2)
    record = from_json(read_records(store), "table/plain", store)
    for wrong in ({"row_end": 40}, {"row_start": 20}, {"row_end": 0, "row_start": 3}, {"row_end": "7"}):
        spec = record["spec"] | wrong
        write_records(store / CATALOG_FILE, {"table/plain": as_json(record | {"spec": spec})})
        with pytest.raises(tierstore.FormatError, match=r"plain|rows"):
            read_catalog(store)


RESLICE = """
import sys, tierstore
tierstore.reslice(sys.argv[3:], sys.argv[1], int(sys.argv[2]), jobs=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_reslice_killed_anywhere_goes_on_and_ends_as_if_undisturbed(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = make_trainable(tmp_path / "model", 60_000, codecs={"a": "bf16", "b": "fp32"})
    parts = [tmp_path / f"{index}of2" for index in range(2)]
    for index, path in enumerate(parts):
        made.model.build(path, slice=(index, 2), shard_bytes=1 << 16)
        with tierstore.open_training(path, ADAGRAD, dram="16MiB") as training:
            for table in training.tables.values():
                ids = np.arange(table.spec.row_start, table.spec.row_end, 2)
                table.apply(ids, np.ones((len(ids), 32), dtype=np.float32))
            training.commit(1).wait()
    expected = tierstore.reslice(parts, tmp_path / "undisturbed", 3).stores
    arguments = [sys.executable, "-c", RESLICE, str(tmp_path / "new"), "3", *map(str, parts)]
    for _ in range(12):
        process = subprocess.Popen(arguments)
        time.sleep(rng.uniform(0.3, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in (tmp_path / "new").glob("[0-9]"):  # whole, or not there
            with tierstore.open_training(path) as training:
                assert training.commits[-1].step == 1
    subprocess.run(arguments, check=True)
    for index, path in enumerate(expected):
        found = tmp_path / "new" / str(index)
        assert shards(found) == shards(path)
        with tierstore.open_training(found) as one, tierstore.open_training(path) as other:
            for name in ("a", "b"):
                spec = one[name].spec
                ids = np.arange(spec.row_start, spec.row_end)
                np.testing.assert_array_equal(in_bits(one[name].gather(ids)), in_bits(other[name].gather(ids)))
    assert list((tmp_path / "new").glob(".*")) == []


def test_the_command_builds_slices_and_joins_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_trainable(tmp_path / "model", ROWS, codecs={"a": "bf16"}).model.folder

    def run(*arguments: object) -> tuple[int, str]:
        status = cli.run([str(argument) for argument in arguments])
        return status, "".join(capsys.readouterr())

    for index in range(2):
        status, said = run("build", folder, tmp_path / f"{index}", "--tensor", "a", "--slice", f"{index}/2")
        assert status == 0, said
    assert "250 to 500 of 500" in run("inspect", tmp_path / "1")[1]
    status, said = run("reslice", tmp_path / "0", tmp_path / "1", "-o", tmp_path / "new", "--slices", "1")
    assert (status, "version 0" in said) == (0, True), said
    assert run("verify", tmp_path / "new", "--source", folder)[0] == 0
    status, said = run("build", folder, tmp_path / "x", "--tensor", "a", "--slice", "2/2")
    assert (status, "expected I/N, slice I of N" in said) == (1, True), said


@pytest.mark.parametrize("kind", ["built", "from scratch"])
def test_what_a_killed_reslice_left_is_not_taken_for_another_slice(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [_maker(tmp_path, kind)(f"half-{index}", (index, 2)) for index in range(2)]
    _train(parts, ADAGRAD, [(np.array([1, 499]), np.ones((2, 32), dtype=np.float32))], range(1, 2))
    rename = Path.rename

    def killed(path: Path, to: Path) -> Path:
        if path.name.endswith(".resliced"):
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            tierstore.reslice(parts, tmp_path / "new-{}", 2)
    made = tierstore.reslice(parts, tmp_path / "new-{}", 4).stores
    specs = [read_catalog(path, may_be_initial=True).tables["a"].public_spec for path in made]
    assert [(spec.row_start, spec.row_end) for spec in specs] == [(0, 125), (125, 250), (250, 375), (375, 500)]
