#!/usr/bin/env bash
# Rows of a packed fp4 table (float4_e2m1fn_x2, as NVFP4 tables are kept) come out by index_select and nn.functional.embedding,
# but not by the same index in brackets.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
print("guess: table[ids], table.index_select(0, ids) and embedding(ids, table) are one gather: all work, or none")
table = torch.arange(32, dtype=torch.uint8).reshape(8, 4).view(torch.float4_e2m1fn_x2)
ids = torch.tensor([5, 1])
expected = torch.arange(32, dtype=torch.uint8).reshape(8, 4).index_select(0, ids)
for name, gather in {
    "index_select": lambda: table.index_select(0, ids),
    "functional.embedding": lambda: torch.nn.functional.embedding(ids, table),
}.items():
    assert torch.equal(gather().view(torch.uint8), expected)
    print(f"seen: {name}: right rows")
try:
    table[ids]
except NotImplementedError as error:
    print("seen: table[ids]: NotImplementedError:", error)
else:
    raise SystemExit("table[ids] works for float4_e2m1fn_x2 now")
PY
