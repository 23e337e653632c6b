"""`tierstore bench codecs`: quantized rows into bfloat16, beside the library that makes such rows.

Input: random rows of each codec, in DRAM; nothing is written. Output: rates beside gguf, compressed-tensors,
bitsandbytes and torchao, each dequantising the same rows with the same number of threads, after the values were found
equal. A library that is not installed is skipped, with the reason. Errors: ImportError without torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tierstore.codec import GGUF_BLOCKS
from tierstore.errors import ConfigError

from . import stores
from .pairs import SUBJECT, Options, Result

if TYPE_CHECKING:
    import torch

TOKENS = 2048
LEAST_RATIO = 3.0  # of the library's rate
_SEED = 11


class Case(NamedTuple):
    """Rows as a store has them, uint8 [R, row_bytes], and how their library makes values of them."""

    codec: str
    library: str
    rows: torch.Tensor
    dequantise: Callable[[], torch.Tensor]


def run(folder: Path, options: Options) -> Result:
    """Measures every codec."""
    import torch

    del folder
    tokens = options.tokens or TOKENS
    num_rows = tokens * stores.ROWS_PER_TOKEN
    result = Result(f"quantized rows of {stores.DIM} values to bf16, {options.threads} thread(s)")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for name, make in CASES.items():
            try:
                case = make(num_rows)
            except ImportError as error:
                result.skipped[name] = f"its library cannot be loaded: {error}".splitlines()[0]
                continue
            result.compare(
                f"{name} ({case.codec.partition('*')[0].partition('/')[0]}), {tokens:,} tokens", "row", num_rows,
                _sides(case), options.pairs, {case.library: LEAST_RATIO},
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads_before)
    return result


def _sides(case: Case) -> dict[str, Callable[[], float]]:
    """Returns both sides, after their values were found equal."""
    import torch

    from engram_adapter.codecs import decode_rows

    ours, theirs = decode_rows(case.rows, case.codec, stores.DIM), case.dequantise().to(torch.bfloat16)
    if not torch.equal(ours.nan_to_num(), theirs.view(ours.shape).nan_to_num()):
        raise ConfigError(f"codec {case.codec} gives other values than {case.library}; this is a fault of the codec")

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return {
        SUBJECT: lambda: timed(lambda: decode_rows(case.rows, case.codec, stores.DIM)),
        case.library: lambda: timed(case.dequantise),
    }


def _random_bytes(*shape: int) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.random.default_rng(_SEED).integers(0, 256, shape, dtype=np.uint8))


def _joined(*planes: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([plane.contiguous().view(torch.uint8).view(len(planes[0]), -1) for plane in planes], dim=1)


def _gguf(codec: str) -> Callable[[int], Case]:
    def make(num_rows: int) -> Case:
        import gguf
        import torch

        block, block_bytes = GGUF_BLOCKS[codec]
        blocks = _random_bytes(num_rows, stores.DIM // block, block_bytes)
        blocks[..., 1:4:2] &= 0x3B  # the upper bytes of float16s: finite ones
        rows = blocks.view(num_rows, -1)
        kind = gguf.GGMLQuantizationType[codec.removeprefix("gguf_").upper()]
        return Case(codec, "gguf", rows, lambda: torch.from_numpy(gguf.quants.dequantize(rows.numpy(), kind)))

    return make


def _by_compressed_tensors(codec: str, format_name: str, group: int, **scheme: object) -> Callable[[int], Case]:
    def make(num_rows: int) -> Case:
        import torch
        from compressed_tensors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        bits = 4 if "4" in codec.partition("_")[0] else 8
        packed = _random_bytes(num_rows, stores.DIM * bits // 8)
        scales = _random_bytes(num_rows, stores.DIM // group) % 20 + 100
        stored = {"weight_packed": packed, "weight_scale": scales}
        if format_name == "pack-quantized":
            stored = {"weight_packed": packed.view(torch.int32), "weight_scale": scales.to(torch.bfloat16) / 64}
            stored["weight_shape"] = torch.tensor([num_rows, stores.DIM])
        elif format_name == "int-quantized":
            stored = {"weight": packed.view(torch.int8), "weight_scale": scales.to(torch.bfloat16) / 64}
        elif format_name == "nvfp4-pack-quantized":
            stored["weight_scale"] = scales.view(torch.float8_e4m3fn)
            stored["weight_global_scale"] = torch.tensor([float.fromhex(codec.partition("/")[2])])
        whole = QuantizationScheme(targets=["Embedding"], weights=QuantizationArgs(symmetric=True, **scheme))
        compressor = BaseCompressor.get_value_from_registry(format_name)
        rows = _joined(packed, stored["weight_scale"])
        return Case(codec, "compressed-tensors", rows, lambda: compressor.decompress(dict(stored), whole)["weight"])

    return make


def _by_bitsandbytes(num_rows: int) -> Case:
    import torch
    from bitsandbytes import functional

    weight = torch.randn(num_rows, stores.DIM, generator=torch.Generator().manual_seed(_SEED)).bfloat16()
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    rows = _joined(packed.view(num_rows, -1), state.absmax.view(num_rows, -1))
    return Case("nf4_fp32x64", "bitsandbytes", rows, lambda: functional.dequantize_4bit(packed, state))


def _by_torchao(num_rows: int) -> Case:
    import torch
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    weight = torch.randn(num_rows, stores.DIM, generator=torch.Generator().manual_seed(_SEED)).bfloat16()
    whole = torch.tensor(0.0123)
    tensor = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=whole)
    codec = f"fp4_e2m1_e4m3x16*{float(whole).hex()}"
    return Case(codec, "torchao", _joined(tensor.qdata, tensor.scale), lambda: tensor.dequantize(torch.bfloat16))


_GROUPS = {"num_bits": 4, "strategy": "group"}
_FP4 = {"num_bits": 4, "type": "float"}
CASES: dict[str, Callable[[int], Case]] = {
    **{codec.removeprefix("gguf_").upper(): _gguf(codec) for codec in GGUF_BLOCKS},
    "int4": _by_compressed_tensors("uint4b8_bf16x128", "pack-quantized", 128, group_size=128, **_GROUPS),
    "packed int8": _by_compressed_tensors(
        "uint8b128_bf16", "pack-quantized", stores.DIM, num_bits=8, strategy="channel"
    ),
    "int8": _by_compressed_tensors("int8_bf16", "int-quantized", stores.DIM, num_bits=8, strategy="channel"),
    "NVFP4 that divides": _by_compressed_tensors(
        "fp4_e2m1_e4m3x16/0x1.9p+9", "nvfp4-pack-quantized", 16, strategy="tensor_group", group_size=16, **_FP4
    ),
    "MXFP4": _by_compressed_tensors(
        "fp4_e2m1_e8m0x32", "mxfp4-pack-quantized", 32, strategy="group", group_size=32, **_FP4
    ),
    "NF4": _by_bitsandbytes,
    "NVFP4 that multiplies": _by_torchao,
}
