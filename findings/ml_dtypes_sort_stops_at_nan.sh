#!/usr/bin/env bash
# numpy.sort puts NaN last for NumPy's own floats. For ml_dtypes' bfloat16 and float8 (how JAX, safetensors and others
# give them to NumPy) one NaN leaves the array unsorted, argsort and unique likewise: [3, nan, 1] stays as it is, and
# values occur twice in unique.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np

print("ml_dtypes", ml_dtypes.__version__, "numpy", np.__version__)
print("guess: NaN is sorted to the end, and the numbers before it are in order, for every float type")
values = [3.0, np.nan, 1.0, 2.0, np.nan, 1.0]


def told(dtype) -> tuple[list[float], list[float]]:
    array = np.array(values, dtype=dtype)
    return np.sort(array).astype(float).tolist(), np.unique(array).astype(float).tolist()


for dtype in (np.float16, np.float32):
    ordered, unique = told(dtype)
    print(f"seen: {np.dtype(dtype).name}: sort {ordered}, unique {unique}")
    assert ordered[:4] == [1.0, 1.0, 2.0, 3.0]
    assert unique[:3] == [1.0, 2.0, 3.0]
    assert len(unique) == 4
for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
    ordered, unique = told(dtype)
    print(f"seen: {np.dtype(dtype).name}: sort {ordered}, unique {unique}")
    numbers = [value for value in ordered if value == value]
    assert numbers != sorted(numbers)
    assert len(unique) > 4
PY
