"""The device that an hbm tier lives on, and page-locked host memory.

Input: a name such as "cuda:0". Output: a `torch.device` that the kernels run on, a GPU or the CPU with Triton's
interpreter in its place; device memory; host memory that the device reads and writes. Errors: `ConfigError` for a
device that is not there, and for kernels that were loaded for the other kind; `BudgetError` for more memory than there
is.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BudgetError, ConfigError
from ...extras import missing
from ...units import format_bytes
from ..memory import allocate
from .pairs import Pairs

logger = logging.getLogger("tierstore")

INTERPRET = "TRITON_INTERPRET"
CPU_SPIN_S = 5e-4  # of one look at a mailbox: in the interpreter,
GPU_SPIN_S = 1e-6  # and over PCIe, where it takes a little longer


@dataclass(frozen=True)
class DramPart:
    """What DRAM holds of a table, for the device to read; None stands for what it does not hold.

    Attributes:
        rows: uint8 [bytes], all rows.
        records: uint8 [n, record_bytes], the records of the static set.
        named: Returns which records the device may read now, by record number, so many at most, the hottest first.
        area: uint8 [buckets, 64], the host's index of all placed entries, by record number in the placement file.
    """

    rows: np.ndarray | None = None
    records: np.ndarray | None = None
    named: Callable[[int], Pairs] = Pairs.nothing
    area: np.ndarray | None = None


def open_device(name: str) -> Any:
    """Returns the `torch.device` of a name, and loads the kernels for it; raises `ConfigError` if it cannot be had.

    "cpu" runs the kernels in Triton's interpreter, for tests: a process has either those or native ones.
    """
    torch = _load("torch", name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device: {name!r} is no device of torch ({error}); pass 'cuda:0', or leave hbm out"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r}: the hbm tier runs on CUDA devices, and for tests on 'cpu'; leave hbm out")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {name!r}: torch {torch.__version__} finds no GPU here; install a driver and a torch with CUDA, "
            f"pass device='cpu' to run the kernels in the interpreter, or leave hbm out"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if device.type == "cpu" and "triton" not in sys.modules:
        os.environ[INTERPRET] = "1"  # seen when triton is loaded, just below, and as long as it interprets
    _load("triton", name)
    interpreted = importlib.import_module("...kernels.gpu", __package__).INTERPRETED
    if interpreted != (device.type == "cpu"):
        made, remedy = ("interpreted", "unset") if interpreted else ("native", "set")
        raise ConfigError(
            f"device: {name!r}: the kernels of this process are {made} ones, as triton was loaded so; {remedy} "
            f"TRITON_INTERPRET=1 before triton is first imported"
        )
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def make_block(device: Any, num_bytes: int) -> Any:
    """Returns zeroed memory of the device as one tensor, uint8 [num_bytes]; raises `BudgetError` if it has not so
    much left.

    What torch has cached counts as taken.
    """
    import torch

    left = ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        left = f", of {format_bytes(total)} {free} bytes ({format_bytes(free)}) are free"
    try:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        raise BudgetError(
            f"hbm: {num_bytes} bytes ({format_bytes(num_bytes)}) cannot be had on {device}{left} ({error}); ask for "
            f"less, or end what else uses the device"
        ) from None


class PinnedMemory:
    """Host memory that the device reads and writes by its address: `block`, uint8, page-locked if there is a driver.

    `take` gives parts of it out, for as long as this lives. Not for several threads at once. A forked child does not
    have it: it must not look there.
    """

    def __init__(self, device: Any, num_bytes: int) -> None:
        """Raises `ConfigError` if the driver does not lock it: without, the device can ask the host for nothing."""
        self.block = allocate(num_bytes, inherited=False)
        self._taken_bytes = 0
        self._device = device
        why = lock(device, self.block)
        if why is not None:
            raise ConfigError(f"hbm: {format_bytes(num_bytes)} of host memory cannot be page-locked: {why}")

    @property
    def left_bytes(self) -> int:
        """Bytes not given out."""
        return max(0, len(self.block) - self._taken_bytes)

    def take(self, num_bytes: int, what: str) -> np.ndarray:
        """Returns zeroed memory, uint8 [num_bytes] at a multiple of 4,096; raises `BudgetError`,
        naming `what` it was for."""
        if num_bytes > self.left_bytes:
            raise BudgetError(
                f"{what}: {num_bytes} bytes of page-locked memory are wanted, {self.left_bytes} of {len(self.block)} "
                f"are left, a sixteenth of the dram budget; ask for more dram, or for fewer tokens at once"
            )
        part = self.block[self._taken_bytes : self._taken_bytes + num_bytes]
        self._taken_bytes = min(len(self.block), -(-(self._taken_bytes + num_bytes) // 4096) * 4096)
        return part

    def close(self) -> None:
        """Unlocks it and lets it go. The device must not use it any more. Closing twice is harmless."""
        unlock(self._device, self.block)
        self.block = self.block[:0].copy()


def lock(device: Any, memory: np.ndarray) -> str | None:
    """Page-locks host memory in place, for the device to read and write; returns why it could not be,
    None if it was."""
    if device.type != "cuda" or len(memory) == 0:
        return None
    import torch

    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        error = runtime.cudaHostRegister(memory.ctypes.data, len(memory), 0)
    if int(error) == 0:
        return None
    _forget_last_error(device)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    allowed = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    return (
        f"the driver says {runtime.cudaGetErrorString(error)} (error {int(error)}); the process may lock {allowed} "
        f"('ulimit -l'): raise that, or ask for less"
    )


def _forget_last_error(device: Any) -> None:
    """Takes the error of a call that failed from where the runtime keeps it: the next launch, of whoever,
    would raise it."""
    import torch

    with contextlib.suppress(RuntimeError):  # that one; torch binds no other way to take it
        torch.empty(1, dtype=torch.uint8, device=device).fill_(1)


def unlock(device: Any, memory: np.ndarray) -> None:
    """Undoes `lock`. The device must not use the memory any more."""
    if device.type == "cuda" and len(memory):
        import torch

        with torch.cuda.device(device):
            error = torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)
        if int(error) != 0:
            _forget_last_error(device)
            logger.warning("page-locked memory could not be given back: error %d of the driver", int(error))


def wait_for_current(device: Any) -> None:
    """Blocks until the device has done what its current stream was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.current_stream(device).synchronize()


def is_capturing(device: Any) -> bool:
    """Returns whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda":
        return False
    import torch

    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())


def spins_in(device: Any, seconds: float) -> int:
    """Returns how many looks at a mailbox take about so long on the device."""
    return max(1, int(seconds / (CPU_SPIN_S if device.type == "cpu" else GPU_SPIN_S)))


def _load(package: str, device_name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing(f"device: {device_name!r}: the hbm tier", "gpu", error) from None
