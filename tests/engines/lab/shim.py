"""Lets vLLM run its CUDA model code on a CPU: in the lab's environments only, and only if TIERSTORE_LAB is set.

Input: none; a .pth file of the environment imports it in every process. Output: Triton's kernels run in its
interpreter, with the arithmetic of bf16 that it lacks; operators that torchvision's CPU build misses are declared.
Errors: none. It changes how kernels run, not what is asked of tierstore.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

ARITHMETIC = ("fadd", "fsub", "fmul", "fdiv", "frem", "precise_divf", "approx_divf", "minimumf", "maximumf")
ARITHMETIC += ("minnumf", "maxnumf")
COMPARISONS = tuple(f"fcmp{order}{what}" for order in "OU" for what in ("LT", "GT", "LE", "GE", "EQ", "NE"))


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 as bits, uint16, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 as bits, uint16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


class CpuDriver:
    """What vLLM looks for to believe that Triton has a driver here."""

    @staticmethod
    def is_active() -> bool:
        return True


def install() -> None:
    """Patches this process."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.backends import Backend, backends
    from triton.runtime.interpreter import InterpreterBuilder

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    install.library = library  # type: ignore[attr-defined]  # it declares as long as it lives
    backends["cpu"] = Backend(None, CpuDriver)
    _patch_masks(InterpreterBuilder)
    _patch_casts(InterpreterBuilder)
    for name in ARITHMETIC:
        _patch_arithmetic(InterpreterBuilder, f"create_{name}", narrowed=True)
    for name in COMPARISONS:
        _patch_arithmetic(InterpreterBuilder, f"create_{name}", narrowed=False)


def _patch_masks(builder: Any) -> None:
    load, store = builder.create_masked_load, builder.create_masked_store

    def as_bool(mask: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return mask

    builder.create_masked_load = lambda self, ptrs, mask, *more: load(self, ptrs, as_bool(mask), *more)
    builder.create_masked_store = lambda self, ptrs, value, mask, *more: store(self, ptrs, value, as_bool(mask), *more)


def _patch_casts(builder: Any) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    stock = builder.cast_impl

    def cast(self: Any, source: Any, dst_type: Any) -> Any:
        found, wanted = source.dtype.scalar, dst_type.scalar
        if wanted == tl.bfloat16 and found != tl.bfloat16:
            wide = source if found == tl.float32 else stock(self, source, tl.float32)
            return TensorHandle(narrow(wide.data), tl.bfloat16)
        if found == tl.bfloat16 and wanted != tl.bfloat16:
            wide = TensorHandle(widen(source.data), tl.float32)
            return wide if wanted == tl.float32 else stock(self, wide, dst_type)
        return stock(self, source, dst_type)

    builder.cast_impl = cast


def _patch_arithmetic(builder: Any, name: str, *, narrowed: bool) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    stock = getattr(builder, name, None)
    if stock is None:
        return

    def widened(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return stock(self, lhs, rhs)
        wide = [TensorHandle(widen(side.data), tl.float32) for side in (lhs, rhs)]
        result = stock(self, *wide)
        return TensorHandle(narrow(result.data), tl.bfloat16) if narrowed else result

    setattr(builder, name, widened)


if os.environ.get("TIERSTORE_LAB"):
    install()
