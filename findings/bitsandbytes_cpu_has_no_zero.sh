#!/usr/bin/env bash
# bitsandbytes' 8-bit blocks (quantize_blockwise: 8-bit optimizers, nested statistics) on a CPU: a zero comes back as
# 2.1e-05 of its block's largest value, although the code table has an exact 0 and smaller steps beside it; a block of
# zeros comes back as -0.0. Padding rows and untouched optimizer state are zeros before, and none after.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - 2>errors.txt <<'PY' || { cat errors.txt; exit 1; }
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__, "on the CPU")
print("guess: the code table's nearest value is taken; it holds 0.0, so a zero stays a zero")
values = torch.tensor([1.0, 0.0, 1e-6, -1e-6, 0.5])
codes, state = quantize_blockwise(values)
back = dequantize_blockwise(codes, state)
nearest = state.code[(state.code[None] - values[:, None]).abs().argmin(1)]
print("seen: values              ", values.tolist())
print("seen: nearest of the table", [round(value, 7) for value in nearest.tolist()])
print("seen: read back           ", [round(value, 7) for value in back.tolist()])
assert nearest[1] == 0
assert back[2] == back[1] == -back[3]
assert 2e-5 < back[1] < 2.2e-5
zeros = dequantize_blockwise(*quantize_blockwise(torch.zeros(4)))
print("seen: a block of zeros    ", zeros.tolist())
assert torch.all(zeros == 0)
assert torch.all(zeros.signbit())
PY
