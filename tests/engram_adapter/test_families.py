"""Checkpoints in each family's layout, written by the real safetensors library: the right planes, or a named error."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import plain_hash_oracle as oracle
from support.repository import REPOSITORY
from tokenizers import Tokenizer, models

import tierstore
from engram_adapter.families import Model, plain_source, read_model
from engram_adapter.hash_spec import HashSpec
from tierstore.errors import ConfigError, FormatError
from tierstore.formats.checkpoint import Checkpoint, PlaneReader, TableSource
from tierstore.offline.build import build_store

WORDS = [
    "<pad>",
    "a",
    "A",
    "b",
    "B",
    "c",
    " a",
    "d",
    "é",
    "e",
]  # a and A, b and B, " a", é and e fall together: 5 ids + pad
COMPRESSED = [0, 1, 1, 2, 2, 3, 1, 4, 5, 5]
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Draft:
    """A checkpoint about to be written, so that a test may damage it first. `rows` is what each table must read as."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    codec: str = ""

    def write(self, folder: Path, files: int = 1, tokenizer: bool = True) -> Checkpoint:
        (folder / "config.json").write_text(json.dumps(self.config))
        if tokenizer:
            vocabulary = {word: index for index, word in enumerate(WORDS)}
            Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")).save(str(folder / "tokenizer.json"))
        names = list(self.tensors)
        weight_map = {name: f"model-{index % files}.safetensors" for index, name in enumerate(names)}
        for file in sorted(set(weight_map.values())):
            save_file(
                {name: self.tensors[name].contiguous() for name in names if weight_map[name] == file}, folder / file
            )
        if files > 1:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return Checkpoint.open(folder)


