#!/usr/bin/env bash
# bitsandbytes' double quantization (compress_statistics, bnb_4bit_use_double_quant) keeps each block's largest
# magnitude as 8 bits around the mean of all blocks'. For a block far smaller than the others that number comes back
# negative, and with it the whole block has its signs flipped: 0.1 is read as -0.05 beside blocks of 100. A table with
# rare, small rows meets this; its mean error hides it.
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
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__, "on the CPU")
print("guess: quantizing the blocks' magnitudes once more makes values a little coarser; a magnitude stays positive")
BLOCK, blocks = 64, [0.001, 100.0, 50.0, 0.1, -0.2]
values = torch.cat([torch.full((BLOCK,), value) for value in blocks])


def read_back(double: bool) -> list[float]:
    packed, state = quantize_4bit(values, quant_type="nf4", blocksize=BLOCK, compress_statistics=double)
    return dequantize_4bit(packed, state).flatten()[::BLOCK].tolist()


once, twice = read_back(False), read_back(True)
print(f"seen: blocks of {blocks}, magnitudes in float32:    ", [round(value, 4) for value in once])
print(f"seen: blocks of {blocks}, magnitudes quantized again:", [round(value, 4) for value in twice])
assert torch.allclose(torch.tensor(once), torch.tensor(blocks))
assert [value * given < 0 for value, given in zip(twice, blocks, strict=True)] == [True, False, False, True, True]
PY
