"""Checkpoints that synth writes are what a reader of the real ones expects: the real safetensors library opens them."""

from __future__ import annotations

import collections
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from engram_adapter.families import read_model
from engram_adapter.synthetic import FLOATS, PlannedTensor, SyntheticPlan
from tierstore.errors import BudgetError, ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.tools import synth
from tierstore.tools.corpus import train_tokenizer
from tierstore.tools.synth import tensor_blocks, write_checkpoint

DiskUsage = collections.namedtuple("DiskUsage", "total used free")
SMALL: dict[str, dict[str, Any]] = {
    "deepseek_v41": {"rows_per_head": 50, "dim": 64, "hidden": 40},
    "engram-fp32": {"rows_per_head": 60, "dim": 16},
    "engram-fp16": {"rows_per_head": 60, "dim": 16, "dtype": "fp16"},
    "engram-bf16": {"rows_per_head": 60, "dim": 16, "dtype": "bf16"},
    "qwen4_exp-bf16": {"rows_per_head": 70, "dim": 16, "parts": 4},
    "deepseek_v41-nvfp4": {"rows_per_head": 50, "dim": 64, "hidden": 40, "dtype": "nvfp4"},
    "qwen4_exp-nvfp4": {"rows_per_head": 70, "dim": 32, "dtype": "nvfp4", "parts": 4},
    "longcat": {"rows_per_head": 70, "dim": 16},
    "qwen4_exp-fp8": {"rows_per_head": 70, "dim": 16, "dtype": "fp8", "parts": 1},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Path(__file__)], 300)


def write(folder: Path, name: str, tokenizer: Tokenizer, **options: Any) -> SyntheticPlan:
    return write_checkpoint(folder, name.partition("-")[0], tokenizer=tokenizer, **(SMALL[name] | options))


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by the safetensors library from the files that the index names."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for name, file in weight_map.items():
        with safe_open(folder / file, framework="pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in load(folder).items()}


@pytest.mark.parametrize("name", SMALL)
def test_every_file_and_value_is_good_to_the_safetensors_library(
    tmp_path: Path, name: str, tokenizer: Tokenizer
) -> None:
    plan = write(tmp_path / "model", name, tokenizer)
    tensors = load(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.total_bytes
    for tensor in tensors.values():
        if tensor.dtype == torch.float8_e8m0fnu:
            exponents = tensor.view(torch.uint8)
            assert exponents.min() >= 3
            assert exponents.max() <= 246
        elif tensor.is_floating_point():
            assert tensor.float().isfinite().all()
            assert tensor.numel() < 2 or tensor.float().std() > 0


def test_deepseek_v41_has_the_published_names_dtypes_and_shapes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "model", "deepseek_v41", tokenizer, layers=(1, 14))
    text = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]
    rows = dict(zip((1, 14), text["engram_num_embeddings"], strict=True))
    expected = {}
    for layer in (1, 14):
        prefix = f"layers.{layer}.engram."
        expected |= {
            f"{prefix}embed.weight": (torch.float8_e4m3fn, (rows[layer], 64)),
            f"{prefix}embed.scale": (torch.float8_e8m0fnu, (rows[layer], 2)),
            f"{prefix}wkv.weight": (torch.float8_e4m3fn, (5 * 40, 24 * 64)),
            f"{prefix}wkv.scale": (torch.float8_e8m0fnu, (2, 12)),
            f"{prefix}q_weight": (torch.bfloat16, (4, 40)),
            f"{prefix}k_weight": (torch.bfloat16, (4, 40)),
        }
    assert {name: (t.dtype, tuple(t.shape)) for name, t in load(tmp_path / "model").items()} == expected


def test_qwen4_exp_is_split_into_equal_parts_that_carry_its_hash_buffers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "model", "qwen4_exp-bf16", tokenizer, parts=3)
    tensors = load(tmp_path / "model")
    prefix = "model.language_model.layers.1.ple.ple_embedding."
    parts = [tensors.pop(f"{prefix}ngram_embedding.shard_{part}.weight") for part in range(3)]
    assert {(part.dtype, tuple(part.shape)) for part in parts} == {(torch.bfloat16, tuple(parts[0].shape))}
    moduli = tensors.pop(f"{prefix}ngram_heads_vocab_sizes").tolist()
    assert len(moduli) == 16
    assert 0 <= 3 * len(parts[0]) - sum(moduli) < 3 * 128
    assert tensors.pop(f"{prefix}ngram_heads_offsets").tolist() == [sum(moduli[:i]) for i in range(16)]
    assert len(tensors.pop(f"{prefix}layer_multipliers")) == 3
    assert not tensors


