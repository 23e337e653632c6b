"""Rows that a library quantized decode to that library's own values.

A library's float32 values, rounded once to bfloat16, are what a codec gives. Where a library gives bfloat16 at once,
its own rounding is compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engram_adapter.codecs import decode_rows
from tierstore.codec import GGUF_BLOCKS

ROWS, DIM = 40, 512


def weights(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.02, (ROWS, DIM)).astype(np.float32))


def assert_same(values: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(values, expected.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def rows_of(*planes: torch.Tensor) -> torch.Tensor:
    return torch.cat([plane.contiguous().view(torch.uint8).view(ROWS, -1) for plane in planes], dim=1)


@pytest.mark.parametrize("codec", GGUF_BLOCKS)
def test_gguf_blocks(codec: str) -> None:
    """Python's gguf quantizes two of the types; any bytes are rows of the others, but float16s must be finite."""
    gguf = pytest.importorskip("gguf", reason="requirements.txt installs it")
    kind = gguf.GGMLQuantizationType[codec.removeprefix("gguf_").upper()]
    if codec in ("gguf_q8_0", "gguf_q4_0"):
        rows = gguf.quants.quantize(weights(1).numpy(), kind)
    else:
        _, block_bytes = GGUF_BLOCKS[codec]
        num_blocks = DIM // GGUF_BLOCKS[codec][0]
        rows = np.random.default_rng(2).integers(0, 256, (ROWS, num_blocks, block_bytes), dtype=np.uint8)
        rows[..., 1] &= 0x3B
        rows[..., 3] &= 0x3B
        rows = rows.reshape(ROWS, -1)
    expected = torch.from_numpy(gguf.quants.dequantize(rows, kind))
    assert_same(decode_rows(torch.from_numpy(rows), codec, DIM), expected)


def compressed(
    scheme: dict[str, Any], format_name: str, **tensors: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor]:
    """What compressed-tensors stores of a weight, and the weight that it makes of that."""
    library = pytest.importorskip("compressed_tensors", reason="requirements.txt installs it")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    full = quantization.QuantizationScheme(targets=["Embedding"], weights=quantization.QuantizationArgs(**scheme))
    compressor = library.BaseCompressor.get_value_from_registry(format_name)
    stored = compressor.compress(tensors, full)
    return stored, compressor.decompress(dict(stored), full)["weight"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 128], ids=["a scale a row", "groups of 128"])
def test_compressed_tensors_packed_integers(bits: int, group: int | None) -> None:
    weight = weights(3).bfloat16()
    groups = weight.view(ROWS, -1, group or DIM)
    scale = (groups.float().abs().amax(-1) / (2 ** (bits - 1) - 1)).bfloat16()
    scheme = {"num_bits": bits, "symmetric": True, "strategy": "group" if group else "channel", "group_size": group}
    stored, expected = compressed(scheme, "pack-quantized", weight=weight, weight_scale=scale)
    codec = {4: "uint4b8", 8: "uint8b128"}[bits] + "_bf16" + (f"x{group}" if group else "")
    assert_same(decode_rows(rows_of(stored["weight_packed"], stored["weight_scale"]), codec, DIM), expected)


def test_compressed_tensors_nvfp4_divides_by_its_global_scale() -> None:
    weight = weights(4)
    global_scale = torch.tensor([2688.0]) / weight.abs().max()
    scale = (weight.view(ROWS, -1, 16).abs().amax(-1) / 6 * global_scale).to(torch.float8_e4m3fn)
    scheme = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    stored, expected = compressed(
        scheme, "nvfp4-pack-quantized", weight=weight, weight_scale=scale.float(), weight_global_scale=global_scale
    )
    codec = f"fp4_e2m1_e4m3x16/{float(global_scale).hex()}"
    assert_same(decode_rows(rows_of(stored["weight_packed"], stored["weight_scale"]), codec, DIM), expected)


def test_compressed_tensors_mxfp4() -> None:
    weight = weights(5).bfloat16()
    scale = torch.exp2(torch.floor(torch.log2(weight.float().view(ROWS, -1, 32).abs().amax(-1))) - 2)
    scheme = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    stored, expected = compressed(scheme, "mxfp4-pack-quantized", weight=weight, weight_scale=scale)
    rows = rows_of(stored["weight_packed"], stored["weight_scale"])
    assert_same(decode_rows(rows, "fp4_e2m1_e8m0x32", DIM), expected)


@pytest.mark.parametrize("block", [64, 512])
def test_bitsandbytes_nf4(block: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="requirements.txt installs it")
    packed, state = functional.quantize_4bit(weights(6), blocksize=block, quant_type="nf4")
    expected = functional.dequantize_4bit(packed, state)
    assert_same(decode_rows(rows_of(packed, state.absmax), f"nf4_fp32x{block}", DIM), expected)


@pytest.mark.slow
def test_torchao_nvfp4_and_mx() -> None:
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="requirements.txt installs it")
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    whole = torch.tensor(0.0123)
    quantized = nvfp4.NVFP4Tensor.to_nvfp4(weights(7), per_tensor_scale=whole)
    codec = f"fp4_e2m1_e4m3x16*{float(whole).hex()}"
    assert_same(decode_rows(rows_of(quantized.qdata, quantized.scale), codec, DIM), quantized.dequantize())
    for kind, codec in ((torch.float4_e2m1fn_x2, "fp4_e2m1_e8m0x32"), (torch.float8_e4m3fn, "fp8_e4m3_e8m0x32")):
        tensor = mx.MXTensor.to_mx(weights(8), kind, 32)
        assert_same(decode_rows(rows_of(tensor.qdata, tensor.scale), codec, DIM), tensor.dequantize(torch.float32))
