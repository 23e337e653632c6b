"""export of a commit: touched rows are the newest records in the codec of the table; no other byte changes."""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from support.committed import Committed, rows_expected

import tierstore
from engram_adapter.checkpoints import build_checkpoint, open_checkpoint, sources_of_store
from engram_adapter.export_rows import open_touched
from engram_adapter.exporting import export_checkpoint
from engram_adapter.init import init_checkpoint
from tierstore.errors import BudgetError, ConfigError, CorruptPageError, FormatError
from tierstore.formats.catalog import read_catalog
from tierstore.offline.exporting import new_files, parts, record_streams, row_readers, sorted_rows, touched_rows
from tierstore.offline.exporting.row_readers import drawn_values, origin_of
from tierstore.tools.cli import run
from tierstore.tools.synth import write_checkpoint
from tierstore.training import exported
from tierstore.training.optimizers import SGD, DenseAdam, LazyAdam, RowWiseAdagrad
from tierstore.training.publish import publish

SHAPES = {
    "deepseek_v41": {"dim": 64},
    "deepseek_v41 in place": {"dim": 64},
    "qwen4_exp": {"dim": 16, "parts": 4, "dtype": "fp8"},
    "qwen4_exp bf16": {"dim": 16, "dtype": "bf16"},
    "engram": {"dim": 16, "dtype": "fp32"},
    "engram fp16": {"dim": 16, "dtype": "fp16"},
    "longcat": {"dim": 16},
}

ENDLESS_S = 10.0
WAIT_S = 60.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A checkpoint and its store, by shape."""
    folder, made, tokenizer = tmp_path_factory.mktemp("models"), {}, None
    for number, (shape, sizes) in enumerate(SHAPES.items()):
        checkpoint, store = folder / f"{number}", folder / f"{number}.tier"
        write_checkpoint(
            checkpoint, shape.split()[0], rows_per_head=60, hidden=16, layers=[1] if number != 6 else None,
            tokenizer=tokenizer, **sizes,
        )  # fmt: skip
        tokenizer = tokenizer or checkpoint / "tokenizer.json"
        build_checkpoint(checkpoint, store, in_place="in place" in shape)
        made[shape] = checkpoint, store
    return made


@pytest.fixture
def trained(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> tuple[Path, Committed]:
    """A checkpoint, and two runs of its store that touch the same rows in part."""
    return train(models["qwen4_exp"], tmp_path / "trained")


def train(model: tuple[Path, Path], store: Path) -> tuple[Path, Committed]:
    shutil.copytree(model[1], store)
    made = Committed(store, RowWiseAdagrad(lr=0.1))
    for name in made.records:
        for count in (150, 70, 200):
            made.write(name, count)
    return model[0], made


def rows_of(checkpoint: Path, store: Path) -> dict[str, np.ndarray]:
    """All rows of a checkpoint's tables as its files hold them."""
    found = {}
    for source in sources_of_store(read_catalog(store, may_be_initial=True), open_checkpoint(checkpoint).checkpoint):
        with source.open_reader() as reader:
            found[source.spec.name] = np.concatenate(reader.read(0, source.spec.num_rows), axis=1)
    return found


def bytes_that_differ(one: Path, other: Path) -> dict[str, int]:
    names = [path.name for path in one.iterdir()]
    assert sorted(names) == sorted(path.name for path in other.iterdir() if path.name != "states")
    pairs = {name: [np.frombuffer((folder / name).read_bytes(), np.uint8) for folder in (one, other)] for name in names}
    return {name: int((a != b).sum()) for name, (a, b) in pairs.items() if len(a) != len(b) or (a != b).any()}