def random_bytes(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def v41_draft(prefix: str = "", nested: bool = True) -> Draft:
    text = {
        "engram_layer_ids": [1, 3], "engram_vocab_size": 20, "engram_max_ngram_size": 3, "engram_n_heads": 2,
        "engram_head_dim": 64, "engram_compressed_vocab_size": 6, "engram_pad_token_id": 0, "vocab_size": 10,
    }  # fmt: skip
    numbers = oracle.engram_numbers([1, 3], [20, 20], 2, 6)
    text["engram_num_embeddings"] = [sum(numbers[layer].moduli) for layer in (1, 3)]
    draft = Draft({"text_config": text} if nested else text, {"embed.weight": torch.zeros(10, 4)})
    draft.codec = "fp8_e4m3_e8m0x32"
    for layer in (1, 3):
        num_rows, name = sum(numbers[layer].moduli), f"{prefix}layers.{layer}.engram.embed"
        values, scales = random_bytes(layer, num_rows, 64), random_bytes(layer + 50, num_rows, 2)
        draft.tensors[f"{name}.weight"] = values.view(torch.float8_e4m3fn)
        draft.tensors[f"{name}.scale"] = scales.view(torch.float8_e8m0fnu)
        draft.tensors[f"{prefix}layers.{layer}.engram.wkv.weight"] = random_bytes(0, 4, 4).view(torch.float8_e4m3fn)
        draft.rows[f"layers.{layer}"] = torch.cat([values, scales], dim=1)
    return draft


def published_draft(dtype: str = "F32") -> Draft:
    config = {
        "engram_vocab_size": [20, 30], "max_ngram_size": 3, "n_embed_per_ngram": 16, "n_head_per_ngram": 2,
        "layer_ids": [1, 2], "pad_id": 0, "seed": 3, "kernel_size": 4,
    }  # fmt: skip
    draft = Draft(config, {}, codec={"F32": "fp32", "F16": "fp16", "BF16": "bf16"}[dtype])
    for layer, numbers in oracle.engram_numbers([1, 2], [20, 30], 2, 6, seed=3).items():
        weight = torch.randn(sum(numbers.moduli), 8, generator=torch.Generator().manual_seed(layer)).to(FLOATS[dtype])
        name = f"backbone.layers.{layer}.engram.multi_head_embedding"
        draft.tensors[f"{name}.embedding.weight"] = weight
        draft.tensors[f"{name}.offsets"] = torch.tensor(numbers.offsets)
        draft.rows[f"layers.{layer}"] = as_bytes(weight)
    return draft


def qwen_draft(dtype: str = "BF16", parts: int | None = 12) -> Draft:
    """Twelve shards, so that their order by number is not their order by name; None for one unsharded tensor."""
    text = {
        "ple_layer_ids": [2, 4], "ple_embed_dim": 32, "ngram_size": 3, "heads_per_ngram": 2,
        "ngram_vocab_size_base": 30, "make_ngram_vocab_size_divisible_by": 24, "seed": 7, "vocab_size": 19,
        "eos_token_id": [5, 6],
    }  # fmt: skip
    draft = Draft(
        {"text_config": text, "vocab_size": 3}, {}, codec={"BF16": "bf16", "F16": "fp16", "F32": "fp32"}.get(dtype, "")
    )
    if parts is not None:
        text["split_ngram_parts"] = parts
    for layer, numbers in oracle.qwen_numbers([1, 3], 30, 3, 2, 19, 7).items():
        num_rows, name = -(-sum(numbers.moduli) // 24) * 24, f"model.language_model.layers.{layer}.ple.ple_embedding"
        if dtype == "F8_E4M3":
            weight = random_bytes(layer, num_rows, 8).view(torch.float8_e4m3fn)
            draft.tensors[f"{name}.ngram_embedding.weight_scale"] = torch.tensor(0.375)
            draft.codec = f"fp8_e4m3*{(0.375).hex()}"
        else:
            weight = torch.randn(num_rows, 8, generator=torch.Generator().manual_seed(layer)).to(FLOATS[dtype])
        if parts is None:
            draft.tensors[f"{name}.ngram_embedding.weight"] = weight
        else:
            for index, part in enumerate(weight.view(torch.uint8).chunk(parts)):
                draft.tensors[f"{name}.ngram_embedding.shard_{index}.weight"] = part.view(weight.dtype)
        draft.tensors[f"{name}.layer_multipliers"] = torch.tensor(numbers.multipliers)
        draft.tensors[f"{name}.ngram_heads_vocab_sizes"] = torch.tensor(numbers.moduli)
        draft.tensors[f"{name}.ngram_heads_offsets"] = torch.tensor(numbers.offsets)
        draft.rows[f"layers.{layer}"] = as_bytes(weight)
    return draft


LAYOUTS: dict[str, tuple[str, Callable[[], Draft]]] = {
    "v41": ("deepseek_v41", v41_draft),
    "v41-prefixed-flat": ("deepseek_v41", lambda: v41_draft("model.language_model.", nested=False)),
    "engram-f32": ("engram", published_draft),
    "engram-f16": ("engram", lambda: published_draft("F16")),
    "engram-bf16": ("engram", lambda: published_draft("BF16")),
    "qwen-bf16": ("qwen4_exp", qwen_draft),
    "qwen-f16-unsharded": ("qwen4_exp", lambda: qwen_draft("F16", None)),
    "qwen-f32": ("qwen4_exp", lambda: qwen_draft("F32", 3)),
    "qwen-fp8": ("qwen4_exp", lambda: qwen_draft("F8_E4M3")),
    "qwen-fp8-unsharded": ("qwen4_exp", lambda: qwen_draft("F8_E4M3", None)),
}


def rows_of(source: TableSource) -> np.ndarray:
    with PlaneReader(source) as reader:
        return np.concatenate(reader.read(0, source.spec.num_rows), axis=1)


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> tuple[str, Draft]:
    family, make = LAYOUTS[request.param]
    return family, make()


@pytest.mark.parametrize("files", [1, 3])
def test_planes_read_as_the_checkpoints_rows(layout: tuple[str, Draft], files: int, tmp_path: Path) -> None:
    family, draft = layout
    model = read_model(draft.write(tmp_path, files))
    assert (model.family, model.hash_spec.family) == (family, family)
    assert [source.spec.name for source in model.sources] == list(draft.rows)
    for source in model.sources:
        assert source.spec.codec == draft.codec
        assert source.spec.moduli == model.hash_spec.moduli(source.spec.name)
        assert source.spec.offsets == model.hash_spec.offsets(source.spec.name)
        assert source.spec.fingerprint == model.hash_spec.fingerprint(source.spec.name)
        np.testing.assert_array_equal(rows_of(source), draft.rows[source.spec.name].numpy())


def expected_row_ids(model: Model, tokens: list[int], layer: int) -> list[list[int]]:
    if model.family == "qwen4_exp":
        numbers = oracle.qwen_numbers([1, 3], 30, 3, 2, 19, 7)[layer]
        return oracle.row_ids_of(oracle.keys_of(list(tokens), numbers.multipliers, 5, 5), numbers)
    bases, seed = ([20, 20], 0) if model.family == "deepseek_v41" else ([20, 30], 3)
    numbers = oracle.engram_numbers(list(model.hash_spec.layers), bases, 2, 6, seed)[layer]
    mapped: list[int | None] = [COMPRESSED[token] for token in tokens]
    return oracle.row_ids_of(oracle.keys_of(mapped, numbers.multipliers, COMPRESSED[0]), numbers)


def test_a_built_store_gives_back_its_hash_and_the_rows_of_every_token(
    layout: tuple[str, Draft], tmp_path: Path
) -> None:
    draft = layout[1]
    checkpoint = draft.write(tmp_path)
    model = read_model(checkpoint)
    attachments = model.hash_spec.attachments()
    build_store(tmp_path / "store", model.sources, origin=checkpoint.to_dict(), attachments=attachments, jobs=1)
    tokens = [0, 1, 2, 9, 5, 5, 3, 0, 0, 8, 4]
    with tierstore.open(tmp_path / "store", dram="64MiB") as store:
        spec = HashSpec.from_store(store)
        assert spec.attachments() == attachments
        for name, rows in draft.rows.items():
            row_ids = expected_row_ids(model, tokens, int(name.removeprefix("layers.")))
            assert spec.row_ids([tokens], name).tolist() == [row_ids]
            found = store[name].lookup(spec.keys([tokens], name)[0])
            np.testing.assert_array_equal(found, rows.numpy()[np.array(row_ids)])


def test_a_scale_plane_may_be_kept_as_plain_bytes(tmp_path: Path) -> None:
    draft = v41_draft()
    draft.tensors = {n: as_bytes(t) if n.endswith("embed.scale") else t for n, t in draft.tensors.items()}
    for source in read_model(draft.write(tmp_path)).sources:
        np.testing.assert_array_equal(rows_of(source), draft.rows[source.spec.name].numpy())


def test_tensor_names_decide_where_a_config_has_the_keys_of_two_families(tmp_path: Path) -> None:
    for index, (draft, family) in enumerate([(v41_draft(nested=False), "deepseek_v41"), (published_draft(), "engram")]):
        both = (v41_draft(nested=False).config | published_draft().config) | draft.config
        folder = tmp_path / str(index)
        folder.mkdir()
        draft.config = both | {"seed": 0} if family == "deepseek_v41" else both
        assert read_model(draft.write(folder)).family == family


def test_a_named_family_overrides_what_is_found(tmp_path: Path) -> None:
    checkpoint = v41_draft().write(tmp_path)
    assert read_model(checkpoint, "deepseek_v41").family == "deepseek_v41"
    with pytest.raises(ConfigError, match=r"qwen4_exp.*ple_layer_ids"):
        read_model(checkpoint, "qwen4_exp")
    with pytest.raises(ConfigError, match="'deepseek' is not known; there are deepseek_v41"):
        read_model(checkpoint, "deepseek")


def test_a_checkpoint_of_no_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of no known family"):
        read_model(Draft({"model_type": "llama"}, {"embed.weight": torch.zeros(3, 4)}).write(tmp_path))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_model(Checkpoint.open(tmp_path / "model-0.safetensors"))


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    checkpoint = v41_draft().write(tmp_path, tokenizer=False)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        read_model(checkpoint)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        read_model(checkpoint)


def test_a_tokenizer_of_another_count_stops_with_both_numbers(tmp_path: Path) -> None:
    draft = v41_draft()
    draft.config["text_config"]["engram_compressed_vocab_size"] = 7
    with pytest.raises(ConfigError, match=r"engram_compressed_vocab_size is 7.* 6 distinct"):
        read_model(draft.write(tmp_path))


Damage = Callable[[Draft], Any]


def replaced(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Changes the first tensor whose name ends so."""

    def damage(draft: Draft) -> None:
        name = next(name for name in draft.tensors if name.endswith(suffix))
        draft.tensors[name] = change(draft.tensors[name])

    return damage


def without(suffix: str) -> Damage:
    return lambda draft: draft.tensors.pop(next(name for name in draft.tensors if name.endswith(suffix)))


def with_config(**values: Any) -> Damage:
    return lambda draft: draft.config.get("text_config", draft.config).update(values)


def off_by_two(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[1] += 2
    return changed


def twice(draft: Draft) -> None:
    name = next(iter(draft.rows)) + ".engram.embed.weight"
    draft.tensors[f"mtp.{name}"] = draft.tensors[name].clone()


DAMAGED: list[tuple[Callable[[], Draft], str, Damage, str]] = [
    (v41_draft, "no weight", without("1.engram.embed.weight"), r"no such tensor \(layers\.1\.engram\.embed\.weight\)"),
    (v41_draft, "no scale", without("layers.3.engram.embed.scale"), r"layers.3.engram.embed.scale is missing"),
    (v41_draft, "two weights", twice, r"several such tensors: .*mtp"),
    (
        v41_draft,
        "weight of bytes",
        replaced("1.engram.embed.weight", as_bytes),
        r"is U8 .* with a scale beside it .* quantized or packed",
    ),
    (v41_draft, "weight of one dimension", replaced("1.engram.embed.weight", torch.flatten), r"of 2 dimensions"),
    (v41_draft, "scale of floats", replaced("1.engram.embed.scale", lambda t: t.float()), r"is F32 .*F8_E8M0"),
    (v41_draft, "a row less", replaced("3.engram.embed.weight", lambda t: t[:-1]), r"embed.scale is \[\d+, 2\].*needs"),
    (v41_draft, "few scales", replaced("1.engram.embed.scale", lambda t: t[:, :1]), r"\[\d+, 1\].*needs \[\d+, 2\]"),
    (v41_draft, "other width", with_config(engram_head_dim=128), r"engram_head_dim 128, .*make 64"),
    (v41_draft, "other row counts", with_config(engram_num_embeddings=[5, 6]), r"engram_num_embeddings .*\[5, 6\]"),
    (
        v41_draft,
        "other base",
        with_config(engram_vocab_size=24, engram_num_embeddings=None),
        r"hold \d+ rows .*has \d+ rows",
    ),
    (
        published_draft,
        "no weight",
        without("layers.2.engram.multi_head_embedding.embedding.weight"),
        r"no such tensor \(layers\.2\.\[\.\.\.\]\.multi_head_embedding\.embedding\.weight\)",
    ),
    (
        published_draft,
        "a row more",
        replaced(".weight", lambda t: torch.cat([t, t[:1]])),
        r"hold \d+ rows .*has \d+ rows",
    ),
    (published_draft, "weight of doubles", replaced(".weight", lambda t: t.double()), r"is F64 .*expected F32"),
    (
        published_draft,
        "other offsets",
        replaced(".offsets", off_by_two),
        r"offsets has 4 values, \(\d+,\) at 1;.*\(\d+,\)",
    ),
    (published_draft, "offsets of int32", replaced(".offsets", lambda t: t.int()), r"is I32, expected I64"),
    (published_draft, "few offsets", replaced(".offsets", lambda t: t[:-1]), r"has 3 values.*gives 4"),
    (published_draft, "other width", with_config(n_embed_per_ngram=32), r"n_embed_per_ngram 32, .*make 16"),
    (
        qwen_draft,
        "no first shard",
        without("1.ple.ple_embedding.ngram_embedding.shard_0.weight"),
        r"no such tensor \(layers\.1\.ple\.ple_embedding\.ngram_embedding\.weight or \.shard_0\.weight\)",
    ),
    (qwen_draft, "no middle shard", without("shard_5.weight"), r"11 tensors .*split_ngram_parts 12"),
    (qwen_draft, "no last shard", without("shard_11.weight"), r"11 tensors .*split_ngram_parts 12"),
    (qwen_draft, "other parts", with_config(split_ngram_parts=13), r"12 tensors .*split_ngram_parts 13"),
    (qwen_draft, "a row less", replaced("shard_11.weight", lambda t: t[:-1]), r"hold \d+ rows .*has \d+ rows"),
    (qwen_draft, "a shard of another type", replaced("shard_3.weight", lambda t: t.half()), r"F16 .*BF16"),
    (qwen_draft, "a shard of another width", replaced("shard_3.weight", lambda t: t[:, :4]), r"4 columns.* 8"),
    (qwen_draft, "doubles", replaced("shard_0.weight", lambda t: t.double()), r"is F64 .*expected"),
    (
        qwen_draft,
        "other multipliers",
        replaced("layer_multipliers", off_by_two),
        r"layer_multipliers .*\(\d+,\).*\(\d+,\)",
    ),
    (qwen_draft, "other moduli", replaced("ngram_heads_vocab_sizes", off_by_two), r"ngram_heads_vocab_sizes has 4"),
    (qwen_draft, "other offsets", replaced("ngram_heads_offsets", off_by_two), r"ngram_heads_offsets has 4"),
    (qwen_draft, "other width", with_config(ple_embed_dim=64), r"ple_embed_dim 64, .*make 32"),
    (qwen_draft, "other seed", with_config(seed=8), r"layer_multipliers .*another hash"),
    (LAYOUTS["qwen-fp8"][1], "no scale", without("weight_scale"), r"weight_scale is missing"),
    (LAYOUTS["qwen-fp8"][1], "two scales", replaced("weight_scale", lambda t: t.repeat(2)), r"F32 \[2\]"),
    (LAYOUTS["qwen-fp8"][1], "double scale", replaced("weight_scale", lambda t: t.double()), r"F64"),
    (LAYOUTS["qwen-fp8"][1], "NaN scale", replaced("weight_scale", lambda t: t * float("nan")), r"is nan"),
    (LAYOUTS["qwen-fp8"][1], "zero scale", replaced("weight_scale", lambda t: t * 0), r"is 0\.0"),
]


@pytest.mark.parametrize(
    ("make", "damage", "message"),
    [pytest.param(make, damage, message, id=f"{make().codec}-{name}") for make, name, damage, message in DAMAGED],
)
def test_a_checkpoint_that_contradicts_itself_is_refused_with_its_numbers(
    make: Callable[[], Draft], damage: Damage, message: str, tmp_path: Path
) -> None:
    draft = make()
    damage(draft)
    with pytest.raises(ConfigError, match=message):
        read_model(draft.write(tmp_path))


def test_shards_without_a_stated_count_must_still_run_from_zero_without_gaps(tmp_path: Path) -> None:
    draft = qwen_draft()
    del draft.config["text_config"]["split_ngram_parts"]
    without("shard_5.weight")(draft)
    with pytest.raises(ConfigError, match=r"shard_5.weight is missing"):
        read_model(draft.write(tmp_path))


def test_hash_buffers_may_be_absent(tmp_path: Path) -> None:
    for index, draft in enumerate([qwen_draft(), published_draft()]):
        kept = {name: tensor for name, tensor in draft.tensors.items() if name.endswith("weight")}
        whole, without = tmp_path / f"{index}-whole", tmp_path / f"{index}-without"
        whole.mkdir()
        without.mkdir()
        specs = [
            read_model(d.write(f)).sources[0].spec for d, f in ((draft, whole), (Draft(draft.config, kept), without))
        ]
        assert specs[0] == specs[1]


@pytest.mark.parametrize(
    ("dtype", "codec"),
    [
        (torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32"), (torch.float8_e4m3fn, "fp8_e4m3"),
        (torch.float64, "raw"), (torch.int64, "raw"), (torch.uint8, "raw"), (torch.float8_e5m2, "raw"),
    ],
    ids=str,
)  # fmt: skip
def test_any_2d_tensor_is_a_plain_table_with_the_codec_of_its_dtype(
    dtype: torch.dtype, codec: str, tmp_path: Path
) -> None:
    tensor = random_bytes(1, 7, 5 * dtype.itemsize).view(dtype)
    save_file({"some.table": tensor, "other": torch.zeros(3)}, tmp_path / "one.safetensors")
    source = plain_source(Checkpoint.open(tmp_path / "one.safetensors"), "some.table")
    spec = source.spec
    assert (spec.name, spec.num_rows, spec.dim, spec.codec) == ("some.table", 7, 5, codec)
    assert (spec.orders, spec.moduli, spec.is_plain, spec.row_bytes) == ((1,), (7,), True, 5 * dtype.itemsize)
    np.testing.assert_array_equal(rows_of(source), as_bytes(tensor).numpy())


def test_what_is_no_2d_tensor_is_refused_with_those_there_are(tmp_path: Path) -> None:
    tensors = {
        "flat": torch.zeros(6),
        "cube": torch.zeros(2, 2, 2),
        "table": torch.zeros(2, 3),
        "none": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / "one.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "one.safetensors")
    for name, found in (("flat", r"\[6\]"), ("cube", r"\[2, 2, 2\]"), ("nowhere", "missing")):
        with pytest.raises(ConfigError, match=rf"'{name}' is of shape {found}.*table|'{name}' is {found}.*table"):
            plain_source(checkpoint, name)
    with pytest.raises(ConfigError, match="'none' is empty, 0 x 3"):
        plain_source(checkpoint, "none")


def renamed(pattern: str, replacement: str) -> Damage:
    """Gives every tensor the name that a conversion gives it."""

    def damage(draft: Draft) -> None:
        draft.tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in draft.tensors.items()}

    return damage


def scales_of_parts(*scales: float) -> Damage:
    """Gives each part of the first layer's table a scale of its own, in turn, and takes the table's away."""

    def damage(draft: Draft) -> None:
        for name in [name for name in draft.tensors if name.endswith("ngram_embedding.weight_scale")]:
            prefix = name.removesuffix("weight_scale")
            parts = [part for part in draft.tensors if part.startswith(f"{prefix}shard_")]
            for index, part in enumerate(sorted(parts)):
                draft.tensors[part.replace(".weight", ".weight_scale")] = torch.tensor([scales[index % len(scales)]])
            del draft.tensors[name]

    return damage


SPELLINGS: list[tuple[str, Damage]] = [
    ("qwen-bf16", renamed(r"model\.language_model\.(.*)\.shard_(\d+)\.", r"language_model.model.\1.shards.\2.")),
    ("qwen-fp8", renamed(r"\.shard_(\d+)\.", r".shards.\1.")),
    ("qwen-fp8", renamed("weight_scale$", "weight_scale_inv")),
    ("qwen-fp8-unsharded", renamed("weight_scale$", "weight_scale_inv")),
    ("qwen-fp8-unsharded", replaced("weight_scale", lambda t: t.bfloat16().reshape(1))),
    ("qwen-fp8", scales_of_parts(0.375)),
    ("v41", renamed(r"embed\.scale$", "embed.weight_scale_inv")),
    ("v41", renamed(r"embed\.scale$", "embed.weight_scale")),
]


@pytest.mark.parametrize(("layout", "spell"), SPELLINGS)
def test_other_spellings_of_a_family_give_the_same_rows_and_codec(layout: str, spell: Damage, tmp_path: Path) -> None:
    draft = LAYOUTS[layout][1]()
    spell(draft)
    for source in read_model(draft.write(tmp_path)).sources:
        assert source.spec.codec == draft.codec
        np.testing.assert_array_equal(rows_of(source), draft.rows[source.spec.name].numpy())


def test_parts_with_scales_that_differ_are_refused_with_both(tmp_path: Path) -> None:
    draft = LAYOUTS["qwen-fp8"][1]()
    scales_of_parts(0.375, 0.5)(draft)
    with pytest.raises(
        ConfigError, match=r"shard_\d+\.weight is stored as fp8_e4m3\*0x1\.0.*0x1\.8.*scales of their own"
    ):
        read_model(draft.write(tmp_path))


def test_a_packed_table_is_refused_by_what_packed_it(tmp_path: Path) -> None:
    draft = qwen_draft(parts=None)
    for name in [name for name in draft.tensors if name.endswith("ngram_embedding.weight")]:
        draft.tensors[name] = as_bytes(draft.tensors[name]).view(torch.uint32)
        draft.tensors[name.replace(".weight", ".scales")] = torch.ones(len(draft.tensors[name]), 1)
        draft.tensors[name.replace(".weight", ".biases")] = torch.ones(len(draft.tensors[name]), 1)
    with pytest.raises(ConfigError, match=r"ngram_embedding\.weight is packed by MLX"):
        read_model(draft.write(tmp_path))


def test_families_are_known_to_a_program_that_imports_the_hash_alone() -> None:
    code = "from engram_adapter import HashSpec\ntry: HashSpec.from_config({})\nexcept Exception as error: print(error)"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert all(family in run.stdout for family in ("deepseek_v41", "engram", "qwen4_exp")), run


@pytest.mark.parametrize("where", ["top", "text"])
def test_a_model_whose_layout_is_not_public_is_refused_though_its_keys_look_known(tmp_path: Path, where: str) -> None:
    draft = v41_draft()
    (draft.config if where == "top" else draft.config["text_config"])["model_type"] = "hy_v4_flash"
    with pytest.raises(ConfigError, match=r"type hy_v4_flash have no family here: .*not public .* --tensor"):
        read_model(draft.write(tmp_path))
    with pytest.raises(ConfigError, match="type hy_v4_flash"):
        HashSpec.from_config(draft.config)
    with pytest.raises(ConfigError, match="type hy_v4_flash"):
        HashSpec.from_config(v41_draft().config, family="hy_v4_flash")
