"""Folders of a real layout, damaged, renamed, half downloaded and mixed:
each is built right or refused by its true cause.

A seed draws a checkpoint in a family's layout, harmless oddities and at most one fault, which knows what must be said
of it. Rows are held against the tensors as torch had them, and files are written by the safetensors library.
TIERSTORE_SOAK=1 draws 200 folders instead of 32.
"""

from __future__ import annotations

import collections
import gzip
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import tierstore
from engram_adapter import build_checkpoint
from tierstore.tools.synth import write_checkpoint

FOLDERS = 200 if os.environ.get("TIERSTORE_SOAK") == "1" else 32
WORDS = ["<pad>", "a", "A", "b", " a", "c", "d", "e", "f", "é", *(f"w{i}" for i in range(30))]
LAYOUTS: dict[str, dict[str, Any]] = {
    "deepseek_v41": {"dim": 64},
    "engram-fp32": {"dim": 16},
    "engram-bf16": {"dim": 16, "dtype": "bf16"},
    "qwen4_exp-bf16": {"dim": 16, "parts": 8},
    "qwen4_exp-fp8": {"dim": 16, "parts": 8, "dtype": "fp8"},
}
PLAIN = {"plain-bf16": torch.bfloat16, "plain-fp8": torch.float8_e4m3fn}  # a table that is taken with --tensor
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 2206408\n"
PAGE = b"<!DOCTYPE html><html><head><title>Access denied</title></head></html>"


@dataclass
class Folder:
    """A checkpoint about to be written. file_of: which file each tensor goes to; rows: what the table must read as."""

    rng: np.random.Generator
    path: Path
    layout: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    rows: np.ndarray = field(default_factory=lambda: np.empty(0))
    tensor: str | None = None
    file_of: dict[str, str] = field(default_factory=dict)
    has_index: bool = True
    done: list[str] = field(default_factory=list)

    @property
    def is_hashed(self) -> bool:
        """Whether the rows depend on a token map."""
        return self.layout not in PLAIN and not self.layout.startswith("qwen")

    @property
    def text(self) -> dict[str, Any]:
        """The part of config.json that has the family's keys."""
        found: dict[str, Any] = self.config.get("text_config", self.config)
        return found

    @property
    def table_names(self) -> list[str]:
        """The tensors that the table's rows come from, in the order of its rows, values before scales."""
        names = [name for name in self.tensors if re.search(r"(embed|embedding|shards?[_.]\d+)\.weight$", name)]
        names = [name for name in names if "engram" in name or "ple" in name]
        return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])

    @property
    def scale_names(self) -> list[str]:
        return [name for name in self.tensors if re.search(r"embed(ding)?\.(weight_)?scale(_inv)?$", name)]

    @property
    def needed(self) -> list[str]:
        """The files that hold the table."""
        return sorted({self.file_of[name] for name in self.table_names + self.scale_names})

    @property
    def unneeded(self) -> list[str]:
        buffers = {self.file_of[name] for name in self.tensors if "ple_embedding" in name or "offsets" in name}
        return sorted(set(self.file_of.values()) - set(self.needed) - buffers)

    @property
    def index(self) -> Path:
        return self.path / "model.safetensors.index.json"

    def pick(self, of: list[str]) -> str:
        return of[int(self.rng.integers(len(of)))]

    def rename(self, pattern: str, replacement: str) -> None:
        self.tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in self.tensors.items()}

    def rewrite_index(self, change: Callable[[dict[str, str]], object]) -> None:
        index = json.loads(self.index.read_text())
        change(index["weight_map"])
        self.index.write_text(json.dumps(index))

    def write(self) -> None:
        """Spreads the tensors over some files in random order, so that table and rest share some of them."""
        self.path.mkdir()
        count = int(self.rng.integers(2, 6))
        names = [f"model-{i + 1:05d}-of-{count + 1:05d}.safetensors" for i in range(count + 1)]
        self.file_of = {name: names[int(self.rng.integers(count))] for name in self.tensors}
        self.file_of["lm_head.weight"] = names[count]  # one file has nothing of the table, one surely has
        for file in set(self.file_of.values()):
            held = {name: tensor for name, tensor in self.tensors.items() if self.file_of[name] == file}
            save_file(held, self.path / file)
        (self.path / "config.json").write_text(json.dumps(self.config))
        Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>")).save(
            str(self.path / "tokenizer.json")
        )
        self.index.write_text(json.dumps({"metadata": {"total_size": 5}, "weight_map": self.file_of}))


