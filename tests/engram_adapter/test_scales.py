"""A quantized tensor is built with the scales that belong to it, or refused by their name; never as bare codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engram_adapter.codecs import decode_rows
from engram_adapter.families import plain_source
from tierstore.errors import ConfigError
from tierstore.formats.checkpoint import Checkpoint, PlaneReader

ROWS, DIM = 40, 64
GENERATOR = torch.Generator().manual_seed(0)
CODES = torch.randn(ROWS, DIM, generator=GENERATOR).to(torch.float8_e4m3fn)
BYTES = torch.randint(0, 256, (ROWS, DIM), generator=GENERATOR, dtype=torch.uint8)


def values_of(folder: Path, tensors: dict[str, torch.Tensor], name: str = "embed.weight") -> torch.Tensor:
    """The values that a store of this tensor would give."""
    save_file(tensors, folder / "model.safetensors")
    source = plain_source(Checkpoint.open(folder / "model.safetensors"), name)
    with PlaneReader(source) as reader:
        rows = np.concatenate(reader.read(0, source.spec.num_rows), axis=1)
    return decode_rows(torch.from_numpy(rows), source.spec.codec, source.spec.dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("scale_name", ["weight_scale", "weight_scale_inv", "scale", "weight.scale", "scale_weight"])
def test_one_scale_multiplies_every_value(
    tmp_path: Path, scale_name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scale = torch.full(shape, 0.0123, dtype=dtype)
    expected = (CODES.float() * scale.float().reshape(())).bfloat16()
    assert torch.equal(values_of(tmp_path, {"embed.weight": CODES, f"embed.{scale_name}": scale}), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_a_power_of_two_for_32_columns_multiplies_those(tmp_path: Path, dtype: torch.dtype) -> None:
    exponents = torch.randint(110, 140, (ROWS, DIM // 32), generator=GENERATOR, dtype=torch.uint8)
    expected = CODES.float() * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    found = values_of(tmp_path, {"embed.weight": CODES, "embed.weight_scale": exponents.view(dtype)})
    assert torch.equal(found, expected.bfloat16())


def test_a_table_that_is_not_called_weight_finds_its_scale_by_its_own_name(tmp_path: Path) -> None:
    tensors = {
        "table": CODES,
        "table_scale": torch.tensor(0.5),
        "scale": torch.tensor(9.0),
        "other_scale": torch.ones(3),
    }
    assert torch.equal(values_of(tmp_path, tensors, "table"), (CODES.float() * 0.5).bfloat16())


def test_a_part_of_a_table_finds_the_scale_of_the_table(tmp_path: Path) -> None:
    tensors = {
        "ngram.shard_0.weight": CODES,
        "ngram.shard_1.weight": CODES.clone(),
        "ngram.weight_scale": torch.tensor(0.25),
    }
    assert torch.equal(values_of(tmp_path, tensors, "ngram.shard_1.weight"), (CODES.float() * 0.25).bfloat16())


def test_scales_of_activations_and_of_values_that_are_whole_are_not_taken(tmp_path: Path) -> None:
    tensors = {
        "embed.weight": CODES,
        "embed.input_scale": torch.tensor(9.0),
        "embedding.weight_scale": torch.tensor(9.0),
    }
    assert torch.equal(values_of(tmp_path, tensors), CODES.bfloat16())
    whole = torch.randn(ROWS, DIM, generator=GENERATOR).bfloat16()  # as a quantizer's dry run leaves it
    assert torch.equal(values_of(tmp_path, {"embed.weight": whole, "embed.weight_scale": torch.tensor(9.0)}), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [None, 1, 4], ids=["flat", "a row", "groups"])
@pytest.mark.parametrize("codes", [CODES, BYTES.view(torch.int8)], ids=["fp8", "int8"])
def test_scales_of_rows_or_of_groups_of_columns_multiply_those(
    tmp_path: Path, codes: torch.Tensor, groups: int | None, dtype: torch.dtype
) -> None:
    scale = (torch.rand(ROWS, groups or 1, generator=GENERATOR) + 0.1).to(dtype)
    expected = (codes.float() * scale.float().repeat_interleave(DIM // (groups or 1), 1)).bfloat16()
    given = scale if groups else scale[:, 0].clone()
    assert torch.equal(values_of(tmp_path, {"embed.weight": codes, "embed.weight_scale": given}), expected)


REFUSED_SCALES = {
    "each row, in doubles": (torch.ones(ROWS, 1, dtype=torch.float64), "a scale for each row"),
    "each column": (torch.ones(1, DIM), "a scale for each column"),
    "groups of doubles": (torch.ones(ROWS, 4, dtype=torch.float64), "a scale for 16 columns of a row"),
    "e8m0 for 16 columns": (torch.full((ROWS, 4), 127, dtype=torch.uint8), "a scale for 16 columns of a row"),
    "blocks": (torch.ones(2, 2), r"a block of rows and columns \(20 x 32\)"),
    "another table's": (torch.ones(ROWS + 1, 7), "neither its rows nor its columns"),
    "doubles": (torch.ones(1, dtype=torch.float64), r"F64 \[1\]"),
    "zero": (torch.zeros(1), "is 0.0, expected a finite scale"),
    "not a number": (torch.tensor([float("nan")]), "is nan"),
}


@pytest.mark.parametrize("form", REFUSED_SCALES)
def test_scales_that_a_row_cannot_carry_are_refused_by_name(tmp_path: Path, form: str) -> None:
    scale, message = REFUSED_SCALES[form]
    with pytest.raises(ConfigError, match=rf"embed\.weight_scale .*{message}"):
        values_of(tmp_path, {"embed.weight": CODES, "embed.weight_scale": scale})


def test_two_scales_and_scales_of_other_fp8_types_are_refused_by_name(tmp_path: Path) -> None:
    two = {"embed.weight": CODES, "embed.weight_scale": torch.ones(1), "embed.scale": torch.ones(1)}
    with pytest.raises(ConfigError, match=r"has 2 scales beside it \(embed\.scale, embed\.weight_scale\)"):
        values_of(tmp_path, two)
    e5m2 = {"embed.weight": BYTES.view(torch.float8_e5m2), "embed.weight_scale": torch.ones(1)}
    with pytest.raises(ConfigError, match=r"F8_E5M2 .*embed\.weight_scale"):
        values_of(tmp_path, e5m2)


STATE = torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)
PACKED = {
    "bitsandbytes 4-bit": (
        {"embed.weight": BYTES.reshape(-1, 1), "embed.weight.absmax": torch.ones(40),
         "embed.weight.quant_state.bitsandbytes__nf4": STATE}, "embed.weight", "bitsandbytes"),
    "bitsandbytes int8": (
        {"embed.weight": BYTES.view(torch.int8), "embed.SCB": torch.ones(ROWS)}, "embed.weight", "int8 of"),
    "GPTQ": ({"embed.qweight": BYTES.view(torch.int32), "embed.qzeros": BYTES.view(torch.int32),
              "embed.scales": torch.ones(1, ROWS).half()}, "embed.qweight", "GPTQ or AWQ"),
    "AWQ without its zeros": ({"embed.qweight": BYTES.view(torch.int32)}, "embed.qweight", "GPTQ or AWQ"),
    "NVFP4 with zero points": ({"embed.weight": BYTES, "embed.weight_scale": torch.ones(ROWS, 8).to(CODES.dtype),
                                "embed.weight_scale_2": torch.ones(1), "embed.weight_zero_point": torch.ones(ROWS)},
                               "embed.weight", "NVFP4"),
    "compressed-tensors": ({"embed.weight_packed": BYTES.view(torch.int32), "embed.weight_scale": torch.ones(ROWS, 1),
                            "embed.weight_shape": torch.tensor([ROWS, 170])},
                           "embed.weight_packed", "compressed-tensors"),
    "MLX": ({"embed.weight": BYTES.view(torch.uint32), "embed.scales": torch.ones(ROWS, 2).bfloat16(),
             "embed.biases": torch.ones(ROWS, 2).bfloat16()}, "embed.weight", "MLX"),
    "int8 with one scale": (
        {"embed.weight": BYTES.view(torch.int8), "embed.weight_scale": torch.ones(1)},
        "embed.weight", "with a scale"),
    "int8 with zero points": ({"embed.weight": BYTES.view(torch.int8), "embed.weight_scale": torch.ones(ROWS, 1),
                               "embed.weight_zero_point": torch.ones(ROWS, 1)}, "embed.weight", "zero points"),
}  # fmt: skip


@pytest.mark.parametrize("form", PACKED)
def test_a_packed_weight_is_refused_by_what_packed_it(tmp_path: Path, form: str) -> None:
    tensors, name, message = PACKED[form]
    with pytest.raises(ConfigError, match=rf"tensor {name} is .*{message}"):
        values_of(tmp_path, {key: tensor.clone() for key, tensor in tensors.items()}, name)


def test_bytes_of_a_model_that_config_json_calls_quantized_are_refused(tmp_path: Path) -> None:
    save_file({"embed.weight": BYTES.reshape(-1, 1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ConfigError, match=r"config\.json says that bitsandbytes quantized the model"):
        plain_source(Checkpoint.open(tmp_path), "embed.weight")


def test_a_scale_in_a_file_that_was_not_downloaded_is_missed(tmp_path: Path) -> None:
    save_file({"embed.weight": CODES}, tmp_path / "a.safetensors")
    weight_map = {"embed.weight": "a.safetensors", "embed.weight_scale": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=r"embed\.weight_scale, the scale of embed\.weight, lies in b\.safetensors"):
        plain_source(Checkpoint.open(tmp_path), "embed.weight")
