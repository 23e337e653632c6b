"""The device of tests that open an hbm tier: the GPU if there is one, else the CPU, with interpreted kernels.

The machine's device files decide, not torch: loading torch takes seconds, and most tests need neither.
"""

from __future__ import annotations

import os
from pathlib import Path

INTERPRET = "TRITON_INTERPRET"  # set to "1" before triton loads, it interprets kernels on the CPU
HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES that hide every GPU


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether a program of this environment may use a GPU of this machine."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in HIDDEN and any(devices.glob("nvidia[0-9]*"))


DEVICE = "cuda:0" if has_gpu() and os.environ.get(INTERPRET) != "1" else "cpu"