def test_fp8_of_qwen4_exp_has_one_global_scale_and_an_unsharded_weight(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "model", "qwen4_exp-fp8", tokenizer)
    prefix = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding."
    tensors = load(tmp_path / "model")
    assert tensors[f"{prefix}weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{prefix}weight_scale"].dtype == torch.float32
    assert tensors[f"{prefix}weight_scale"].numel() == 1


@pytest.mark.parametrize("name", SMALL)
def test_the_adapter_reads_what_synth_wrote(tmp_path: Path, name: str, tokenizer: Tokenizer) -> None:
    plan = write(tmp_path / "model", name, tokenizer)
    model = read_model(Checkpoint.open(tmp_path / "model"))
    assert model.family == name.partition("-")[0]
    assert sum(source.spec.num_rows for source in model.sources) == plan.num_rows
    assert sum(source.spec.table_bytes for source in model.sources) == plan.table_bytes


@pytest.mark.parametrize("name", [name for name in SMALL if name != "longcat"])
def test_layers_are_where_they_were_asked_for(tmp_path: Path, name: str, tokenizer: Tokenizer) -> None:
    write(tmp_path / "model", name, tokenizer, layers=(0, 3, 7))
    model = read_model(Checkpoint.open(tmp_path / "model"))
    assert [source.spec.name for source in model.sources] == ["layers.0", "layers.3", "layers.7"]


# models.md: rows of each family's tables as published.
@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("deepseek_v41", {384006168, 384016682}),
        ("engram", {10344164, 10348242}),
        ("qwen4_exp", {320001536 // 128}),
        ("longcat", set(range(10223617, 10223640, 2))),
    ],
)
def test_full_size_has_the_published_row_counts(
    tmp_path: Path, family: str, rows: set[int], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth.shutil, "disk_usage", lambda _: DiskUsage(1 << 50, 0, 1 << 50))
    monkeypatch.setattr(synth, "_write_files", lambda *_: None)
    plan = write_checkpoint(tmp_path / "model", family, full=True, tokenizer=tokenizer)
    assert {
        t.shape[0] for t in plan.tensors if "embed" in t.name and "proj" not in t.name and len(t.shape) == 2
    } == rows


def test_full_qwen4_exp_has_the_published_multipliers(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth.shutil, "disk_usage", lambda _: DiskUsage(1 << 50, 0, 1 << 50))
    monkeypatch.setattr(synth, "_write_files", lambda *_: None)
    plan = write_checkpoint(tmp_path / "model", "qwen4_exp", full=True, tokenizer=tokenizer)
    (found,) = [tensor.values for tensor in plan.tensors if tensor.name.endswith("layer_multipliers")]
    assert found is not None
    numbers = [int.from_bytes(found[i : i + 8], "little") for i in range(0, 24, 8)]
    assert numbers == [23703573157769, 20109073645365, 8052911324071]


@pytest.mark.parametrize("family", ["deepseek_v41", "engram", "qwen4_exp"])
def test_size_is_met_from_above_within_a_hundredth(
    tmp_path: Path, family: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "_write_files", lambda *_: None)
    plan = write_checkpoint(tmp_path / "model", family, table_bytes=512 << 20, tokenizer=tokenizer)
    assert 512 << 20 <= plan.table_bytes < (512 << 20) * 1.01


@pytest.mark.parametrize("name", ["deepseek_v41", "engram-fp16", "qwen4_exp-fp8"])
def test_the_same_seed_gives_the_same_bytes_however_files_are_split(
    tmp_path: Path, name: str, tokenizer: Tokenizer
) -> None:
    write(tmp_path / "a", name, tokenizer, seed=3)
    write(tmp_path / "b", name, tokenizer, seed=3, file_bytes=1 << 30)
    write(tmp_path / "c", name, tokenizer, seed=4)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 1
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")
    assert all_bytes(tmp_path / "a") != all_bytes(tmp_path / "c")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F16", "F32"])
def test_values_over_many_blocks_are_finite_and_never_repeat_a_block(dtype: str) -> None:
    exponent = FLOATS[dtype][2] if dtype in FLOATS else 0
    torch_dtype = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    blocks = [bytes(block) for block in tensor_blocks(PlannedTensor("t", dtype, (3 << 20, 3), exponent), seed=1)]
    assert len(set(blocks)) == len(blocks) >= 3
    for block in blocks:
        assert torch.frombuffer(bytearray(block), dtype=torch_dtype[dtype]).float().isfinite().all()


