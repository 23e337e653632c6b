"""Weights that real libraries quantized: what each stores, under the names that it uses, and the values it reads back.

A test that asks for a library which is not installed is skipped; requirements.txt installs them all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

ROWS, DIM = 40, 512
REASON = "requirements.txt installs it"


class Quantized(NamedTuple):
    """stored: by what each tensor's name adds to "NAME.". values: float, [ROWS, DIM]."""

    stored: dict[str, torch.Tensor]
    values: torch.Tensor
    codec: str


def weights(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.02, (ROWS, DIM)).astype(np.float32))


def _by_compressed_tensors(scheme: dict[str, Any], format_name: str, codec: str, **given: torch.Tensor) -> Quantized:
    library = pytest.importorskip("compressed_tensors", reason=REASON)
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=REASON)
    full = quantization.QuantizationScheme(
        targets=["Embedding"], weights=quantization.QuantizationArgs(symmetric=True, **scheme)
    )
    compressor = library.BaseCompressor.get_value_from_registry(format_name)
    stored = compressor.compress(given, full)
    return Quantized(stored, compressor.decompress(dict(stored), full)["weight"], codec)


def packed_integers(bits: int, group: int | None) -> Quantized:
    """compressed-tensors' "pack-quantized", a scale a row if `group` is None."""
    weight = weights(3).bfloat16()
    largest = weight.view(ROWS, -1, group or DIM).float().abs().amax(-1)
    scale = (largest / (2 ** (bits - 1) - 1)).bfloat16()
    scheme = {"num_bits": bits, "strategy": "group" if group else "channel", "group_size": group}
    codec = {4: "uint4b8", 8: "uint8b128"}[bits] + "_bf16" + (f"x{group}" if group else "")
    return _by_compressed_tensors(scheme, "pack-quantized", codec, weight=weight, weight_scale=scale)


def plain_integers() -> Quantized:
    """compressed-tensors' "int-quantized": bytes, and a scale a row."""
    weight = weights(9).bfloat16()
    scale = (weight.float().abs().amax(-1, keepdim=True) / 127).bfloat16()
    scheme = {"num_bits": 8, "strategy": "channel"}
    return _by_compressed_tensors(scheme, "int-quantized", "int8_bf16", weight=weight, weight_scale=scale)


def fp8_rows() -> Quantized:
    """compressed-tensors' "float-quantized": fp8, and a scale a row."""
    weight = weights(10).bfloat16()
    scale = (weight.float().abs().amax(-1, keepdim=True) / 448).bfloat16()
    scheme = {"num_bits": 8, "type": "float", "strategy": "channel"}
    return _by_compressed_tensors(scheme, "float-quantized", "fp8_e4m3_bf16", weight=weight, weight_scale=scale)


def nvfp4_that_divides() -> Quantized:
    """compressed-tensors' NVFP4."""
    weight = weights(4)
    whole = torch.tensor([2688.0]) / weight.abs().max()
    scale = (weight.view(ROWS, -1, 16).abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    codec = f"fp4_e2m1_e4m3x16/{float(whole).hex()}"
    return _by_compressed_tensors(
        scheme, "nvfp4-pack-quantized", codec, weight=weight, weight_scale=scale.float(), weight_global_scale=whole
    )


def mxfp4() -> Quantized:
    """compressed-tensors' MXFP4."""
    weight = weights(5).bfloat16()
    scale = torch.exp2(torch.floor(torch.log2(weight.float().view(ROWS, -1, 32).abs().amax(-1))) - 2)
    scheme = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    return _by_compressed_tensors(scheme, "mxfp4-pack-quantized", "fp4_e2m1_e8m0x32", weight=weight, weight_scale=scale)


def nf4(block: int = 64, *, shape: tuple[int, int] = (ROWS, DIM), kind: str = "nf4", twice: bool = False) -> Quantized:
    """bitsandbytes' NF4, or another `kind`. twice: with its scales quantized again."""
    functional = pytest.importorskip("bitsandbytes.functional", reason=REASON)
    weight = weights(6).reshape(-1)[: shape[0] * shape[1]].reshape(shape)
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=twice)
    stored = {"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    return Quantized(stored, functional.dequantize_4bit(packed, state), f"nf4_fp32x{block}")


def nvfp4_that_multiplies() -> Quantized:
    """torchao's NVFP4, under ModelOpt's names, which hold the same bytes."""
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason=REASON)
    whole = torch.tensor(0.0123)
    tensor = nvfp4.NVFP4Tensor.to_nvfp4(weights(7), per_tensor_scale=whole)
    stored = {"weight": tensor.qdata, "weight_scale": tensor.scale, "weight_scale_2": whole}
    return Quantized(stored, tensor.dequantize(), f"fp4_e2m1_e4m3x16*{float(whole).hex()}")


def mx(kind: torch.dtype) -> Quantized:
    """torchao's MXFP4 and MXFP8."""
    library = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason=REASON)
    tensor = library.MXTensor.to_mx(weights(8), kind, 32)
    codec = {torch.float4_e2m1fn_x2: "fp4_e2m1_e8m0x32", torch.float8_e4m3fn: "fp8_e4m3_e8m0x32"}[kind]
    stored = {"weight": tensor.qdata, "weight_scale": tensor.scale.view(torch.uint8)}
    return Quantized(stored, tensor.dequantize(torch.float32), codec)


def typed_mxfp4() -> Quantized:
    """The same bytes as torch's own types."""
    made = mx(torch.float4_e2m1fn_x2)
    stored = {
        "weight": made.stored["weight"].view(torch.float4_e2m1fn_x2),
        "weight_scale": made.stored["weight_scale"].view(torch.float8_e8m0fnu),
    }
    return made._replace(stored=stored)
