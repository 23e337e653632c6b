"""The device of tests that open an hbm tier: a GPU where there is one, else the CPU, with interpreted kernels."""

import os

import torch

DEVICE = "cuda:0" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
