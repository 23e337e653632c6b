#!/usr/bin/env bash
# In gguf's reader a tensor's own shape is the reverse of its data's shape: a table of 6 rows of 64 values says [64, 6], its data
# is (6, 64). The writer takes (6, 64). So reader.shape[0] is the length of a row, not the number of rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import gguf
import numpy as np

print("gguf", version("gguf"), "numpy", np.__version__)
print("guess: tensor.shape is the shape that was written, and that of tensor.data")
writer = gguf.GGUFWriter("table.gguf", "llama")
table = np.arange(6 * 64, dtype=np.float32).reshape(6, 64)
writer.add_tensor("table", table)
packed = gguf.quants.quantize(table, gguf.GGMLQuantizationType.Q8_0)
writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
seen = {t.name: (t.shape.tolist(), t.data.shape, t.data.dtype.name) for t in gguf.GGUFReader("table.gguf").tensors}
for name, (shape, data, dtype) in seen.items():
    print(f"seen: {name}: tensor.shape {shape}, tensor.data.shape {data}, {dtype}")
assert seen["table"] == ([64, 6], (6, 64), "float32")
assert seen["packed"] == ([64, 6], (6, 68), "uint8")
PY
