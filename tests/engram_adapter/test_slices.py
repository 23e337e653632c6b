"""Slices of real models' layouts: built, trained and exported as the whole store is, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tierstore
from engram_adapter.checkpoints import build_checkpoint
from engram_adapter.exporting import ExportReport, export_checkpoint
from engram_adapter.hash_spec import HashSpec
from engram_adapter.init import init_checkpoint
from engram_adapter.profiles import replan
from engram_adapter.training_plans import plan_training
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.formats.trace import TokenTraceWriter
from tierstore.kernels import SOURCES
from tierstore.tools.synth import write_checkpoint

SHAPES = {
    "deepseek_v41": {"dim": 64},
    "qwen4_exp": {"dim": 16, "parts": 4, "dtype": "fp8"},
    "engram": {"dim": 16, "dtype": "fp32"},
    "longcat": {"dim": 16},
}
ADAGRAD = tierstore.RowWiseAdagrad(lr=0.1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made, tokenizer = tmp_path_factory.mktemp("models"), {}, None
    for shape, sizes in SHAPES.items():
        made[shape] = folder / shape
        layers = None if shape == "longcat" else [1]
        write_checkpoint(
            made[shape], shape, rows_per_head=60, hidden=16, layers=layers, tokenizer=tokenizer, **sizes
        )  # fmt: skip
        tokenizer = tokenizer or made[shape] / "tokenizer.json"
    return made


def train(paths: list[Path]) -> None:
    """Takes two steps on every row of a few, in a whole store or in all its slices."""
    for path in paths:
        with tierstore.open_training(path, ADAGRAD, dram="8MiB") as training:
            for step in (1, 2):
                for table in training.tables.values():
                    spec = table.spec
                    rng = np.random.default_rng(step)
                    row_ids = rng.integers(0, spec.num_rows, 400)
                    gradients = rng.standard_normal((400, spec.dim)).astype(np.float32)
                    mine = np.flatnonzero((row_ids >= spec.row_start) & (row_ids < spec.row_end))
                    table.apply(row_ids[mine], gradients[mine])
                training.commit(step).wait()


def digests(report: ExportReport) -> dict[str, str]:
    return {file.name: file.sha256 for file in report.files}


@pytest.mark.parametrize(
    ("shape", "num_slices", "in_place"),
    [
        ("deepseek_v41", 2, True),
        ("qwen4_exp", 3, False),
        *(
            pytest.param(shape, n, in_place, marks=pytest.mark.slow)
            for shape in SHAPES
            for n, in_place in ((1, False), (2, False), (4, True), (40, False))
        ),
    ],
)
def test_slices_of_a_model_give_its_rows_and_export_as_the_whole_does(
    checkpoints: dict[str, Path], tmp_path: Path, shape: str, num_slices: int, in_place: bool
) -> None:
    checkpoint, whole = checkpoints[shape], tmp_path / "whole"
    build_checkpoint(checkpoint, whole)
    parts = [tmp_path / f"part-{index}" for index in range(num_slices)]
    for index, path in enumerate(parts):
        build_checkpoint(checkpoint, path, slice=(index, num_slices), in_place=in_place)
    with tierstore.open(whole) as store:
        spec = HashSpec.from_store(store)
        tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (1, 50)).astype(np.int32)
        rows = {name: table.rows(np.arange(table.spec.num_rows)) for name, table in store.tables.items()}
        found: dict[str, list[np.ndarray]] = {name: [] for name in store}
        for path in parts:
            with tierstore.open(path) as part:
                assert HashSpec.from_store(part).attachments() == spec.attachments()
                for layer in spec.layers:
                    table = part[spec.table_name(layer)]
                    own = np.arange(table.spec.row_start, table.spec.row_end)
                    np.testing.assert_array_equal(table.rows(own), rows[table.spec.name][own])
                    if table.spec.orders:
                        keys = spec.keys(tokens, layer)[0]
                        of_slice = np.ascontiguousarray(keys[:, table.spec.columns(spec.orders)])
                        found[table.spec.name].append(table.lookup(of_slice))
        for layer in spec.layers:
            name = spec.table_name(layer)
            if found[name]:
                expected = store[name].lookup(np.ascontiguousarray(spec.keys(tokens, layer)[0]))
                np.testing.assert_array_equal(np.concatenate(found[name], axis=1), expected)
    untouched = export_checkpoint(parts, tmp_path / "untouched", source=checkpoint)
    assert digests(untouched) == digests(export_checkpoint(whole, tmp_path / "same", source=checkpoint))
    train([whole])
    train(parts)
    expected = export_checkpoint(whole, tmp_path / "expected", source=checkpoint)
    report = export_checkpoint(parts[::-1], tmp_path / "out", source=checkpoint)
    assert digests(report) == digests(expected) != digests(untouched)
    assert report.touched_rows == expected.touched_rows
    joined = tierstore.reslice(parts, tmp_path / "joined", 1).stores
    assert digests(export_checkpoint(joined, tmp_path / "again", source=checkpoint)) == digests(expected)


def test_slices_from_scratch_export_as_the_whole_does(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    parts = [tmp_path / "0", tmp_path / "1"]
    init_checkpoint(checkpoints["qwen4_exp"], tmp_path / "whole", seed=5)
    for index, path in enumerate(parts):
        init_checkpoint(checkpoints["qwen4_exp"], path, seed=5, slice=(index, 2))
    train([tmp_path / "whole"])
    train(parts)
    expected = export_checkpoint(tmp_path / "whole", tmp_path / "expected")
    assert digests(export_checkpoint(parts, tmp_path / "out")) == digests(expected)


def test_shards_of_a_slice_are_built_from_a_store_in_place_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints["deepseek_v41"]
    build_checkpoint(checkpoint, tmp_path / "in place", in_place=True)
    build_checkpoint(tmp_path / "in place", tmp_path / "found", slice=(1, 3))
    build_checkpoint(checkpoint, tmp_path / "expected", slice=(1, 3))
    found, expected = (read_catalog(tmp_path / name) for name in ("found", "expected"))
    assert (found.tables, found.shards, found.origin) == (expected.tables, expected.shards, expected.origin)
    build_checkpoint(checkpoint, tmp_path / "part", in_place=True, slice=(1, 3))
    build_checkpoint(tmp_path / "part", tmp_path / "again")
    assert read_catalog(tmp_path / "again").shards == expected.shards
    with pytest.raises(ConfigError, match="slice 0/2 of a slice; make others of it: tierstore reslice"):
        build_checkpoint(tmp_path / "part", tmp_path / "other", slice=(0, 2))


def test_plans_of_training_on_slices_add_up_to_the_wholes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints["qwen4_exp"]
    build_checkpoint(checkpoint, tmp_path / "whole")
    with tierstore.open(tmp_path / "whole") as store:
        vocab_size = HashSpec.from_store(store).vocab_size
    with TokenTraceWriter(tmp_path / "trace", vocab_size=vocab_size, source="") as writer:
        writer.add_document(np.random.default_rng(0).integers(0, vocab_size, 300).astype(np.int32))
        writer.finish()

    def touched(store: Path) -> int:
        estimate = plan_training(store, tmp_path / "trace", ADAGRAD, "64MiB", 50, probe=False)
        return sum(table.touched_rows for table in estimate.tables.values())

    whole = touched(tmp_path / "whole")
    for num_slices in (2, 20):
        parts = [tmp_path / f"{index}of{num_slices}" for index in range(num_slices)]
        for index, path in enumerate(parts):
            build_checkpoint(checkpoint, path, slice=(index, num_slices))
        assert sum(map(touched, parts)) == whole > 0


def test_token_traces_plan_what_a_slice_has(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    store, tokenizer = tmp_path / "store", checkpoints["deepseek_v41"] / "tokenizer.json"
    write_checkpoint(tmp_path / "model", "deepseek_v41", rows_per_head=1500, layers=[1], dim=64, tokenizer=tokenizer)
    build_checkpoint(tmp_path / "model", store, slice=(1, 3))
    with tierstore.open(store) as opened:
        spec, own = HashSpec.from_store(opened), opened["layers.1"].spec
    rng, token_ids = np.random.default_rng(0), []
    with TokenTraceWriter(tmp_path / "trace", vocab_size=spec.vocab_size, source="") as writer:
        for _ in range(60):
            token_ids.append(np.minimum(rng.zipf(1.3, 80), spec.vocab_size - 1).astype(np.int32))
            writer.add_document(token_ids[-1])
        writer.finish()
    assert replan(store, tmp_path / "trace", dram="500KiB", nvme_entries="128KiB") == 1
    keys = spec.keys(np.stack(token_ids), 1).reshape(-1, len(spec.orders))
    keys = np.ascontiguousarray(keys[:, own.columns(spec.orders)])
    with tierstore.open(store, dram="500KiB") as placed, tierstore.open(store, placement="none") as bare:
        np.testing.assert_array_equal(placed["layers.1"].lookup(keys), bare["layers.1"].lookup(keys))
        sources = np.array(SOURCES)[placed["layers.1"].locate(keys)]
        assert "static" in sources
    assert tierstore.verify(store).faults == []


def test_an_export_of_one_slice_alone_names_what_is_missing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints["engram"]
    build_checkpoint(checkpoint, tmp_path / "store", slice=(0, 2))
    with pytest.raises(ConfigError, match=r"rows \d+ to (\d+) of the \1 of table .* are in no slice"):
        export_checkpoint(tmp_path / "store", tmp_path / "out", source=checkpoint)
    assert not (tmp_path / "out").exists()


def bytes_read() -> int:
    """Bytes that this process has asked the system for by reads, from the page cache or a disk."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_build_of_a_slice_reads_its_part_of_the_checkpoint_only(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint, "engram", rows_per_head=4000, hidden=16, layers=[1], dim=64, dtype="fp32")
    build_checkpoint(checkpoint, tmp_path / "whole")
    read = {}
    for name, part in {"whole": None, "slice": (1, 4)}.items():
        before = bytes_read()
        build_checkpoint(checkpoint, tmp_path / f"{name}-again", slice=part)
        read[name] = bytes_read() - before
    with tierstore.open(tmp_path / "whole") as store:
        total = sum(table.spec.table_bytes for table in store.tables.values())
    assert total > 10 << 20
    assert read["whole"] > total
    assert read["slice"] < total // 4 + (2 << 20)  # its part, samples of every tensor, catalogs
