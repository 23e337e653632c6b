"""How every kernel of this folder is launched: on the device that its tensors lie on, asynchronously, without
allocating.

Input: tensors. Output: launches. Errors: `ValueError` for tensors that the kernels cannot reach: those of the
interpreter want CPU tensors, native ones CUDA tensors.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

# How triton was loaded, by the environment of that moment, and so how all kernels of this process are made: its own
# functions are of the one kind or the other already, and kernels of both kinds cannot call each other.
INTERPRETED: bool = not isinstance(tl.sum, triton.JITFunction)
if INTERPRETED or triton.knobs.runtime.interpret:
    triton.knobs.runtime.interpret = INTERPRETED  # asked again later, when the environment may say otherwise

_interpreter_lock = threading.Lock()  # the interpreter keeps the launch under way in global variables


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Makes `device` the current one for a launch. Raises `ValueError` if the kernels do not run on it."""
    wanted = "cpu" if INTERPRETED else "cuda"
    if device.type != wanted:
        how = "interpreted (TRITON_INTERPRET=1)" if INTERPRETED else "native"
        raise ValueError(f"tensors on {device}: the kernels are {how} in this process and want tensors on {wanted}")
    if INTERPRETED:
        with _interpreter_lock, np.errstate(over="ignore", invalid="ignore"):  # a GPU does not warn either
            yield
    else:
        with torch.cuda.device(device):
            yield


def block_of(wanted: int, native: int, interpreted: int = 1024) -> int:
    """Returns how many items a program takes, a power of two: `native` on a GPU; interpreted, few and large programs.

    wanted: items in all, so that the interpreter does not work on lanes without an item.
    """
    if not INTERPRETED:
        return native
    return min(interpreted, max(1, triton.next_power_of_2(wanted)))


def check(name: str, tensor: Any, dtype: torch.dtype, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Raises `ValueError` unless `tensor` is contiguous, of this dtype and shape (None: any length), on `device`."""
    fits = (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype == dtype
        and tensor.device == device
        and tensor.ndim == len(shape)
        and all(want is None or want == have for want, have in zip(shape, tensor.shape, strict=True))
        and tensor.is_contiguous()
    )
    if not fits:
        found = (
            f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            if isinstance(tensor, torch.Tensor)
            else type(tensor)
        )
        expected = ["any" if want is None else want for want in shape]
        raise ValueError(f"{name} is {found}, expected {dtype} {expected} on {device}, contiguous")
