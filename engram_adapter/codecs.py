"""Rows as stored (opaque bytes) into values that a model computes with.

Input: uint8 tensors of whole rows, as lookups return them, and the codec name of their table. Output: tensors of the
table's float type, on the same device. Errors: `ConfigError` for the codec "raw", whose rows tierstore stores without
knowing how to read them; `ValueError` for bytes that are not whole rows.
"""

from __future__ import annotations

import numpy as np
import torch

from tierstore import kernels
from tierstore.codec import parse_codec
from tierstore.errors import ConfigError
from tierstore.spec import TableSpec, codec_row_bytes, codec_scale

SCALE_BLOCK = 32  # values that share one e8m0 scale byte
_E8M0_NAN = 255
# The float32 bit patterns of the two e8m0 bytes whose value is not `byte << 23`: 0 is the subnormal 2^-127, 255 is NaN.
_FLOAT32_BITS_2_POW_MINUS_127 = 0x00400000
_FLOAT32_BITS_NAN = 0x7FC00000

_PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def codec_dtype(codec: str) -> torch.dtype:
    """Returns the float type in which rows of `codec` come out: the stored one, bfloat16 for every quantized codec.

    Raises `ConfigError` for "raw", `FormatError` for a codec that this version does not know.
    """
    if codec == "raw":
        raise ConfigError(
            "codec 'raw' names no float type: these rows are stored as bytes only; read them with Table.rows and "
            "decode them yourself"
        )
    parse_codec(codec)  # refuses unknown names
    return _PLAIN_DTYPES.get(codec, torch.bfloat16)


def decode_rows(rows: torch.Tensor, codec: str, dim: int) -> torch.Tensor:
    """Decodes rows, uint8 [..., row_bytes], into values [..., dim] of `codec_dtype(codec)`, on the device of `rows`.

    "fp8_e4m3_e8m0x32": value = fp8 * 2^(scale byte - 127), "fp8_e4m3*S": value = fp8 * S; both are computed in float32
    and rounded once to bfloat16, half to even. The first is exact for scale bytes 3 to 246; a product past the largest
    bfloat16 is infinite, and scale byte 255 gives NaN. The other quantized codecs are computed alike, as FORMAT.md
    defines each. "bf16", "fp16" and "fp32" copy nothing if the bytes are contiguous and aligned: the result is then a
    view of `rows`.

    Raises `TypeError` if `rows` is not uint8, `ValueError` if its last axis is not a row of `dim` values,
    `ConfigError` for "raw", `FormatError` for unknown codecs.
    """
    dtype = codec_dtype(codec)
    row_bytes = codec_row_bytes(codec, dim)
    if rows.dtype != torch.uint8:
        raise TypeError(f"rows to decode are {rows.dtype}, must be torch.uint8 as lookups return them")
    if rows.ndim == 0 or rows.shape[-1] != row_bytes:
        raise ValueError(
            f"rows of shape {list(rows.shape)}: the last axis must be {row_bytes} bytes, which {dim} values as "
            f"{codec} take"
        )
    if codec in _PLAIN_DTYPES:
        return _reinterpreted(rows, dtype)
    if rows.device.type == "cpu":
        return _decoded_by_kernel(rows, codec, dim)
    if not _is_plain_fp8(codec):
        if rows.device.type == "cuda":
            return _decoded_by_triton(rows, codec, dim)
        return _decoded_by_kernel(rows.cpu(), codec, dim).to(rows.device)
    return _decoded_by_torch(rows, codec, dim).to(dtype)


def _is_plain_fp8(codec: str) -> bool:
    """Whether a codec is one of the three of fp8 that have kernels of their own."""
    return codec == "fp8_e4m3_e8m0x32" or codec.partition("*")[0] == "fp8_e4m3"


def _decoded_by_torch(rows: torch.Tensor, codec: str, dim: int) -> torch.Tensor:
    """Decodes fp8 rows to float32, on any device."""
    values = rows[..., :dim].view(torch.float8_e4m3fn).to(torch.float32)
    if codec == "fp8_e4m3_e8m0x32":
        values.unflatten(-1, (dim // SCALE_BLOCK, SCALE_BLOCK)).mul_(e8m0_to_float32(rows[..., dim:]).unsqueeze(-1))
    elif codec != "fp8_e4m3":
        values.mul_(torch.tensor(codec_scale(codec), dtype=torch.float32, device=values.device))
    return values


def _decoded_by_triton(rows: torch.Tensor, codec: str, dim: int) -> torch.Tensor:
    """Decodes quantized rows where the kernels of a GPU run; launches only."""
    from tierstore.kernels.gpu.rows import gather_rows
    from tierstore.tiers.hbm.launches import row_codec

    flat = rows.contiguous().view(-1, rows.shape[-1])
    values = torch.empty((*rows.shape[:-1], dim), dtype=torch.bfloat16, device=rows.device)
    row_ids = torch.arange(len(flat), device=rows.device)
    kernel_codec = row_codec(TableSpec.plain("rows", max(1, len(flat)), rows.shape[-1], codec, dim))
    gather_rows(row_ids, flat, len(flat), kernel_codec, values.view(-1, dim))
    return values


def _decoded_by_kernel(rows: torch.Tensor, codec: str, dim: int) -> torch.Tensor:
    """Decodes quantized rows on the CPU, by torch's number of threads if they are many: of fp8 in a tenth of the time
    that torch's own conversion takes."""
    values = torch.empty((*rows.shape[:-1], dim), dtype=torch.bfloat16, device="cpu")
    flat = rows.contiguous().view(-1, rows.shape[-1]).numpy()
    bits = values.view(torch.int16).view(-1, dim).numpy().view(np.uint16)
    if _is_plain_fp8(codec):
        scale = None if codec == "fp8_e4m3_e8m0x32" else codec_scale(codec)
        kernels.decode_fp8_rows(flat, dim, scale, bits, torch.get_num_threads())
    else:
        of = parse_codec(codec)
        threads = torch.get_num_threads()
        kernels.decode_block_rows(flat, dim, of.values, of.scale, of.block or dim, of.factor, of.divides, bits, threads)
    return values


def e8m0_to_float32(scale_bytes: torch.Tensor) -> torch.Tensor:
    """Turns e8m0 bytes, uint8 of any shape, into float32 2^(byte - 127), exactly; byte 255 gives NaN.

    The exponent field of a float32 holds the same bias, so bytes 1 to 254 only move to its bits. This stands in for
    torch.float8_e8m0fnu, which torch 2.6 does not have.
    """
    assert scale_bytes.dtype == torch.uint8
    bits = scale_bytes.to(torch.int32) << 23
    bits = bits.masked_fill_(scale_bytes == 0, _FLOAT32_BITS_2_POW_MINUS_127)
    return bits.masked_fill_(scale_bytes == _E8M0_NAN, _FLOAT32_BITS_NAN).view(torch.float32)


def _reinterpreted(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Views bytes as `dtype`; copies first if they are not contiguous from an aligned offset, as torch needs."""
    if rows.numel() == 0:  # an empty array of NumPy has strides of 0, which torch does not view either
        return rows.new_empty((*rows.shape[:-1], rows.shape[-1] // dtype.itemsize), dtype=dtype)
    rows = rows.contiguous()
    if rows.storage_offset() % dtype.itemsize or rows.data_ptr() % dtype.itemsize:
        rows = rows.clone()
    return rows.view(dtype)
