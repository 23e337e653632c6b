#!/usr/bin/env bash
# datasets with the format "numpy" or "torch": if one value of an integer column is null, the others come as float32,
# and ids above 2**24 come as their neighbours. Which rows are asked for together decides: row 0 alone is exact, rows
# 0 and 1 together are not. float64 columns come as float32 (1e300 as infinity), and uint64 ids above 2**63 as
# negative numbers, null or not.
#
# Likely guess: a null is refused or masked, or turns the column into float64 with NaN, as pandas and pyarrow do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    datasets==5.2.0 pyarrow==26.0.1 torch==2.13.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder" "$folder/venv/bin/python" - 2>/dev/null <<'PY'
import datasets
import numpy as np
import pyarrow

print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
print("guess: an id of 16,777,217 is read as 16,777,217, whatever its neighbours are")
row_id = 2**24 + 1
data = datasets.Dataset.from_dict({"id": [row_id, None], "ids": [[row_id, None], [row_id, row_id]]})
assert data[:]["id"] == [row_id, None]
assert data.with_format("pandas")[:]["id"].tolist()[0] == row_id
for kind in ("numpy", "torch"):
    rows = data.with_format(kind)
    alone, together, nested = rows[:1]["id"], rows[:]["id"], rows[:]["ids"]
    print(f"seen: {kind}: row 0 alone: {alone.dtype} {int(alone[0]):,}; both: {together.dtype} {int(together[0]):,}")
    print(f"seen: {kind}: lists: a row without a null, beside one with a null, {nested.dtype} {int(nested[1][0]):,}")
    assert int(alone[0]) == row_id
    assert int(together[0]) == int(nested[1][0]) == row_id - 1
    assert str(together.dtype).endswith("float32")
wide = datasets.Dataset.from_dict({"key": np.array([2**63 + 5], np.uint64), "value": [1e300]}).with_format("numpy")[:]
print("seen: numpy: a uint64 of 2**63 + 5 and a float64 of 1e300:", wide["key"][0], wide["value"][0])
assert wide["key"][0] == -(2**63) + 5
assert np.isinf(wide["value"][0])
PY
