"""Rows that a library quantized decode to that library's own values.

A library's float32 values, rounded once to bfloat16, are what a codec gives. Where a library gives bfloat16 at once,
its own rounding is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import quantized
from support.quantized import DIM, REASON, ROWS, Quantized, weights

import tierstore
from engram_adapter import RowIdEmbedding, build_checkpoint
from engram_adapter.codecs import decode_rows
from tierstore.codec import GGUF_BLOCKS
from tierstore.errors import ConfigError


def assert_same(values: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(values, expected.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("codec", GGUF_BLOCKS)
def test_gguf_blocks(codec: str) -> None:
    """Python's gguf quantizes two of the types; any bytes are rows of the others, but float16s must be finite."""
    gguf = pytest.importorskip("gguf", reason=REASON)
    kind = gguf.GGMLQuantizationType[codec.removeprefix("gguf_").upper()]
    if codec in ("gguf_q8_0", "gguf_q4_0"):
        rows = gguf.quants.quantize(weights(1).numpy(), kind)
    else:
        block_values, block_bytes = GGUF_BLOCKS[codec]
        rows = np.random.default_rng(2).integers(0, 256, (ROWS, DIM // block_values, block_bytes), dtype=np.uint8)
        rows[..., 1] &= 0x3B
        rows[..., 3] &= 0x3B
        rows = rows.reshape(ROWS, -1)
    expected = torch.from_numpy(gguf.quants.dequantize(rows, kind))
    assert_same(decode_rows(torch.from_numpy(rows), codec, DIM), expected)


PACKINGS: dict[str, Callable[[], Quantized]] = {
    "compressed-tensors int4, a scale a row": lambda: quantized.packed_integers(4, None),
    "compressed-tensors int4, groups": lambda: quantized.packed_integers(4, 128),
    "compressed-tensors int8, a scale a row": lambda: quantized.packed_integers(8, None),
    "compressed-tensors int8, groups": lambda: quantized.packed_integers(8, 128),
    "compressed-tensors int8, unpacked": quantized.plain_integers,
    "compressed-tensors fp8, a scale a row": quantized.fp8_rows,
    "compressed-tensors NVFP4": quantized.nvfp4_that_divides,
    "compressed-tensors MXFP4": quantized.mxfp4,
    "bitsandbytes NF4": quantized.nf4,
    "bitsandbytes NF4, a block a row": lambda: quantized.nf4(512),
}
BY_TORCHAO: dict[str, Callable[[], Quantized]] = {
    "torchao NVFP4": quantized.nvfp4_that_multiplies,
    "torchao MXFP4": lambda: quantized.mx(torch.float4_e2m1fn_x2),
    "torchao MXFP4, of torch's own type": quantized.typed_mxfp4,
    "torchao MXFP8": lambda: quantized.mx(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("packing", [*PACKINGS, *(pytest.param(name, marks=pytest.mark.slow) for name in BY_TORCHAO)])
def test_a_checkpoint_of_a_library_is_built_with_the_values_that_it_reads(tmp_path: Path, packing: str) -> None:
    made = (PACKINGS | BY_TORCHAO)[packing]()
    save_file(
        {f"embed.{name}": tensor.contiguous() for name, tensor in made.stored.items()}, tmp_path / "m.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": packing.split()[0]}}))
    name = "embed.weight_packed" if "weight_packed" in made.stored else "embed.weight"
    build_checkpoint(tmp_path, tmp_path / "store", tensor=name)
    with tierstore.open(tmp_path / "store", dram="4MiB") as store:
        table = store[name]
        assert table.spec.codec == made.codec
        assert_same(RowIdEmbedding(store, name)(torch.arange(ROWS)), made.values)


def refusal(folder: Path, made: Quantized, **changed: torch.Tensor | None) -> str:
    """Why a checkpoint with other tensors than a library's own is refused."""
    stored = {name: tensor for name, tensor in {**made.stored, **changed}.items() if tensor is not None}
    save_file({f"embed.{name}": tensor.contiguous() for name, tensor in stored.items()}, folder / "m.safetensors")
    name = "embed.weight_packed" if "weight_packed" in stored else "embed.weight"
    with pytest.raises(ConfigError) as error:
        build_checkpoint(folder / "m.safetensors", folder / "store", tensor=name)
    assert not (folder / "store").exists()
    return str(error.value)


def test_nf4_that_no_codec_holds_is_refused_by_why(tmp_path: Path) -> None:
    assert "blocks of 64 values that cross its rows of 160" in refusal(tmp_path, quantized.nf4(shape=(ROWS, 160)))
    assert "quantized again (embed.weight.nested_absmax)" in refusal(tmp_path, quantized.nf4(twice=True))
    assert "quant_state.bitsandbytes__fp4 beside it: not NF4" in refusal(tmp_path, quantized.nf4(kind="fp4"))
    made, state = quantized.nf4(), "weight.quant_state.bitsandbytes__nf4"
    assert "other values in embed.weight.quant_map" in refusal(tmp_path, made, **{"weight.quant_map": torch.ones(16)})
    absmax = made.stored["weight.absmax"]
    assert "embed.weight.absmax is F32 [319], F32 [320] was" in refusal(tmp_path, made, **{"weight.absmax": absmax[1:]})
    assert "not NF4 as rows can hold it" in refusal(tmp_path, made, **{"weight.absmax": absmax, state: None})
    for written, message in (
        (b"[]", "is no JSON object"),
        (b"{", "is no JSON object"),
        (b'{"quant_type": "nf4", "blocksize": 0, "shape": [40, 512]}', "expected quant_type nf4, a blocksize and a"),
        (b'{"quant_type": "nf4", "blocksize": 64, "shape": [40, true]}', "expected quant_type nf4, a blocksize and a"),
        (b'{"quant_type": "nf4", "blocksize": 64, "shape": [80, 512]}', r"bitsandbytes__nf4 says [80, 512]; download"),
    ):
        changed = torch.frombuffer(bytearray(written), dtype=torch.uint8)
        assert message in refusal(tmp_path, made, **{state: changed})


def test_packed_tensors_that_contradict_each_other_are_refused_by_which(tmp_path: Path) -> None:
    made = quantized.packed_integers(4, 128)
    shape, scale = torch.tensor([ROWS, DIM]), made.stored["weight_scale"]
    for changed, message in (
        ({"weight_shape": shape[:1]}, "embed.weight_shape is I64 [1], I64 or I32 [2] was expected"),
        ({"weight_shape": shape + 1}, "embed.weight_shape says [41, 513]"),
        ({"weight_shape": shape * 0}, "embed.weight_shape says [0, 0]"),
        ({"weight_shape": torch.tensor([ROWS, DIM - 1])}, "only 8 or 4 bits a value, without padding"),
        ({"weight_shape": None}, "packed by compressed-tensors"),
        ({"weight_scale": scale[1:]}, "embed.weight_scale is BF16 [39, 4], a scale for each of 40 rows"),
        ({"weight_scale": scale.double()}, "embed.weight_scale is F64 [40, 4], F32 or F16 or BF16 was expected"),
        ({"weight_zero_point": scale.clone()}, "packed by compressed-tensors"),
        ({"weight_g_idx": torch.zeros(DIM)}, "GPTQ"),
    ):
        assert message in refusal(tmp_path, made, **changed), changed.keys()
    made = quantized.nvfp4_that_divides()
    whole, scale = made.stored["weight_global_scale"], made.stored["weight_scale"]
    for changed, message in (
        ({"weight_global_scale": whole * 0}, "embed.weight_global_scale is 0.0, expected a finite scale above 0"),
        ({"weight_global_scale": whole.repeat(2)}, "embed.weight_global_scale is F32 [2], one value was expected"),
        ({"weight_scale": scale[:, 1:]}, "embed.weight_scale is F8_E4M3 [40, 31], F8_E4M3 [40, 32] was expected"),
        ({"weight_scale": scale.float()}, "embed.weight_scale is F32 [40, 32], F8_E4M3 [40, 32] was expected"),
    ):
        assert message in refusal(tmp_path, made, **changed), changed.keys()
