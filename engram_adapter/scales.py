"""Scales that belong to a stored tensor, and what makes a tensor something else than rows of values.

Input: a checkpoint and the name of one of its tensors. Output: how its rows are stored: the codec, and beside the
tensor the plane of scales, if each row carries its own. Errors: `ConfigError`, naming the scale, for scales that no
codec of a store can carry; for packed and flat quantized weights, whose bytes are not rows;
and for scales that are not there.

A scale belongs to a weight by its name: `X.weight` has `X.weight_scale`, `X.weight_scale_inv`, `X.scale` and others
beside it. Every one of these multiplies the stored value, `weight_scale_inv` too.
"""

from __future__ import annotations

import math
import re

from tierstore import ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.stored_tensor import StoredTensor

from .packings import FLOATS, StoredRows, one_scale, packed_rows

SCALE_NAMES = (
    "scale",
    "weight_scale_inv",
    "weight_scale",
    "scale_inv",
)  # of DeepSeek's weights; the first is the published one
SCALE_BLOCK = 32  # columns that share one e8m0 scale in a row
VALUE_CODECS = {"F32": ("fp32", 4), "F16": ("fp16", 2), "BF16": ("bf16", 2), "F8_E4M3": ("fp8_e4m3", 1)}
_WIDE = ("F64", "F32", "F16", "BF16", "I64", "U64", "BOOL")  # values as they are, whatever lies beside
_PACKED_DTYPES = ("U8", "I8", "I32", "U32", "F4")
_WEIGHT_LEAVES = ("weight", "qweight", "weight_packed", "W_q")
_PART = re.compile(r"^(?P<table>.*\.)?shards?[._]\d+\.(?P<leaf>\w+)$")  # of a table that is stored in parts

# Tensors beside a quantized weight, by the ending of their names, and who writes them.
# The first that fits names the scheme.
_SCHEMES = (
    (r"absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+", "packed by bitsandbytes (NF4 or FP4)"),
    (r"SCB|weight_format", "int8 of bitsandbytes"),
    (r"qzeros|(?:weight_)?g_idx|qweight", "packed by GPTQ or AWQ"),
    (r"weight_scale_2|weight_global_scale|weight_double_scale", "packed as NVFP4"),
    (r"weight_packed|weight_shape", "packed by compressed-tensors"),
    (r"biases", "packed by MLX"),
    (r"weight_zero_point|zero_point|weight_zeros|zeros", "quantized with zero points"),
    (r"weight_blocks|blocks", "packed as MXFP4"),
    (r"(?:weight_)?scales?(?:_inv)?|scale_weight", "quantized"),
)
# Asked 16,000 times of a table of 128 parts.
_ANY_SCHEME = re.compile("|".join(f"(?:{pattern})" for pattern, _ in _SCHEMES))
# Beside a weight, but of activations or of other things than the weight's values.
_OF_OTHERS = re.compile(r"(?:input|output|activation|k|v|q|prob)_(?:global_)?scale(?:_ub|_inv)?$")


def rows_of_weight(checkpoint: Checkpoint, weight: StoredTensor) -> StoredRows:
    """Returns the codec and the scales of a 2-D weight whose rows are a table.

    Raises `ConfigError` if its values need something that no codec carries,
    or if it does not hold one row after another.
    """
    endings = _endings_beside(checkpoint, weight.name)
    beside = sorted(endings)
    num_rows, dim = weight.shape
    if weight.dtype.startswith("GGUF_"):
        return StoredRows(weight.dtype.lower(), num_rows, dim)
    if weight.dtype in _WIDE:
        return StoredRows(VALUE_CODECS.get(weight.dtype, ("raw", 0))[0], num_rows, dim)
    by_ending = {ending: name for name, ending in endings.items()}
    packed = packed_rows(checkpoint, weight, by_ending) if len(by_ending) == len(beside) > 0 else None
    if packed is not None:
        return packed
    refuse_packed(checkpoint, weight, beside)
    if beside and not weight.dtype.startswith("F8_"):
        raise ConfigError(
            f"{checkpoint.path}: tensor {weight.name} is {weight.dtype} {list(weight.shape)} with a scale beside it "
            f"({_in_words(beside)}), so it is quantized or packed and its values are not in its rows; use the "
            f"checkpoint before quantization, or dequantize it first"
        )
    if weight.dtype != "F8_E4M3":
        if beside:
            raise ConfigError(
                f"{checkpoint.path}: tensor {weight.name} is {weight.dtype} {list(weight.shape)} and has scales beside "
                f"it ({_in_words(beside)}), which no codec of a store holds for {weight.dtype}: its rows would lose "
                f"them; dequantize it to BF16 first"
            )
        return StoredRows("raw", num_rows, dim)
    if not beside:
        if checkpoint.absent_files:
            raise ConfigError(
                f"{checkpoint.path}: tensor {weight.name} is F8_E4M3, and its scale may lie in a file that is not "
                f"here: {checkpoint.why_missing()}"
            )
        return StoredRows("fp8_e4m3", num_rows, dim)
    if len(beside) > 1:
        raise ConfigError(
            f"{checkpoint.path}: tensor {weight.name} has {len(beside)} scales beside it ({_in_words(beside)}), a row "
            f"can carry one; dequantize it to BF16 first"
        )
    return scaled_rows(checkpoint, weight, beside[0])