def loaded(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, as copies: the library maps it, and it may be written over next."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Config and tensors of each layout, once; tests copy what they change."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    found = {}
    for layout, options in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("base") / layout
        family = layout.partition("-")[0]
        write_checkpoint(folder, family, rows_per_head=60, layers=[1], hidden=8, tokenizer=tokenizer, **options)
        tensors = {}
        for file in folder.glob("*.safetensors"):
            tensors |= loaded(file)
        found[layout] = (json.loads((folder / "config.json").read_text()), tensors)
    for layout, dtype in PLAIN.items():
        prefix, codes = (
            "model.layers.0.ple.table_embedding.",
            torch.randn(1200, 16, generator=torch.Generator().manual_seed(0)),
        )
        tensors = {f"{prefix}weight": codes.to(dtype)}
        if layout == "plain-fp8":
            tensors[f"{prefix}weight_scale"] = torch.tensor(0.0123)
        found[layout] = ({"model_type": "other", "vocab_size": 40}, tensors)
    return found


def drawn(rng: np.random.Generator, path: Path, bases: dict[str, Any]) -> Folder:
    layout = [*LAYOUTS, *PLAIN][int(rng.integers(len(LAYOUTS) + len(PLAIN)))]
    config, tensors = bases[layout]
    folder = Folder(rng, path, layout, json.loads(json.dumps(config)), {n: t.clone() for n, t in tensors.items()})
    folder.tensors |= {"lm_head.weight": torch.ones(3, 8), "model.layers.1.mlp.experts.0.w.weight": torch.ones(8, 8)}
    planes = [torch.cat([folder.tensors[name].view(torch.uint8) for name in folder.table_names])]
    if layout == "deepseek_v41":
        planes += [folder.tensors[name].view(torch.uint8) for name in folder.scale_names]
    folder.rows = torch.cat(planes, dim=1).numpy()
    return folder


# Oddities of tensors and configuration that change nothing of the rows. Each returns whether it applies.
def conversion_names(folder: Folder) -> bool:
    folder.rename(r"^model\.language_model\.", r"language_model.model.")
    folder.rename(r"\.shard_(\d+)\.", r".shards.\1.")
    return folder.layout.startswith("qwen")


def another_prefix(folder: Folder) -> bool:
    folder.rename(r"^(model\.)?(language_model\.)?layers\.", "thinker.model.layers.")
    return True


def other_scale_name(folder: Folder) -> bool:
    folder.rename(r"(embed(ding)?)\.(weight_)?scale$", r"\1.weight_scale_inv")
    return bool(folder.scale_names)


def scale_of_the_model_s_type(folder: Folder) -> bool:
    for name in folder.scale_names:
        if folder.tensors[name].numel() == 1:
            folder.tensors[name] = folder.tensors[name].bfloat16().reshape(1)
    return folder.layout.endswith("-fp8")


def padded_vocabulary(folder: Folder) -> bool:
    applies = folder.is_hashed and not folder.done
    if applies:
        folder.text["vocab_size"] += int(folder.rng.integers(1, 512))
    return applies


def deeper_configuration(folder: Folder) -> bool:
    folder.config = {"model_type": "speech", "seed": 3, "thinker_config": folder.config, "talker_config": {"seed": 4}}
    return True


# Oddities of a written folder that change nothing of the rows.
def sidecars(folder: Folder) -> bool:
    for file in list(folder.path.iterdir()):
        (folder.path / f"._{file.name}").write_bytes(bytes.fromhex("00051607") + bytes(100))
    (folder.path / ".DS_Store").write_bytes(b"\0\0\0\x01Bud1")
    return True


def other_files_beside(folder: Folder) -> bool:
    (folder.path / "model-q4.gguf").write_bytes(b"GGUF" + bytes(50))
    (folder.path / "training_args.bin").write_bytes(pickle.dumps({"lr": 1}))
    (folder.path / "README.md").write_text("# a model")
    return True


def an_older_copy_beside(folder: Folder) -> bool:
    """With an index that does not name it; without one it would be the same tensors twice."""
    if folder.has_index and folder.needed:
        name = folder.pick(folder.needed)
        tensors = {key: torch.zeros_like(tensor) for key, tensor in loaded(folder.path / name).items()}
        save_file(tensors, folder.path / f"old-{name}")
    return folder.has_index


def a_tensor_that_the_index_gives_to_another_file(folder: Folder) -> bool:
    if folder.has_index and folder.table_names:
        file = folder.path / folder.file_of["lm_head.weight"]
        save_file(loaded(file) | {folder.pick(folder.table_names): torch.zeros(3, 3)}, file)
    return folder.has_index


def an_unneeded_file_is_not_there(folder: Folder) -> bool:
    if folder.has_index and folder.unneeded:
        file = folder.path / folder.pick(folder.unneeded)
        how = int(folder.rng.integers(4))
        if how == 0:
            file.unlink()
        elif how == 1:
            file.write_bytes(POINTER)
        elif how == 2:
            file.write_bytes(file.read_bytes()[:-5])
        else:
            file.with_name(f"{file.name}.aria2").write_bytes(b"")
    return folder.has_index


def no_index(folder: Folder) -> bool:
    folder.has_index = False
    folder.index.unlink()
    return True


def a_repository_in_the_cache(folder: Folder) -> bool:
    root = folder.path.with_name("models--owner--name")
    snapshot = root / "snapshots" / ("c" * 40)
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (root / "refs" / "main").write_text("c" * 40)
    for number, file in enumerate(sorted(folder.path.iterdir())):
        file.rename(root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    folder.path = root
    return True


# Faults of tensors and configuration. Each returns what must be said, or None if it does not apply.
def a_tensor_is_missing(folder: Folder) -> str | None:
    del folder.tensors[folder.pick(folder.table_names)]
    return r"no such tensor|is missing|\d tensors .*split_ngram_parts"


def a_scale_is_missing(folder: Folder) -> str | None:
    if not folder.scale_names or folder.layout in PLAIN:
        return None  # a plain table of fp8 may have none
    del folder.tensors[folder.scale_names[0]]
    return r"scale is missing"


def a_row_is_missing(folder: Folder) -> str | None:
    if folder.layout in PLAIN:
        return None  # nothing says how many there were
    name = folder.pick(folder.table_names)
    folder.tensors[name] = folder.tensors[name][:-1].clone()
    return r"hold \d+ rows|needs \[\d+, \d+\]"


def a_part_of_another_type(folder: Folder) -> str | None:
    if not folder.layout.startswith("qwen"):
        return None
    name = folder.pick(folder.table_names)
    folder.tensors[name] = folder.tensors[name].float().half()
    return r"F16 of 16 columns|is F16"


def a_scale_for_each_column(folder: Folder) -> str | None:
    if not folder.layout.endswith("-fp8"):
        return None
    name = folder.scale_names[0]
    folder.tensors[name] = torch.full((1, folder.tensors[folder.table_names[0]].shape[1]), 0.5)
    return r"scale.* is F32 \[1, \d+\], a scale for each column"


def packed_by_another_tool(folder: Folder) -> str | None:
    for name in folder.table_names:
        folder.tensors[name] = folder.tensors[name].view(torch.uint8).reshape(-1, 1).clone()
        folder.tensors[f"{name}.absmax"] = torch.ones(40)
    return r"packed by bitsandbytes"


def another_seed(folder: Folder) -> str | None:
    if not folder.layout.startswith("qwen"):
        return None
    folder.text["seed"] = 99
    return r"layer_multipliers .*another hash"


def other_moduli(folder: Folder) -> str | None:
    if folder.layout in PLAIN:
        return None
    keys = {"deepseek_v41": "engram_vocab_size", "engram": "engram_vocab_size", "qwen4_exp": "ngram_vocab_size_base"}
    key = keys[folder.layout.partition("-")[0]]
    value = folder.text[key]
    folder.text[key] = [each + 50 for each in value] if isinstance(value, list) else value + 50
    return r"engram_num_embeddings|hold \d+ rows|ngram_heads_vocab_sizes|offsets"


def another_tokenizer(folder: Folder) -> str | None:
    if not folder.is_hashed:
        return None
    folder.text["vocab_size"] = len(WORDS) - 1
    return r"vocab_size is 39, tokenizer.json gives 40"


# Faults of a written folder.
def cut_short(folder: Folder) -> str | None:
    name = folder.pick(folder.needed)
    file = folder.path / name
    num_bytes = file.stat().st_size
    os.truncate(file, int(folder.rng.integers(num_bytes // 2, num_bytes)))
    return rf"{name}: .*(cut short|truncated)"


def of_another_kind(folder: Folder) -> str | None:
    name = folder.pick(folder.needed)
    file = folder.path / name
    contents = {
        r"Git LFS pointer.*git lfs pull": POINTER,
        r"web page": PAGE,
        r"gzip data": gzip.compress(file.read_bytes()),
        r"an empty file": b"",
        r"first bytes are zeros": bytes(5000),
        r"GGUF": b"GGUF" + bytes(500),
        r"a JSON file": json.dumps({"weight_map": {"a": "b"}}).encode(),
        r"bare Python pickle": pickle.dumps({"a": np.zeros(50), "b": [1, 2]}),
    }
    words = folder.pick(list(contents))
    file.write_bytes(contents[words])
    return rf"{name}.*{words}"


def a_header_that_lies(folder: Folder) -> str | None:
    name = folder.pick(folder.needed)
    data = (folder.path / name).read_bytes()
    (folder.path / name).write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[1,', 1))
    return rf"{name}: tensor .*(lies|starts)"


def still_downloading(folder: Folder) -> str | None:
    name = folder.pick(folder.needed)
    (folder.path / f"{name}.aria2").write_bytes(b"\0\1")
    return rf"{name}.*has not finished: {name}\.aria2"


def never_written(folder: Folder) -> str | None:
    """A file of full length, of which the part with the table's values has not come; no control file says so."""
    name = folder.table_names[0]
    file = folder.path / folder.file_of[name]
    data = file.read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    start, end = (header_bytes + at for at in json.loads(data[8:header_bytes])[name]["data_offsets"])
    hole = -(-start // 4096) * 4096, end // 4096 * 4096
    if hole[1] - hole[0] < 4096:
        return None
    with file.open("wb") as sparse:
        sparse.write(data[: hole[0]])
        sparse.seek(hole[1])
        sparse.write(data[hole[1] :])
        sparse.truncate(len(data))
    return rf"{file.name}: bytes {hole[0]} to {hole[1]}, of tensor {re.escape(name)}, were never written"


def not_downloaded(folder: Folder) -> str | None:
    name = folder.pick(folder.needed)
    (folder.path / name).unlink()
    return rf"{name}"


def renamed_to_its_part(folder: Folder) -> str | None:
    name = folder.pick(folder.needed)
    suffix = folder.pick([".part", ".crdownload", ".incomplete", ".!qB"])
    (folder.path / name).rename(folder.path / f"{name}{suffix}")
    return rf"{name}.*has not finished" if folder.has_index else rf"{name}"


def a_stale_index(folder: Folder) -> str | None:
    if not folder.has_index:
        return None
    name = folder.pick(folder.needed)
    (folder.path / name).rename(folder.path / "model-plefp8-00001.safetensors")
    folder.rewrite_index(lambda names: [names.pop(n) for n in list(names) if names[n] == name])
    return r"lies in .*model-plefp8-00001\.safetensors.*, but model\.safetensors\.index\.json does not list it"


def an_index_of_other_files(folder: Folder) -> str | None:
    if not folder.has_index or a_tensor_that_the_index_gives_to_another_file.__name__ in folder.done:
        return None
    name, other = folder.pick(folder.table_names), folder.file_of["lm_head.weight"]
    folder.rewrite_index(lambda names: names.update({name: other}))
    return (
        rf"{re.escape(name)}'? (is not in {other}, where model\.safetensors\.index\.json says|lies in {other}, which)"
    )


def a_damaged_index(folder: Folder) -> str | None:
    if not folder.has_index:
        return None
    folder.index.write_bytes(folder.index.read_bytes()[:-20])
    return r"index\.json cannot be read as JSON"


def one_rank_s_files(folder: Folder) -> str | None:
    """Every file once more for two ranks, each with half of the table's rows, as DeepSeek's convert.py leaves them."""
    for file in [*folder.path.glob("*.safetensors"), *folder.path.glob("*.aria2")]:
        file.unlink()
    if folder.has_index:
        folder.index.unlink()
    split = set(folder.table_names + folder.scale_names)
    for rank in range(2):
        halves = {
            name: tensor.chunk(2)[rank].clone() if name in split and tensor.ndim == 2 else tensor
            for name, tensor in folder.tensors.items()
        }
        save_file(halves, folder.path / f"model{rank}-mp2.safetensors")
    if folder.rng.integers(2):
        (folder.path / "model1-mp2.safetensors").unlink()
    return r"split by rank \(model0-mp2\.safetensors, model1-mp2\.safetensors\)"


def the_same_tensors_twice(folder: Folder) -> str | None:
    if folder.has_index:
        return None
    shutil.copy(folder.path / folder.needed[0], folder.path / "consolidated.safetensors")
    return rf"is in consolidated\.safetensors and again in {folder.needed[0]}, and no index says"


def no_configuration(folder: Folder) -> str | None:
    if folder.layout in PLAIN:
        return None
    (folder.path / "config.json").unlink()
    return r"no config\.json"


def no_tokenizer(folder: Folder) -> str | None:
    if not folder.is_hashed:
        return None
    (folder.path / "tokenizer.json").unlink()
    return r"there is no .*tokenizer\.json"


ODD_TENSORS = [
    conversion_names, another_prefix, other_scale_name, scale_of_the_model_s_type, padded_vocabulary,
    deeper_configuration,
]  # fmt: skip
ODD_FILES = [
    sidecars, other_files_beside, an_older_copy_beside, a_tensor_that_the_index_gives_to_another_file,
    an_unneeded_file_is_not_there,
]  # fmt: skip
BAD_TENSORS = [
    a_tensor_is_missing, a_scale_is_missing, a_row_is_missing, a_part_of_another_type, a_scale_for_each_column,
    packed_by_another_tool, another_seed, other_moduli, another_tokenizer,
]  # fmt: skip
BAD_FILES = [
    cut_short, of_another_kind, a_header_that_lies, still_downloading, never_written, not_downloaded,
    renamed_to_its_part, a_stale_index, an_index_of_other_files, a_damaged_index, one_rank_s_files,
    the_same_tensors_twice, no_configuration, no_tokenizer,
]  # fmt: skip
Act = Callable[[Folder], Any]


def some(rng: np.random.Generator, acts: list[Act], count: int) -> list[Act]:
    return [acts[i] for i in sorted(rng.permutation(len(acts))[: int(rng.integers(count + 1))])]


def do(folder: Folder, acts: list[Act]) -> str | None:
    """Does what applies; returns what the last one says."""
    said = None
    for act in acts:
        said = act(folder)
        if said:
            folder.done.append(act.__name__)
    return said


def make(folder: Folder) -> str | None:
    """Writes the folder with oddities and perhaps a fault; returns what must be said of it,
    None if it must be built."""
    rng = folder.rng
    kind = ["none", "tensors", "files", "files"][int(rng.integers(4))]
    if folder.layout in PLAIN:
        folder.tensor = folder.table_names[0]
    said = do(folder, [BAD_TENSORS[int(rng.integers(len(BAD_TENSORS)))]]) if kind == "tensors" else None
    if said is None or folder.done[0] not in ("a_tensor_is_missing", "packed_by_another_tool"):
        do(folder, some(rng, ODD_TENSORS, 2))
    if folder.tensor is not None:
        folder.tensor = ([name for name in folder.table_names if not name.endswith("absmax")] or [folder.tensor])[0]
    folder.write()
    if rng.integers(3) == 0:
        do(folder, [no_index])
    do(folder, some(rng, ODD_FILES, 2))
    if kind == "files":
        said = do(folder, [BAD_FILES[int(rng.integers(len(BAD_FILES)))]])
    if rng.integers(4) == 0:
        do(folder, [a_repository_in_the_cache])
    return said


def test_each_folder_is_built_right_or_refused_by_its_true_cause(
    bases: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(FOLDERS):
        place = tmp_path / str(seed)
        place.mkdir()
        folder = drawn(np.random.default_rng(seed), place / "model", bases)
        said = make(folder)
        what = f"seed {seed}, {folder.layout}, {', '.join(folder.done) or 'as published'}"
        try:
            build_checkpoint(folder.path, place / "store", tensor=folder.tensor, jobs=1)
            found = None
        except tierstore.TierStoreError as error:
            found = str(error)
        if said is None:
            assert found is None, f"{what}: it is whole, and was refused: {found}"
            with tierstore.open(place / "store", dram="8MiB") as store:
                [table] = store.tables.values()
                assert table.spec.num_rows == len(folder.rows), what
                rows = table.rows(np.arange(len(folder.rows))).reshape(len(folder.rows), -1)
            np.testing.assert_array_equal(rows, folder.rows, err_msg=what)
            if folder.layout.endswith("-fp8"):
                scale = folder.tensors[folder.scale_names[0]].float().item()
                assert table.spec.codec == f"fp8_e4m3*{scale.hex()}", what
        else:
            assert found is not None, f"{what}: it was built, and must be refused with {said}"
            assert re.search(said, found), f"{what}: refused with {found!r}, which is not {said!r}"
            assert not (place / "store").exists(), what
        counts["built" if said is None else "refused"] += 1
        counts.update(folder.done)
        shutil.rmtree(place)
    with capsys.disabled():
        if FOLDERS > 32:
            print(f"\n{FOLDERS} folders: {dict(counts)}")
    assert min(counts["built"], counts["refused"]) >= FOLDERS // 5