@pytest.mark.parametrize("copied", [False, True], ids=["same files", "copied files"])
@pytest.mark.parametrize("shape", SHAPES)
def test_touched_rows_are_new_and_every_other_byte_is_the_checkpoints(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, shape: str, copied: bool
) -> None:
    checkpoint, made = train(models[shape], tmp_path / "store")
    commit = made.commit()
    source = checkpoint
    if copied:
        source = tmp_path / "copy"
        shutil.copytree(checkpoint, source)
    report = export_checkpoint(made.store, tmp_path / "out", source=source, dram="1MiB")
    assert report.commit == commit.number
    before, after = rows_of(checkpoint, made.store), rows_of(tmp_path / "out", made.store)
    changed = 0
    for name, records in made.records.items():
        assert report.touched_rows[name] == len(records)
        expected = rows_expected(made.image.tables[name].spec, before[name], records)
        np.testing.assert_array_equal(after[name], expected)
        changed += int((expected != before[name]).sum())
    assert sum(bytes_that_differ(checkpoint, tmp_path / "out").values()) == changed > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_the_sizes_of_steps_nor_of_stretches_change_a_byte(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, made = train(models[shape], tmp_path / "store")
    made.commit()
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    whole = export_checkpoint(made.store, tmp_path / "whole", source=checkpoint, states=True)
    monkeypatch.setattr(new_files, "CHUNK_BYTES", 4096)  # rows lie across their ends
    monkeypatch.setattr(parts, "STEP_BYTES", 700)
    monkeypatch.setattr(row_readers, "STEP_BYTES", 900)
    monkeypatch.setattr(row_readers, "NEAR_BYTES", 130)
    monkeypatch.setattr(touched_rows, "IDS_AT_ONCE", 7)
    monkeypatch.setattr(exported, "READ_BYTES", 3000)
    sort, streams = sorted_rows._sort_stretch, []
    monkeypatch.setattr(sorted_rows, "_sort_stretch", lambda *given: streams.append(given[0].stream) or sort(*given))
    one = export_checkpoint(made.store, tmp_path / "one", source=checkpoint, states=True)
    assert one.files == whole.files
    assert not any(isinstance(stream, record_streams.Stretch) for stream in streams)  # all fits: nothing is cut
    monkeypatch.setattr(record_streams, "READ_BYTES", 2000)
    for dram, ordering_bytes, jobs in (("1MiB", 20_000, 1), ("128MiB", 2_560_000, 2)):  # stretches of two dozen rows
        monkeypatch.setattr(sorted_rows, "ORDERING_BYTES", ordering_bytes)
        streams.clear()
        for source, name in ((checkpoint, "same"), (copy, "copied")):
            out = tmp_path / f"{name} {jobs}"
            again = export_checkpoint(made.store, out, source=source, states=True, dram=dram, jobs=jobs)
            assert again.files == whole.files
        assert max(stream.number for stream in streams) > 5


@pytest.mark.parametrize("failing", [0, 1, 7])
def test_threads_that_share_a_table_give_the_bytes_of_one_and_end_when_one_fails(
    trained: tuple[Path, Committed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    checkpoint, made = trained
    made.commit()
    monkeypatch.setattr(exported, "READ_BYTES", 1000)  # dozens of pieces
    one = export_checkpoint(made.store, tmp_path / "one", source=checkpoint, jobs=1)
    threads: set[str] = set()
    encode, both, counted = exported.Encoder.__call__, threading.Barrier(2), itertools.count()

    def meeting(encoder: exported.Encoder, records: np.ndarray, before: np.ndarray) -> Mapping[str, np.ndarray]:
        if threading.current_thread().name not in threads:
            threads.add(threading.current_thread().name)
            both.wait(WAIT_S)  # for the other one: each has a piece
        return encode(encoder, records, before)

    monkeypatch.setattr(exported.Encoder, "__call__", meeting)
    two = export_checkpoint(made.store, tmp_path / "two", source=checkpoint, jobs=2)
    assert len(threads) == 2
    assert two.files == one.files

    def damaged(encoder: exported.Encoder, records: np.ndarray, before: np.ndarray) -> Mapping[str, np.ndarray]:
        if next(counted) == failing:
            raise CorruptPageError("a piece")
        return encode(encoder, records, before)

    monkeypatch.setattr(exported.Encoder, "__call__", damaged)
    running = {thread.ident for thread in threading.enumerate()}
    with pytest.raises(CorruptPageError, match="a piece"):
        export_checkpoint(made.store, tmp_path / "out", source=checkpoint, jobs=2)
    assert {thread.ident for thread in threading.enumerate()} <= running
    assert [path.name for path in tmp_path.iterdir()].count("out") == 0


def test_an_export_builds_and_verifies_clean_and_two_are_equal(trained: tuple[Path, Committed], tmp_path: Path) -> None:
    checkpoint, made = trained
    made.commit()
    first, second = (
        export_checkpoint(made.store, tmp_path / name, source=checkpoint, dram=dram, jobs=jobs)
        for name, dram, jobs in (("a", "1MiB", 1), ("b", "1GiB", 3))
    )
    assert first.files == second.files
    build_checkpoint(tmp_path / "a", tmp_path / "built")
    assert not tierstore.verify(tmp_path / "built", open_checkpoint(tmp_path / "a")).faults
    again = export_checkpoint(tmp_path / "built", tmp_path / "c", source=tmp_path / "a")
    assert again.files == first.files


def test_rows_that_were_touched_and_did_not_change_keep_their_very_bytes(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    for shape in SHAPES:
        checkpoint, built = models[shape]
        store = tmp_path / shape
        shutil.copytree(built, store)
        made = Committed(store, SGD(lr=0.1))
        before = rows_of(checkpoint, store)
        for name, table in made.image.tables.items():
            made.write(name, 100, lambda ids, rows=before[name], s=table.spec: decoded(s, rows[ids]))
        made.commit()
        export_checkpoint(store, tmp_path / f"{shape} out", source=checkpoint)
        assert bytes_that_differ(checkpoint, tmp_path / f"{shape} out") == {}


def decoded(spec: tierstore.TableSpec, rows: np.ndarray) -> np.ndarray:
    from tierstore import kernels
    from tierstore.offline.exporting.quantized import kernel_codec

    values = np.empty((len(rows), spec.dim), dtype=np.float32)
    kernels.dequantize_rows(np.ascontiguousarray(rows), spec.dim, *kernel_codec(spec), values)
    return values


def test_an_older_commit_and_the_base_can_be_had(trained: tuple[Path, Committed], tmp_path: Path) -> None:
    checkpoint, made = trained
    first = made.commit()
    (name,) = made.records
    records = dict(made.records[name])
    made.write(name, 300)
    made.commit()
    spec, before = made.image.tables[name].spec, rows_of(checkpoint, made.store)[name]
    export_checkpoint(made.store, tmp_path / "old", source=checkpoint, commit=first.number)
    np.testing.assert_array_equal(rows_of(tmp_path / "old", made.store)[name], rows_expected(spec, before, records))
    export_checkpoint(made.store, tmp_path / "base", source=checkpoint, version=0)
    assert bytes_that_differ(checkpoint, tmp_path / "base") == {}
    with pytest.raises(ConfigError, match="there is no commit 9"):
        export_checkpoint(made.store, tmp_path / "none", source=checkpoint, commit=9)
    with pytest.raises(ValueError, match="version 0 and commit 1"):
        export_checkpoint(made.store, tmp_path / "none", source=checkpoint, commit=1, version=0)


@pytest.mark.parametrize("optimizer", [RowWiseAdagrad(lr=0.1), LazyAdam(lr=0.1), SGD(lr=0.1)], ids=lambda o: o.rule)
def test_states_have_the_records_of_touched_rows_by_ascending_row_id(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, optimizer: RowWiseAdagrad
) -> None:
    checkpoint, built = models["qwen4_exp"]
    store = tmp_path / "store"
    shutil.copytree(built, store)
    made = Committed(store, optimizer)
    (name,) = made.records
    for _ in range(2):
        made.write(name, 90)
    commit = made.commit(step=17)
    export_checkpoint(store, tmp_path / "out", source=checkpoint, states=True)
    file = tmp_path / "out" / "states" / f"{name}.safetensors"
    tensors, records = safetensors.numpy.load_file(file), made.records[name]
    np.testing.assert_array_equal(tensors.pop("row_ids"), sorted(records))
    floats = np.array([records[row_id] for row_id in sorted(records)])
    dim = made.image.tables[name].spec.dim
    np.testing.assert_array_equal(tensors.pop("values"), floats[:, :dim])
    layout = optimizer.state_layout(dim)
    assert tensors.keys() == layout.keys()
    for part, at in layout.items():
        state = floats[:, dim:][:, at]
        np.testing.assert_array_equal(tensors[part], state[:, 0] if part == "sum" else state)
    with safetensors.safe_open(file, "numpy") as opened:
        about = opened.metadata()
    assert json.loads(about["optimizer"]) == optimizer.to_dict()
    assert (json.loads(about["step"]), json.loads(about["commit"]), about["table"]) == (17, commit.number, name)
    build_checkpoint(tmp_path / "out", tmp_path / "built")  # states do not disturb a loader


def test_of_a_table_from_scratch_untouched_rows_are_drawn(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, _ = models["engram"]
    store = tmp_path / "store"
    init_checkpoint(checkpoint, store, layers=[1])
    export_checkpoint(store, tmp_path / "before", source=checkpoint)
    made = Committed(store, SGD(lr=0.1))
    made.write("layers.1", 100)
    made.commit()
    report = export_checkpoint(store, tmp_path / "after", source=checkpoint)
    assert list(report.left_out) == [file.name for file in sorted(checkpoint.glob("*.safetensors*"))]
    before, after = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors")[
            "layers.1.engram.multi_head_embedding.embedding.weight"
        ]
        for name in ("before", "after")
    )
    for row_id, record in made.records["layers.1"].items():
        before[row_id] = record[: before.shape[1]]
    np.testing.assert_array_equal(after, before)


def test_rows_of_a_pytorch_file_are_refused_by_name_and_those_of_a_converted_one_are_not(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"embed": torch.randn(300, 8)}, folder / "pytorch_model.bin")
    build_checkpoint(folder, tmp_path / "store", tensor="embed")
    made = Committed(tmp_path / "store", SGD(lr=0.1))
    made.write("embed", 40)
    made.commit()
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is .* convert the checkpoint to safetensors"):
        export_checkpoint(tmp_path / "store", tmp_path / "out", source=folder)
    report = export_checkpoint(tmp_path / "store", tmp_path / "out", source=folder, tables_only=True)
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    expected = torch.load(folder / "pytorch_model.bin")["embed"].numpy()
    for row_id, record in made.records["embed"].items():
        expected[row_id] = record[:8]
    np.testing.assert_array_equal(tensors["embed"], expected)
    assert list(report.left_out) == ["pytorch_model.bin"]


def test_a_flipped_bit_in_a_run_and_a_run_that_is_gone_are_named(
    trained: tuple[Path, Committed], tmp_path: Path
) -> None:
    checkpoint, made = trained
    made.commit()
    run_path = sorted((made.store / "training").glob("*.run"))[1]
    whole = run_path.read_bytes()
    for at in (4096 + 3, len(whole) - 4000, 40):
        data = bytearray(whole)
        data[at] ^= 4
        run_path.write_bytes(data)
        with pytest.raises((CorruptPageError, FormatError), match=run_path.name):
            export_checkpoint(made.store, tmp_path / "out", source=checkpoint)
    run_path.unlink()
    with pytest.raises(FormatError, match=run_path.name):
        export_checkpoint(made.store, tmp_path / "out", source=checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained"]


def test_tables_are_sorted_at_once_and_damage_in_one_ends_the_others(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, built = tmp_path / "model", tmp_path / "built"
    tokenizer = models["deepseek_v41"][0] / "tokenizer.json"
    write_checkpoint(model, "deepseek_v41", rows_per_head=60, hidden=16, layers=[1, 2], dim=64, tokenizer=tokenizer)
    build_checkpoint(model, built)
    checkpoint, made = train((model, built), tmp_path / "store")
    slow, _ = made.records
    made.commit()
    one, two = (
        export_checkpoint(made.store, tmp_path / f"{jobs}", source=checkpoint, jobs=jobs).files for jobs in (1, 2)
    )
    assert one == two
    damaged = sorted((made.store / "training").glob("*.run"))[-1]  # of the last table
    data = bytearray(damaged.read_bytes())
    data[4096 + 3] ^= 4
    damaged.write_bytes(data)
    row_ids = exported.RunStream.row_ids

    def endless(stream: exported.RunStream) -> Iterator[np.ndarray]:
        until = time.monotonic() + ENDLESS_S
        while stream._layout.table == slow and time.monotonic() < until:
            yield np.empty(0, dtype=np.int64)
            time.sleep(0.001)
        yield from row_ids(stream)

    monkeypatch.setattr(exported.RunStream, "row_ids", endless)
    started = time.monotonic()
    with pytest.raises(CorruptPageError, match=damaged.name):
        export_checkpoint(made.store, tmp_path / "out", source=checkpoint, jobs=2)
    assert time.monotonic() - started < ENDLESS_S
    assert [path.name for path in tmp_path.iterdir()].count("out") == 0


def test_too_little_memory_to_sort_and_values_that_are_not_numbers_are_named(
    trained: tuple[Path, Committed], tmp_path: Path
) -> None:
    checkpoint, made = trained
    (name,) = made.records
    made.commit()
    with pytest.raises(BudgetError, match=r"4096 bytes\) of memory .* raise --dram"):
        export_checkpoint(made.store, tmp_path / "out", source=checkpoint, dram="4KiB")
    made.write(name, 3, lambda ids: np.full((len(ids), made.image.tables[name].spec.dim), np.nan, np.float32))
    made.commit()
    with pytest.raises(ConfigError, match=r"48 values of commit 2 are not numbers"):
        export_checkpoint(made.store, tmp_path / "out", source=checkpoint)


def test_a_disk_that_is_full_while_rows_are_sorted_is_named_and_nothing_stays(
    trained: tuple[Path, Committed], tmp_path: Path
) -> None:
    checkpoint, made = trained
    made.commit()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for most in (100, 5000, 20_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, old[1]))
        try:
            with pytest.raises(ConfigError, match="this process may write files of"):
                export_checkpoint(made.store, tmp_path / "out", source=checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_values_beyond_the_codec_are_counted_and_said(
    trained: tuple[Path, Committed], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, made = trained
    (name,) = made.records
    made.write(name, 2, lambda ids: np.full((len(ids), made.image.tables[name].spec.dim), 1e6, np.float32))
    made.commit()
    assert run(["export", str(made.store), str(tmp_path / "out"), "--source", str(checkpoint)]) == 0
    assert "32 trained values were beyond the codec's largest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "optimizer", [SGD(0.1), RowWiseAdagrad(0.1), LazyAdam(0.1), DenseAdam(0.1)], ids=lambda o: o.rule
)
def test_what_was_trained_is_what_is_exported(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, optimizer: SGD
) -> None:
    checkpoint, built = models["engram"]
    store = tmp_path / "store"
    shutil.copytree(built, store)
    rng = np.random.default_rng(1)
    with tierstore.open_training(store, optimizer, dram="4MiB") as training:
        (name,) = training.tables
        spec = training[name].spec
        for step in range(12):
            row_ids = rng.integers(0, spec.num_rows // (1 + step % 3), 200)
            training[name].apply(row_ids, rng.standard_normal((200, spec.dim), dtype=np.float32), lr=0.01 * (step + 1))
            if step == 8:
                training.commit(step).wait()
    export_checkpoint(store, tmp_path / "out", source=checkpoint)
    with tierstore.open_training(store, dram="4MiB") as training:  # at the commit: later steps were never durable
        expected = training[name].gather(np.arange(spec.num_rows))
    np.testing.assert_array_equal(rows_of(tmp_path / "out", store)[name].view(np.float32), expected)


@pytest.mark.parametrize("shape", ["deepseek_v41", "qwen4_exp"])
def test_a_version_is_exported_as_the_commit_that_it_was_published_from(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, shape: str
) -> None:
    checkpoint, made = train(models[shape], tmp_path / "store")
    commits = [made.commit()]
    publish(made.store)
    for name in made.records:
        made.write(name, 120)
    commits.append(made.commit())
    publish(made.store)
    for number, commit in enumerate(commits, start=1):
        of_version = export_checkpoint(made.store, tmp_path / f"v{number}", source=checkpoint, version=number)
        of_commit = export_checkpoint(made.store, tmp_path / f"c{number}", source=checkpoint, commit=commit.number)
        assert of_version.files == of_commit.files
        assert (of_version.version, of_version.commit) == (number, None)
    with pytest.raises(ConfigError, match="version: 3 is not one of"):
        export_checkpoint(made.store, tmp_path / "none", source=checkpoint, version=3)
    file = sorted((made.store / "versions").iterdir())[0]
    data = bytearray(file.read_bytes())
    data[4096 + 9] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptPageError, match=file.name):
        export_checkpoint(made.store, tmp_path / "none", source=checkpoint, version=2)
    assert not (tmp_path / "none").exists()


def test_a_model_is_trained_from_scratch_exported_and_served(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, _ = models["engram"]
    store = tmp_path / "store"
    (table,) = init_checkpoint(checkpoint, store, layers=[1], seed=4)
    name, spec = table.spec.name, table.spec
    row_ids = np.random.default_rng(0).permutation(spec.num_rows)[:200]
    with tierstore.open_training(store, SGD(lr=1.0), dram="4MiB") as training:
        np.testing.assert_array_equal(training[name].gather(row_ids), drawn_values(table, row_ids))
        training[name].apply(row_ids, np.ones((200, spec.dim), dtype=np.float32))
        training.commit(1).wait()
        expected = training[name].gather(np.arange(spec.num_rows))
    export_checkpoint(store, tmp_path / "out", source=checkpoint)
    build_checkpoint(tmp_path / "out", tmp_path / "built")
    with tierstore.open(tmp_path / "built", dram="4MiB") as built:
        rows = built[name].rows(np.arange(spec.num_rows)).view(np.float32)
    np.testing.assert_array_equal(rows, expected)
    untouched = np.setdiff1d(np.arange(spec.num_rows), row_ids)
    np.testing.assert_array_equal(rows[untouched], drawn_values(table, untouched))


def test_a_commit_that_is_forgotten_while_it_is_exported_is_exported_whole(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(models["qwen4_exp"][1], store)
    image = read_catalog(store)
    with tierstore.open_training(store, DenseAdam(lr=0.1), dram="64MiB") as training:
        name, table = next(iter(training.tables.items()))

        def commit(number: int) -> None:
            table.apply(np.arange(number, 30), np.ones((30 - number, table.spec.dim), dtype=np.float32))
            training.commit(number).wait()

        commit(1)
        with contextlib.closing(open_touched(image, None, None, states=False)) as touched:
            for number in range(2, 6):
                commit(number)
            assert not (store / "training" / "00000001.rates").exists()
            origin = origin_of(image, image.tables[name])
            assert touched.sort(name, origin, tmp_path / "rows", 1 << 24, threading.Event()).num_rows == 29