def refuse_packed(checkpoint: Checkpoint, weight: StoredTensor, beside: list[str]) -> None:
    """Raises `ConfigError` if name, type or neighbours of a tensor mean that its bytes are not rows."""
    leaf = weight.name.rpartition(".")[2]
    marks = {leaf, *(name.rpartition(".")[2] for name in beside), *(name[len(weight.name) + 1 :] for name in beside)}
    for pattern, scheme in _SCHEMES[:-1]:
        if any(re.fullmatch(pattern, mark) for mark in marks):
            named = f", with {_in_words(beside)} beside it" if beside else ""
            raise ConfigError(
                f"{checkpoint.path}: tensor {weight.name} is {scheme}{named}: {weight.dtype} {list(weight.shape)} does "
                "not hold one row of values after another; use the checkpoint before quantization, "
                "or dequantize it first"
            )
    method = checkpoint.config.get("quantization_config") or {}
    method = method.get("quant_method") if isinstance(method, dict) else None
    if method and leaf in _WEIGHT_LEAVES and weight.dtype in _PACKED_DTYPES:
        raise ConfigError(
            f"{checkpoint.path}: tensor {weight.name} is {weight.dtype} {list(weight.shape)}, and config.json says "
            f"that {method} quantized the model: it is packed; use the checkpoint before quantization, "
            "or dequantize it first"
        )


def refuse_packed_name(checkpoint: Checkpoint, name: str) -> None:
    """Raises `ConfigError` if tensor `name` is there and packed, before its type is found to be another one."""
    weight = checkpoint.tensors.get(name)
    if weight is not None and weight.dtype not in _WIDE:
        refuse_packed(checkpoint, weight, sorted(_endings_beside(checkpoint, name)))


def scaled_rows(checkpoint: Checkpoint, weight: StoredTensor, name: str) -> StoredRows:
    """Returns how rows of an fp8 weight are stored with the scale `name`: one for all, or bytes in each row."""
    scale = checkpoint.tensors.get(name)
    if scale is None:
        raise ConfigError(f"{checkpoint.path}: tensor {name}, the scale of {weight.name}, {checkpoint.why_not(name)}")
    num_rows, dim = weight.shape
    if math.prod(scale.shape) == 1 and scale.dtype in FLOATS:
        return StoredRows(f"fp8_e4m3*{one_scale(scale).hex()}", num_rows, dim)
    if scale.dtype in ("F8_E8M0", "U8") and dim % SCALE_BLOCK == 0 and scale.shape == (num_rows, dim // SCALE_BLOCK):
        return StoredRows("fp8_e4m3_e8m0x32", num_rows, dim, scale)
    raise ConfigError(
        f"{checkpoint.path}: {name} is {scale.dtype} {list(scale.shape)}, {_shape_in_words(scale, weight)}; rows of "
        f"{weight.name}, {weight.dtype} {list(weight.shape)}, can carry one {', '.join(FLOATS)} for the whole "
        f"table, or one e8m0 byte for {SCALE_BLOCK} columns; dequantize the table to BF16 first"
    )


def _endings_beside(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """Returns the names of the tensors that belong to the values of tensor `name`, also of those that are not there,
    each with what it adds to the name of the module, of the tensor, or of the table that the tensor is a part of."""
    module, dot, leaf = name.rpartition(".")
    bases = [module + dot] if leaf in _WEIGHT_LEAVES else []
    bases += [f"{name}_", f"{name}."]
    part = _PART.match(name)
    if part:
        bases.append(part["table"] or "")
    found: dict[str, str] = {}
    for base in bases:
        for other in checkpoint.names_under(base):
            if other != name and _belongs(other, base):
                found.setdefault(other, other[len(base) :])
    return found


def _belongs(name: str, base: str) -> bool:
    ending = name[len(base) :]
    return not _OF_OTHERS.search(ending) and _ANY_SCHEME.fullmatch(ending) is not None


def _shape_in_words(scale: StoredTensor, weight: StoredTensor) -> str:
    num_rows, dim = weight.shape
    if scale.shape in ((num_rows,), (num_rows, 1)):
        return "a scale for each row"
    if scale.shape in ((dim,), (1, dim)):
        return "a scale for each column"
    if len(scale.shape) == 2 and scale.shape[0] == num_rows and scale.shape[1] and dim % scale.shape[1] == 0:
        return f"a scale for {dim // scale.shape[1]} columns of a row"
    if len(scale.shape) == 2 and all(0 < few <= many for few, many in zip(scale.shape, weight.shape, strict=True)):
        return (
            f"a scale for a block of rows and columns ({-(-num_rows // scale.shape[0])} x {-(-dim // scale.shape[1])})"
        )
    return "which divides neither its rows nor its columns"


def _in_words(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
