"""export: a store back into its checkpoint's layout. Rows that nobody touched are the checkpoint's very bytes."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from support.committed import Committed

import tierstore
from engram_adapter.checkpoints import build_checkpoint, open_checkpoint
from engram_adapter.exporting import ExportReport, export_checkpoint
from tierstore.errors import BudgetError, ConfigError, CorruptPageError, FormatError
from tierstore.offline.exporting.parts import FileReader
from tierstore.tools.cli import run
from tierstore.tools.synth import write_checkpoint
from tierstore.training.optimizers import SGD

FAMILIES = {
    "deepseek_v41": {"dim": 32},
    "qwen4_exp": {"dim": 16, "parts": 2, "dtype": "fp8"},
    "engram": {"dim": 16},
    "longcat": {"dim": 16},
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A checkpoint and its store, by family."""
    made: dict[str, tuple[Path, Path]] = {}
    folder = tmp_path_factory.mktemp("models")
    tokenizer = None
    for family, sizes in FAMILIES.items():
        checkpoint, store = folder / family, folder / f"{family}.tier"
        write_checkpoint(checkpoint, family, rows_per_head=40, hidden=16, tokenizer=tokenizer, **sizes)
        tokenizer = tokenizer or checkpoint / "tokenizer.json"
        build_checkpoint(checkpoint, store)
        made[family] = checkpoint, store
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_what_nobody_trained_comes_back_byte_for_byte(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    checkpoint, store = models[family]
    report = export_checkpoint(store, tmp_path / "out", source=checkpoint)
    assert contents(tmp_path / "out") == contents(checkpoint)
    for file in report.files:
        assert file.sha256 == hashlib.sha256((checkpoint / file.name).read_bytes()).hexdigest()
    assert report.from_store == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_copied_checkpoint_rows_come_from_the_store_whatever_the_copy_holds(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    checkpoint, store = models[family]
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)  # without times: other files, as far as the catalog shows
    report = export_checkpoint(store, tmp_path / "out", source=copy)
    assert contents(tmp_path / "out") == contents(checkpoint)
    assert report.from_store == tuple(tierstore.open(store, dram="4MiB").tables)


def test_a_row_that_rotted_between_the_samples_of_a_copy_is_not_exported(tmp_path: Path) -> None:
    folder, copy = tmp_path / "model", tmp_path / "copy"
    folder.mkdir()
    safetensors.numpy.save_file({"embed": np.arange(1 << 18, dtype=np.int32).reshape(-1, 64)}, folder / "m.safetensors")
    build_checkpoint(folder, tmp_path / "store", tensor="embed")
    shutil.copytree(folder, copy)
    with (copy / "m.safetensors").open("r+b") as file:  # 16 samples of 4 KiB of a MiB
        file.seek(-20_000, os.SEEK_END)
        file.write(b"rot")
    export_checkpoint(tmp_path / "store", tmp_path / "out", source=copy)
    assert contents(tmp_path / "out") == contents(folder) != contents(copy)


def test_an_export_builds_again_and_verifies_clean(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, store = models["qwen4_exp"]
    export_checkpoint(store, tmp_path / "out", source=checkpoint)
    build_checkpoint(tmp_path / "out", tmp_path / "again")
    report = tierstore.verify(tmp_path / "again", open_checkpoint(tmp_path / "out"))
    assert not report.faults
    assert report.rows_compared
    assert not tierstore.verify(store, open_checkpoint(tmp_path / "out")).faults


def test_of_a_store_in_place_the_checkpoint_is_found(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, _ = models["deepseek_v41"]
    build_checkpoint(checkpoint, tmp_path / "store", in_place=True)
    export_checkpoint(tmp_path / "store", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(checkpoint)


def test_a_store_with_shards_asks_for_its_checkpoint(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--source CHECKPOINT"):
        export_checkpoint(models["engram"][1], tmp_path / "out")


@pytest.mark.parametrize("container", ["safetensors", "pt"])
def test_a_plain_tensor_comes_back_byte_for_byte(tmp_path: Path, container: str) -> None:
    values = np.random.default_rng(0).standard_normal((700, 24), dtype=np.float32)
    folder = tmp_path / "model"
    folder.mkdir()
    if container == "pt":
        torch = pytest.importorskip("torch")
        torch.save({"embed.weight": torch.from_numpy(values)}, folder / "pytorch_model.bin")
    else:
        safetensors.numpy.save_file({"embed.weight": values, "other": values[:3]}, folder / "model.safetensors")
    build_checkpoint(folder, tmp_path / "store", tensor="embed.weight")
    export_checkpoint(tmp_path / "store", tmp_path / "out", source=folder)
    assert contents(tmp_path / "out") == contents(folder)


def test_files_beside_the_tensors_come_along_and_stale_weights_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "inference" / "deep").mkdir(parents=True)
    (folder / ".cache").mkdir()
    values = np.ones((50, 8), dtype=np.float32)
    safetensors.numpy.save_file({"embed.weight": values}, folder / "model.safetensors")
    kept = {"README.md": b"# a model", "inference/run.py": b"pass", "inference/deep/empty": b"", "config.json": b"{}"}
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    safetensors.numpy.save_file({"embed.weight": values}, folder / "inference" / "copy.safetensors")
    (folder / ".cache" / "x").write_bytes(b"x")
    store = folder / "inside.tier"  # a store, and the export itself, may lie in the checkpoint's folder
    build_checkpoint(folder, store, tensor="embed.weight")
    report = export_checkpoint(store, folder / "out", source=folder)
    expected = kept | {"model.safetensors": (folder / "model.safetensors").read_bytes()}
    assert contents(folder / "out") == expected
    assert list(report.left_out) == ["inference/copy.safetensors"]
    assert "was not built from" in report.left_out["inference/copy.safetensors"]


def test_a_checkpoint_that_changed_since_the_build_is_refused_by_the_file_that_did(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, store = models["engram"]
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    tensor = open_checkpoint(copy).checkpoint.tensors["layers.1.engram.multi_head_embedding.embedding.weight"]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.byte_start)
        file.write(b"\x12\x34\x56")
    with pytest.raises(ConfigError, match=rf"{tensor.path.name} changed since \(SHA-256 of samples"):
        export_checkpoint(store, tmp_path / "out", source=copy)
    assert not (tmp_path / "out").exists()
    (copy / tensor.path.name).unlink()
    with pytest.raises(ConfigError, match="download"):
        export_checkpoint(store, tmp_path / "out", source=copy)


def test_a_damaged_page_is_named_and_leaves_no_folder(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, built = models["engram"]
    store, copy = tmp_path / "store", tmp_path / "copy"
    shutil.copytree(built, store)
    shutil.copytree(checkpoint, copy)
    shard = next(store.rglob("*.shard"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptPageError, match="page 0 of table"):
        export_checkpoint(store, tmp_path / "out", source=copy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "store"]


def test_a_folder_that_holds_something_is_left_as_it_is(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, store = models["engram"]
    (tmp_path / "out").mkdir()
    export_checkpoint(store, tmp_path / "out", source=checkpoint)  # an empty one is taken
    with pytest.raises(ConfigError, match="holds 7 files already"):
        export_checkpoint(store, tmp_path / "out", source=checkpoint)
    (tmp_path / "other.new").mkdir()
    (tmp_path / "other.new" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is in the way"):
        export_checkpoint(store, tmp_path / "other", source=checkpoint)
    assert (tmp_path / "other.new" / "mine").read_text() == "mine"


def test_a_full_disk_is_named_before_and_midway_and_leaves_nothing(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, store = models["engram"]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        with pytest.raises(ConfigError, match=r"64\.00 KiB"):
            export_checkpoint(store, tmp_path / "out", source=checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10, used=9, free=1))
    with pytest.raises(BudgetError, match=r"needs .*\d+ bytes.*1 B free"):
        export_checkpoint(store, tmp_path / "out", source=checkpoint)


def test_a_file_that_changes_while_it_is_copied_is_named(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, store = models["engram"]
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy, copy_function=os.link)  # the very files of the build
    file = copy / "tokenizer.json"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    read = FileReader.read

    def read_and_change(reader: FileReader, byte_start: int, out: np.ndarray) -> None:
        read(reader, byte_start, out)
        if reader._part.path.name == "tokenizer.json":
            file.write_bytes(data + b" ")

    monkeypatch.setattr(FileReader, "read", read_and_change)
    with pytest.raises(FormatError, match=r"tokenizer\.json was changed while it was read"):
        export_checkpoint(store, tmp_path / "out", source=copy)
    assert not (tmp_path / "out").exists()


CHILD = """
import sys, os
from engram_adapter.exporting import export_checkpoint
print("ready", flush=True)
sys.stdin.readline()
export_checkpoint(sys.argv[1], sys.argv[2], source=sys.argv[3], jobs=2)
"""


@pytest.mark.process
def test_an_export_killed_anywhere_leaves_nothing_at_its_path_and_is_repeated(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, store = models["deepseek_v41"]
    out = tmp_path / "out"
    rng, kills = np.random.default_rng(0), 0
    for _ in range(4):
        command = [sys.executable, "-c", CHILD, str(store), str(out), str(checkpoint)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        try:
            child.wait(timeout=float(rng.uniform(0, 0.08)))
        except subprocess.TimeoutExpired:
            child.kill()
            kills += 1
        child.communicate(timeout=30)
        if out.exists():
            assert contents(out).keys() - {".tierstore-unfinished"} == contents(checkpoint).keys()
            shutil.rmtree(out)
    assert kills
    export_checkpoint(store, out, source=checkpoint)
    assert contents(out) == contents(checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_prints_what_sha256sum_checks(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, store = models["engram"]
    assert run(["export", str(store), str(tmp_path / "out"), "--source", str(checkpoint)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
    (tmp_path / "sums").write_text("\n".join(lines) + "\n")
    subprocess.run(["sha256sum", "--check", "--quiet", "../sums"], cwd=tmp_path / "out", check=True, timeout=30)
    assert run(["export", str(store), str(tmp_path / "json"), "--source", str(checkpoint), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {file["name"] for file in record["files"]} == set(contents(checkpoint))


def test_tables_alone_say_that_the_models_config_is_missing_unless_it_came_along(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, store = models["deepseek_v41"]
    report = export_checkpoint(store, tmp_path / "bare", tables_only=True)
    assert "'tierstore build' of the export needs the model's" in report.left_out["config.json"]
    report = export_checkpoint(store, tmp_path / "whole", source=checkpoint, tables_only=True)
    assert "config.json" not in report.left_out
    build_checkpoint(tmp_path / "whole", tmp_path / "again")
    shutil.copy(checkpoint / "config.json", tmp_path / "bare")  # as the message says


def test_reports_add_up(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, store = models["engram"]
    seen: list[tuple[int, int]] = []
    report: ExportReport = export_checkpoint(
        store, tmp_path / "out", source=checkpoint, on_progress=lambda done, total: seen.append((done, total))
    )
    assert report.num_bytes == sum(map(len, contents(checkpoint).values()))
    assert seen[-1] == (report.num_bytes, report.num_bytes)


def test_a_folder_of_torch_distributed_comes_back_byte_for_byte(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    dcp.save({"embed.weight": torch.randn(300, 8)}, checkpoint_id=tmp_path / "model", no_dist=True)
    build_checkpoint(tmp_path / "model", tmp_path / "store", tensor="embed.weight")
    export_checkpoint(tmp_path / "store", tmp_path / "out", source=tmp_path / "model")
    assert contents(tmp_path / "out") == contents(tmp_path / "model")
    assert ".metadata" in contents(tmp_path / "out")
    made = Committed(tmp_path / "store", SGD(lr=0.1))
    made.write("embed.weight", 10)
    made.commit()
    with pytest.raises(ConfigError, match="rows can be replaced in safetensors and GGUF files only"):
        export_checkpoint(tmp_path / "store", tmp_path / "trained", source=tmp_path / "model")


def test_a_gguf_file_comes_back_byte_for_byte(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "test")
    writer.add_tensor("token_embd.weight", np.random.default_rng(0).standard_normal((200, 32)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    build_checkpoint(tmp_path / "model.gguf", tmp_path / "store", tensor="token_embd.weight")
    export_checkpoint(tmp_path / "store", tmp_path / "out", source=tmp_path / "model.gguf")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    made = Committed(tmp_path / "store", SGD(lr=0.1))
    made.write("token_embd.weight", 60)
    made.commit()
    export_checkpoint(tmp_path / "store", tmp_path / "trained", source=tmp_path / "model.gguf")
    (tensor,) = gguf.GGUFReader(tmp_path / "trained" / "model.gguf").tensors
    for row_id, record in made.records["token_embd.weight"].items():
        np.testing.assert_array_equal(tensor.data[row_id], record[:32].astype(np.float16))
