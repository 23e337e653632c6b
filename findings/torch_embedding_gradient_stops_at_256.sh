#!/usr/bin/env bash
# torch sums the gradients of an embedding row in the table's own type, although index_add on the same values does not.
# A bfloat16 row that a batch names 5,000 times, each with a gradient of 1, gets 256; a float16 row gets 2,048.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
print("guess: repeated rows are summed in float32 and rounded once, as index_add and sum do: about 5,000")


def summed(dtype: torch.dtype, sparse: bool) -> float:
    embedding = torch.nn.Embedding(2, 1, sparse=sparse, dtype=dtype)
    rows = embedding(torch.zeros(5000, dtype=torch.long))
    rows.backward(torch.ones_like(rows))
    gradient = embedding.weight.grad
    return float(gradient.coalesce().to_dense()[0] if sparse else gradient[0])


ids, ones = torch.zeros(5000, dtype=torch.long), torch.ones(5000, 1, dtype=torch.bfloat16)
added = float(torch.zeros(2, 1, dtype=torch.bfloat16).index_add(0, ids, ones)[0])
seen = {(str(dtype), sparse): summed(dtype, sparse) for dtype in (torch.bfloat16, torch.float16) for sparse in (False, True)}
for (dtype, sparse), value in seen.items():
    print(f"seen: gradient of {dtype}, sparse={sparse}: {value:.0f}")
print(f"seen: index_add of the same bfloat16 values: {added:.0f}")
assert seen["torch.bfloat16", False] == seen["torch.bfloat16", True] == 256
assert seen["torch.float16", False] == seen["torch.float16", True] == 2048
assert abs(added - 5000) < 16
PY
