"""Where the kernels run: natively on a GPU, and on the CPU, in Triton's interpreter, everywhere else."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the kernels of this process run on."""
    from tierstore.kernels.gpu import INTERPRETED

    return torch.device("cpu" if INTERPRETED else "cuda:0")
