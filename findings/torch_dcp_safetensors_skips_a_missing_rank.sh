#!/usr/bin/env bash
# torch.distributed.checkpoint in safetensors: if the file of a rank in the middle is missing, HuggingFaceStorageReader loads the rest
# and leaves those rows of the target as they were, without an error. Nothing in the files says how many ranks or rows there were.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import os
import warnings

import safetensors
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

warnings.simplefilter("ignore")
print("torch", torch.__version__, "safetensors", safetensors.__version__)
print("guess: to load a tensor of which a part is missing is an error")
os.mkdir("ranks")
for rank in range(3):
    info = '{"w": {"saved_offsets": [%d, 0]}}' % (2 * rank)
    save_file({"w": torch.full((2, 1), rank + 1.0)}, f"ranks/shard-{rank}.safetensors", {"DCP_SHARDING_INFO": info})


def loaded(rows: int) -> list[float]:
    state = {"w": torch.full((rows, 1), -1.0)}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader("ranks"), no_dist=True)
    return state["w"].flatten().tolist()


whole = loaded(6)
print("seen: all three ranks:", whole)
assert whole == [1, 1, 2, 2, 3, 3]
os.remove("ranks/shard-1.safetensors")
holed = loaded(6)
print("seen: without the second:", holed)
assert holed == [1, 1, -1, -1, 3, 3]
os.remove("ranks/shard-2.safetensors")
shorter = loaded(2)
print("seen: the first alone, as a tensor of two rows:", shorter)
assert shorter == [1, 1]
PY
