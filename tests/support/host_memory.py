"""Host memory for tests of the GPU's kernels: page-locked where there is a GPU, poisoned,
and steps that begin at zero."""

from __future__ import annotations

import numpy as np
import torch
from support.shapes import POISON

POISON_INT64 = int.from_bytes(bytes([POISON] * 8), "little", signed=True)
POISON_INT32 = int.from_bytes(bytes([POISON] * 4), "little", signed=True)


def host_bytes(num_bytes: int) -> np.ndarray:
    """Poisoned bytes at a multiple of 64, that the device can read and write at their host address."""
    block = torch.full((num_bytes + 64,), POISON, dtype=torch.uint8)
    if torch.cuda.is_available():
        block = block.pin_memory()
    memory = block.numpy()  # holds the block
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


def host_words(num_words: int) -> np.ndarray:
    """The same as int64, zero."""
    words = host_bytes(8 * num_words).view(np.int64)
    words[:] = 0
    return words


def address_of(array: np.ndarray) -> int:
    return array.ctypes.data


def wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
