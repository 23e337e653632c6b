#!/usr/bin/env bash
# triton.language.sort of a row that holds NaN: what comes out is no ordering of what went in. A number stands in it
# twice, and NaN and others are gone. Its compare-and-swap lets each side choose by `x > y`, and of a pair with NaN
# both sides choose the same one; so it is for +0.0 and -0.0, whose signs are lost. Seen in the interpreter; the code
# is the same function when compiled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1 torch==2.13.0 numpy==2.4.6
cat >"$folder/look.py" <<'PY'
import math

import torch
import triton
import triton.language as tl


@triton.jit
def ordered(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, tl.sort(tl.load(x + at)))


def seen(values: list[float]) -> list[float]:
    out = torch.full((len(values),), -9.0)
    ordered[(1,)](torch.tensor(values), out, len(values))
    return out.tolist()


print("triton", triton.__version__, "interpreted")
print("guess: NaN comes somewhere (torch.sort and NumPy: last), and every other value once, as it went in")
finite, with_nan, zeros = [3.0, 2.5, 1.0, 0.5], [3.0, math.nan, 1.0, 0.5], [0.0, -0.0]
for values in (finite, with_nan, zeros):
    print(f"seen: {values} sorted: {seen(values)}")
assert seen(finite) == sorted(finite)
lost = seen(with_nan)
assert not any(map(math.isnan, lost)), lost
assert len(set(lost)) < len(lost), lost
assert len({math.copysign(1.0, value) for value in seen(zeros)}) == 1
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/look.py"