def test_memory_stays_under_300_mib_while_400_mib_are_written(tmp_path: Path) -> None:
    # VmHWM, because ru_maxrss begins with what the parent had at the fork, and pytest has torch loaded.
    code = (
        "import sys\n"
        "from tierstore.tools.synth import write_checkpoint\n"
        "write_checkpoint(sys.argv[1], 'engram', table_bytes=400 << 20, layers=(1,))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "model")]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert 0 < int(printed) * 1024 < 300 << 20


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="holds 1 files"):
        write(tmp_path, "engram-fp32", tokenizer)
    with pytest.raises(ConfigError, match="is a file"):
        write(tmp_path / "mine", "engram-fp32", tokenizer)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"mine": "kept"}


def test_a_full_disk_is_refused_with_both_numbers_before_anything_is_written(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write(tmp_path / "measured", "engram-fp32", tokenizer)
    needed = plan.total_bytes + synth.SPARE_DISK_BYTES
    monkeypatch.setattr(synth.shutil, "disk_usage", lambda _: DiskUsage(1 << 40, 0, needed - 1))
    with pytest.raises(BudgetError, match=rf"\({needed} bytes\).*\({needed - 1} bytes\)"):
        write(tmp_path / "model", "engram-fp32", tokenizer)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(synth.shutil, "disk_usage", lambda _: DiskUsage(1 << 40, 0, needed))
    write(tmp_path / "model", "engram-fp32", tokenizer)


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, BudgetError), (errno.EIO, ConfigError)])
def test_a_failure_at_any_block_is_named_and_leaves_an_empty_folder(
    tmp_path: Path, code: int, error: type[Exception], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_blocks = synth.tensor_blocks
    failed = 0
    for fail_at in range(100):
        calls = 0

        def blocks(tensor: PlannedTensor, seed: int, fail_at: int = fail_at) -> Any:
            nonlocal calls
            calls += 1
            if calls > fail_at:
                raise OSError(code, os.strerror(code))
            yield from real_blocks(tensor, seed)

        monkeypatch.setattr(synth, "tensor_blocks", blocks)
        try:
            write(tmp_path / "model", "deepseek_v41", tokenizer)
        except error:
            failed += 1
            assert not list((tmp_path / "model").iterdir())
            continue
        break
    assert failed == 12  # each of the tensors once, and then the checkpoint was whole
    read_model(Checkpoint.open(tmp_path / "model"))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("hy_v4", {"rows_per_head": 100}, "'hy_v4' is not known"),
        ("longcat", {"rows_per_head": 100, "layers": (1,)}, "longcat has one table, of layer 0"),
        ("engram", {}, "exactly one"),
        ("engram", {"rows_per_head": 100, "full": True}, "exactly one"),
        ("engram", {"rows_per_head": 15}, "15 rows per head"),
        (
            "engram",
            {"table_bytes": 1000},
            r"1000 bytes are 0 rows for each of \d+ heads; give at least \d+ bytes, which are 16",
        ),
        ("engram", {"rows_per_head": 100, "dtype": "fp8"}, "dtype 'fp8'.*fp32, fp16, bf16"),
        ("engram", {"rows_per_head": 100, "parts": 2}, "parts 2"),
        ("engram", {"rows_per_head": 100, "layers": ()}, "layers"),
        ("engram", {"rows_per_head": 100, "layers": (-1,)}, "layers"),
        ("deepseek_v41", {"rows_per_head": 100, "dim": 48}, "dim 48 is not a multiple of 32"),
        ("qwen4_exp", {"rows_per_head": 100, "hidden": 0}, "dim 160, hidden 0, parts 128"),
        ("engram", {"rows_per_head": 100, "layers": (1, -2)}, "layers 1, -2, dim 64"),
        ("engram", {"rows_per_head": 100, "dim": 65533}, "262132 bytes, a page holds up to 262128"),
        ("qwen4_exp", {"rows_per_head": 100, "file_bytes": 0}, "file_bytes 0"),
    ],
)
def test_sizes_that_make_no_checkpoint_are_refused(
    tmp_path: Path, family: str, options: dict[str, Any], message: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "model", family, tokenizer=tokenizer, **options)
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        write_checkpoint(tmp_path / "model", "engram", rows_per_head=50, tokenizer=tmp_path)


def test_a_given_tokenizer_decides_the_vocabulary(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_checkpoint(tmp_path / "model", "engram", rows_per_head=50, dim=8, tokenizer=tmp_path / "tokenizer.json")
    written = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert written.get_vocab() == tokenizer.get_vocab()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == tokenizer.get_vocab_size()
