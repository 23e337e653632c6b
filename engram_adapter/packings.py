"""How the tensors of a quantized weight make rows: values and scales, side by side, and the codec that reads them.

Input: a weight, and the tensors beside it. Output: `StoredRows`, None for a packing that is not known here.
Errors: `ConfigError` for a known packing whose tensors contradict each other, or whose blocks cross rows.

Known are NVFP4 (as ModelOpt and as compressed-tensors store it), MXFP4, int8 and fp8 with a scale for each row or for
groups of its columns, compressed-tensors' integers of 4 and 8 bits in words of 32, and NF4 of bitsandbytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierstore import ConfigError, FormatError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.stored_tensor import StoredTensor
from tierstore.spec import codec_row_bytes

FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # a scale's dtype, and its type in a codec's name
_SCALE_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_FP4_DTYPES = {"U8": 2, "F4": 1}  # values of a column: torch's own type counts them one by one in a file
_SCALE = re.compile(r"(?:weight_)?scales?(?:_inv)?|scale_weight")
_STATE_BYTES_MAX = 1 << 16  # of the JSON that bitsandbytes writes beside a weight
# bitsandbytes' NF4, as the codec has it; another map is another packing.
_NF4_MAP = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype="<f4",
)


@dataclass(frozen=True)
class StoredRows:
    """How the rows of a weight are stored.

    codec: as in a store. num_rows, dim: rows, and values of each, whatever shape the packed tensor has.
    scales: a plane of them beside the values, or None.
    """

    codec: str
    num_rows: int
    dim: int
    scales: StoredTensor | None = None


def packed_rows(checkpoint: Checkpoint, weight: StoredTensor, beside: Mapping[str, str]) -> StoredRows | None:
    """Returns how a quantized weight's rows are stored, None if it is packed in no way that is known here.

    beside: the names of the tensors that belong to it, one at least, by what they add to the module's or the weight's.
    """
    leaf, endings = weight.name.rpartition(".")[2], set(beside)
    if "absmax" in endings and weight.dtype == "U8":
        return _nf4_rows(checkpoint, weight, beside)
    if leaf == "weight_packed" and weight.dtype == "I32" and endings == {"weight_scale", "weight_shape"}:
        return _integer_rows(checkpoint, weight, beside)
    if len(weight.shape) != 2:
        return None
    if weight.dtype in _FP4_DTYPES and endings in (
        {"weight_scale", "weight_scale_2"},
        {"weight_scale", "weight_global_scale"},
    ):
        return _nvfp4_rows(checkpoint, weight, beside)
    (ending, name), *others = beside.items()
    scale = checkpoint.tensors.get(name)
    if others or scale is None or not _SCALE.fullmatch(ending):
        return None
    if weight.dtype in _FP4_DTYPES:
        return _mxfp4_rows(weight, scale)
    if weight.dtype == "I8":
        return _grouped_rows(weight, "int8", weight.shape[0], weight.shape[1], scale)
    if weight.dtype == "F8_E4M3" and math.prod(scale.shape) > 1:  # one scale is part of the codec's name
        return _grouped_rows(weight, "fp8_e4m3", weight.shape[0], weight.shape[1], scale)
    return None


def _grouped_rows(weight: StoredTensor, values: str, num_rows: int, dim: int, scale: StoredTensor) -> StoredRows | None:
    """Returns rows with one float scale each, or one for each group of columns; None if the scales are others."""
    if scale.dtype not in FLOATS:
        return None
    codec = f"{values}_{FLOATS[scale.dtype]}"
    if scale.shape not in ((num_rows,), (num_rows, 1)):
        groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == num_rows else 0
        if not groups or dim % groups:
            return None
        codec += f"x{dim // groups}"
    return _checked(weight, StoredRows(codec, num_rows, dim, scale))


def one_scale(scale: StoredTensor) -> float:
    """Returns the value of a tensor that is one scale: F32, or F16 or BF16, which are exact as F32."""
    data = scale.read_bytes()
    if scale.dtype == "BF16":
        data = b"\0\0" + data  # the upper half of a float32
    value = float(np.frombuffer(data, "<f4" if scale.dtype == "BF16" else _SCALE_DTYPES[scale.dtype])[0])
    if not math.isfinite(value) or value <= 0:
        raise ConfigError(
            f"{scale.name} is {value}, expected a finite scale above 0; download the checkpoint again, "
            "or dequantize the table"
        )
    return value


def _nvfp4_rows(checkpoint: Checkpoint, weight: StoredTensor, beside: Mapping[str, str]) -> StoredRows:
    """ModelOpt's second scale multiplies; compressed-tensors' global scale divides."""
    divides = "weight_global_scale" in beside
    num_rows, dim = weight.shape[0], _FP4_DTYPES[weight.dtype] * weight.shape[1]
    scale = _tensor(checkpoint, weight, beside["weight_scale"], ("F8_E4M3",), (num_rows, dim // 16))
    whole = _tensor(checkpoint, weight, beside["weight_global_scale" if divides else "weight_scale_2"], ("F32",), None)
    if math.prod(whole.shape) != 1:
        raise _contradiction(checkpoint, weight, f"{whole.name} is F32 {list(whole.shape)}, one value was expected")
    codec = f"fp4_e2m1_e4m3x16{'/' if divides else '*'}{one_scale(whole).hex()}"
    return _checked(weight, StoredRows(codec, num_rows, dim, scale))


def _mxfp4_rows(weight: StoredTensor, scale: StoredTensor) -> StoredRows | None:
    num_rows, dim = weight.shape[0], _FP4_DTYPES[weight.dtype] * weight.shape[1]
    if scale.dtype not in ("U8", "F8_E8M0") or scale.shape != (num_rows, dim // 32) or dim % 32:
        return None
    return StoredRows("fp4_e2m1_e8m0x32", num_rows, dim, scale)


def _integer_rows(checkpoint: Checkpoint, weight: StoredTensor, beside: Mapping[str, str]) -> StoredRows | None:
    """compressed-tensors' pack-quantized: values plus half their range, the first in the lowest bits of a word."""
    shape = _tensor(checkpoint, weight, beside["weight_shape"], ("I64", "I32"), (2,))
    num_rows, dim = map(int, np.frombuffer(shape.read_bytes(), {"I64": "<i8", "I32": "<i4"}[shape.dtype]))
    if len(weight.shape) != 2 or num_rows != weight.shape[0] or dim < 1:
        raise _contradiction(checkpoint, weight, f"{shape.name} says {[num_rows, dim]}")
    values = {(dim * bits + 31) // 32: name for bits, name in ((8, "uint8b128"), (4, "uint4b8"))}.get(weight.shape[1])
    if values is None or weight.num_bytes * 8 != num_rows * dim * (8 if values == "uint8b128" else 4):
        raise ConfigError(
            f"{checkpoint.path}: tensor {weight.name} is packed by compressed-tensors, {weight.shape[1]} words of 32 "
            f"bits for the {dim} values of a row: only 8 or 4 bits a value, without padding, make rows of a table; "
            "dequantize it to BF16 first"
        )
    scale = _tensor(checkpoint, weight, beside["weight_scale"], tuple(FLOATS), None)
    rows = _grouped_rows(weight, values, num_rows, dim, scale)
    if rows is None:
        raise _contradiction(
            checkpoint,
            weight,
            f"{scale.name} is {scale.dtype} {list(scale.shape)}, a scale for each of {num_rows} rows "
            f"or for groups of their {dim} columns was expected",
        )
    return rows


def _nf4_rows(checkpoint: Checkpoint, weight: StoredTensor, beside: Mapping[str, str]) -> StoredRows:
    def refuse(what: str) -> ConfigError:
        return ConfigError(
            f"{checkpoint.path}: tensor {weight.name} is packed by bitsandbytes, {what}; dequantize it to BF16 first"
        )

    state_ending = "quant_state.bitsandbytes__nf4"
    if "nested_absmax" in beside:
        raise refuse(f"with scales that are quantized again ({beside['nested_absmax']}), which no codec holds")
    if set(beside) != {"absmax", "quant_map", state_ending}:
        raise refuse(f"with {', '.join(sorted(beside.values()))} beside it: not NF4 as rows can hold it")
    state = _state_of(checkpoint, weight, beside[state_ending])
    shape, block = state.get("shape"), state.get("blocksize")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    if not is_shape or type(block) is not int or block < 2 or state.get("quant_type") != "nf4":
        raise refuse(f"and {beside[state_ending]} says {state}, expected quant_type nf4, a blocksize and a 2-D shape")
    num_rows, dim = state["shape"]
    if dim % block:
        raise refuse(f"in blocks of {block} values that cross its rows of {dim}")
    if weight.num_bytes * 2 != num_rows * dim:
        raise _contradiction(checkpoint, weight, f"{beside[state_ending]} says {shape}")
    values = _tensor(checkpoint, weight, beside["quant_map"], ("F32",), (16,))
    if not np.array_equal(np.frombuffer(values.read_bytes(), "<f4"), _NF4_MAP):
        raise refuse(f"with other values in {values.name} than those of NF4")
    absmax = _tensor(checkpoint, weight, beside["absmax"], ("F32",), (num_rows * (dim // block),))
    return _checked(weight, StoredRows(f"nf4_fp32x{block}", num_rows, dim, absmax))


def _state_of(checkpoint: Checkpoint, weight: StoredTensor, name: str) -> dict[str, Any]:
    """Reads the JSON that bitsandbytes keeps as a tensor."""
    tensor = _tensor(checkpoint, weight, name, ("U8",), None)
    if tensor.num_bytes <= _STATE_BYTES_MAX:
        try:
            state = json.loads(tensor.read_bytes())
            if isinstance(state, dict):
                return state
        except (ValueError, RecursionError):
            pass
    raise _contradiction(checkpoint, weight, f"{name}, {tensor.num_bytes} bytes, is no JSON object")


def _tensor(
    checkpoint: Checkpoint, weight: StoredTensor, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None
) -> StoredTensor:
    """Returns a tensor beside a weight; raises `ConfigError` if it is not there, or not as it must be."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise ConfigError(f"{checkpoint.path}: tensor {name}, of {weight.name}, {checkpoint.why_not(name)}")
    if tensor.dtype not in dtypes or (shape is not None and tensor.shape != shape):
        expected = " or ".join(dtypes) + (f" {list(shape)}" if shape is not None else "")
        raise _contradiction(
            checkpoint, weight, f"{name} is {tensor.dtype} {list(tensor.shape)}, {expected} was expected"
        )
    return tensor


def _contradiction(checkpoint: Checkpoint, weight: StoredTensor, what: str) -> ConfigError:
    return ConfigError(
        f"{checkpoint.path}: tensor {weight.name} is {weight.dtype} {list(weight.shape)}, but {what}; download the "
        "checkpoint again, or dequantize the table to BF16"
    )


def _checked(weight: StoredTensor, rows: StoredRows) -> StoredRows:
    """Returns the rows if the codec takes so many values; raises `ConfigError` if they end within a block."""
    try:
        codec_row_bytes(rows.codec, rows.dim)
    except FormatError as error:
        raise ConfigError(f"tensor {weight.name}: {error}; dequantize it to BF16 first") from None
    return rows
