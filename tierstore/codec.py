"""What a codec's name says about the bytes of a row.

Input: a codec's name. Output: a `Codec`: how values and scales are stored, and how they are multiplied. FORMAT.md lists
the names. Errors: `FormatError` for names that this version does not know, or that contradict themselves.

A row is the bytes of its values, then those of its scales. A name is the type of the values, and, if a row carries
scales, an underscore, their type, and "x" with how many values share one; without "x" one scale serves the whole row:
"int8_fp32", "uint4b8_bf16x128". A factor for all values of the table follows "*", or "/" if it divides. Rows of GGUF
files are named by their type: "gguf_q8_0".
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from .errors import FormatError

FLOAT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # values as they are
SCALE_BYTES = {"e8m0": 1, "e4m3": 1, **FLOAT_BYTES}
# Bits of a quantized value, and the types of scales that it may have.
_FLOATS = tuple(FLOAT_BYTES)
_QUANTIZED: dict[str, tuple[int, tuple[str, ...]]] = {
    "fp8_e4m3": (8, ("e8m0", *_FLOATS)),
    "fp4_e2m1": (4, ("e8m0", "e4m3")),
    "int8": (8, _FLOATS),
    "uint8b128": (8, _FLOATS),
    "uint4b8": (4, _FLOATS),
    "nf4": (4, ("fp32",)),
}
_FIXED_BLOCKS = {"e8m0": 32, "e4m3": 16}  # values that share a scale, where a standard says how many: MX and NVFP4
GGUF_BLOCKS = {"gguf_q8_0": (32, 34), "gguf_q4_0": (32, 18), "gguf_q4_k": (256, 144), "gguf_iq4_nl": (32, 18)}
"""Values and bytes of a block, by codec."""
_FLOAT32_MAX = float.fromhex("0x1.fffffep+127")
_NAME = re.compile(
    rf"(?P<values>{'|'.join(_QUANTIZED)})(?:_(?P<scale>{'|'.join(SCALE_BYTES)})(?:x(?P<block>[1-9]\d{{0,6}}))?)?"
    r"(?:(?P<operator>[*/])(?P<factor>.*))?",
)


@dataclass(frozen=True)
class Codec:
    """A codec's name, taken apart.

    values: the type of the values, "raw" if it is not known; or the name of a block of a GGUF file. scale: the type of
    a row's own scales, "" without. block: values that share a scale, or one block of a GGUF file; 0: the whole row.
    factor: of all values of the table, as a float32 multiplies it; divides: the scales are divided by it instead.
    """

    values: str
    scale: str = ""
    block: int = 0
    factor: float = 1.0
    divides: bool = False

    @property
    def value_bits(self) -> int:
        """Bits of one value, 0 if the codec fixes none or blocks hold values and scales together."""
        return FLOAT_BYTES.get(self.values, 0) * 8 or _QUANTIZED.get(self.values, (0,))[0]

    def row_bytes(self, dim: int) -> int | None:
        """Returns the bytes of a row of `dim` values, None for "raw". Raises `FormatError` for parts of blocks."""
        if self.values == "raw":
            return None
        block = self.block or dim
        if dim < 1 or dim % block or block * self.value_bits % 8:
            raise FormatError(
                f"{dim} values a row are not whole blocks of {block}"
                + (f", of {self.value_bits} bits each, in whole bytes" if self.value_bits else "")
            )
        if self.values in GGUF_BLOCKS:
            return dim // block * GGUF_BLOCKS[self.values][1]
        return dim * self.value_bits // 8 + (dim // block * SCALE_BYTES[self.scale] if self.scale else 0)


@functools.lru_cache(maxsize=256)
def parse_codec(name: str) -> Codec:
    """Returns what a codec's name says. Raises `FormatError` for others than FORMAT.md lists."""
    if name == "raw" or name in FLOAT_BYTES:
        return Codec(name)
    if name in GGUF_BLOCKS:
        return Codec(name, block=GGUF_BLOCKS[name][0])
    match = _NAME.fullmatch(name)
    if match is None:
        raise _unknown(name)
    values, scale, operator = match["values"], match["scale"] or "", match["operator"]
    block = int(match["block"] or 0)
    if operator:
        allowed = scale == "e4m3" or (values == "fp8_e4m3" and not scale and operator == "*")
    else:
        allowed = bool(scale) or values == "fp8_e4m3"
    if not allowed or (scale and scale not in _QUANTIZED[values][1]) or _FIXED_BLOCKS.get(scale, block) != block:
        raise _unknown(name)
    factor = _factor(name, match["factor"]) if operator else 1.0
    if operator == "/" and not factor:
        raise FormatError(f"codec {name!r}: scales cannot be divided by 0")
    return Codec(values, scale, block, factor, operator == "/")


def _factor(name: str, text: str) -> float:
    """Reads a C99 hexadecimal float; "fp8_e4m3*0x1.8p-7" has 0.01171875."""
    try:
        factor = float.fromhex(text) if text else 1.0
    except (ValueError, OverflowError):
        factor = math.nan
    if not abs(factor) <= _FLOAT32_MAX:
        raise FormatError(f"codec {name!r}: {text!r} is not a hexadecimal float that a float32 can hold")
    return factor


def _unknown(name: str) -> FormatError:
    scaled = (
        f"{values}_{scale}" + (f"x{_FIXED_BLOCKS[scale]}" if scale in _FIXED_BLOCKS else "[xN]")
        for values, (_, scales) in _QUANTIZED.items()
        for scale in scales
    )
    names = [*FLOAT_BYTES, "fp8_e4m3[*FACTOR]", *scaled, *GGUF_BLOCKS]
    return FormatError(
        f"codec {name!r} is not known to this version; it knows {', '.join(names)} and raw; *FACTOR or /FACTOR may "
        "follow scales of type e4m3"
    )
