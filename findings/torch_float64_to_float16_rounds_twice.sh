#!/usr/bin/env bash
# torch casts float64 to float16 through float32 and so rounds twice; NumPy, and the processor's own rule, round once.
# A value just above the middle of two halves is first rounded onto the middle, then to even, away from it.
# 65519.9999999 becomes infinity, although everything below 65520 is nearest to 65504. bfloat16 and float8 are cast
# the same way, by ml_dtypes too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import torch

print("torch", torch.__version__, "numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__)
print("guess: a cast gives the nearest value of the new type, as IEEE 754's conversions do and NumPy's does")
values = np.array([1 + 2.0**-11 + 2.0**-30, 65519.9999999, 2.0**-25 + 2.0**-60])
numpys = values.astype(np.float16)
with np.errstate(over="ignore"):
    twice = values.astype(np.float32).astype(np.float16)
casts = {
    "one tensor": torch.from_numpy(values).half(),
    "one by one": torch.stack([torch.tensor(value, dtype=torch.float64).half() for value in values.tolist()]),
}
for name, cast in casts.items():
    print(f"seen: float64 {values.tolist()}, {name}: torch {cast.tolist()}, numpy {numpys.tolist()}")
    assert np.array_equal(cast.numpy(), twice)
    assert not np.any(cast.numpy() == numpys)
tie = np.array([1 + 2.0**-8 + 2.0**-30])
by_torch, by_ml_dtypes = torch.from_numpy(tie).bfloat16().item(), float(tie.astype(ml_dtypes.bfloat16)[0])
print(f"seen: 1 + 2**-8 + 2**-30 to bfloat16: torch {by_torch}, ml_dtypes {by_ml_dtypes}; nearest is {1 + 2.0**-7}")
assert by_torch == by_ml_dtypes == 1.0
PY
