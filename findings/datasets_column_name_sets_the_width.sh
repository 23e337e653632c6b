#!/usr/bin/env bash
# Hugging Face datasets chooses the integer type of a column by its name: the same Python integers become int32 as input_ids, int8 as
# attention_mask and int64 as tokens. A reader that takes one width for all token columns misreads files of others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.0.1 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import datasets
import pyarrow

print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
print("guess: lists of Python integers become int64, whatever the column is called")


def width(name: str, values: list[list[int]]) -> str:
    return datasets.Dataset.from_dict({name: values}).features[name].feature.dtype


seen = {name: width(name, [[1, 0], [1]]) for name in ("tokens", "input_ids", "attention_mask", "token_type_ids")}
for name, dtype in seen.items():
    print(f"seen: {name}: {dtype}")
assert seen == {"tokens": "int64", "input_ids": "int32", "attention_mask": "int8", "token_type_ids": "int8"}
wide = width("input_ids", [[1, 2**31], [1]])
print("seen: input_ids with a value of 2**31:", wide)
assert wide == "int64"
PY
