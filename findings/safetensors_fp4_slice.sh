#!/usr/bin/env bash
# safetensors stores a torch float4_e2m1fn_x2 tensor [8, 4] (two values a byte) as F4 [8, 8], counting values. get_tensor gives
# [8, 4] back; get_slice says [8, 8] and raises on any slice. So rows of a large fp4 table cannot be read in part through it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import struct

import safetensors
import torch
from safetensors.torch import save_file

print("safetensors", safetensors.__version__, "torch", torch.__version__)
print("guess: the header has torch's shape, and a slice of rows reads as it does for every other dtype")
table = torch.arange(32, dtype=torch.uint8).reshape(8, 4).view(torch.float4_e2m1fn_x2)
save_file({"w": table}, "f4.safetensors")
with open("f4.safetensors", "rb") as file:
    header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
print("seen: torch's shape", list(table.shape), "header", header["w"]["dtype"], header["w"]["shape"])
assert header["w"] == {"dtype": "F4", "shape": [8, 8], "data_offsets": [0, 32]}
with safetensors.safe_open("f4.safetensors", "pt") as file:
    whole = file.get_tensor("w")
    assert torch.equal(whole.view(torch.uint8), table.view(torch.uint8))
    rows = file.get_slice("w")
    print("seen: get_tensor", list(whole.shape), "get_slice", rows.get_shape())
    assert list(whole.shape) == [8, 4]
    assert list(rows.get_shape()) == [8, 8]
    try:
        rows[0:2]
    except RuntimeError as error:
        print("seen: get_slice('w')[0:2]: RuntimeError:", error)
    else:
        raise SystemExit("slices of F4 tensors work now")
PY
