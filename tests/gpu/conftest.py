"""Where the kernels run: natively on a GPU, and on the CPU, in Triton's interpreter, everywhere else."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the kernels of this process run on."""
    from tierstore.kernels.gpu import INTERPRETED

    return torch.device("cpu" if INTERPRETED else "cuda:0")
