#!/usr/bin/env bash
# What a float becomes beyond the range of an 8-bit type depends on the type: float8_e4m3fn has no infinity and takes
# infinity for 448, float8_e5m2 keeps it, float8_e4m3fnuz gives NaN; float8_e8m0fnu (scales) drops the sign and lifts zero.
# A table quantised by .to() hides an infinite weight, and a negative or zero scale turns into a positive one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
print("guess: all four treat overflow alike (NaN or infinity), and a scale of -1 or 0 is refused or NaN")
infinity = float("inf")


def cast(dtype: torch.dtype, *values: float) -> list[float]:
    return torch.tensor(values).to(dtype).float().tolist()


seen = {
    "e4m3fn": cast(torch.float8_e4m3fn, 500.0, -500.0, infinity),
    "e5m2": cast(torch.float8_e5m2, 70000.0, infinity),
    "e4m3fnuz": cast(torch.float8_e4m3fnuz, 500.0, infinity),
    "e8m0fnu": cast(torch.float8_e8m0fnu, -1.0, -0.25, 0.0),
}
for name, values in seen.items():
    print(f"seen: float8_{name}: {values}")
assert seen["e4m3fn"] == [448.0, -448.0, 448.0]
assert seen["e5m2"] == [infinity, infinity]
assert all(value != value for value in seen["e4m3fnuz"])
assert seen["e8m0fnu"] == [1.0, 0.25, 2.0**-127]
PY
