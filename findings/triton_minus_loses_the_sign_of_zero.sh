#!/usr/bin/env bash
# In a Triton kernel `-x` is `0 - x`, interpreted and compiled: minus of +0.0 is +0.0, not -0.0. x * -1.0 does flip the
# sign bit (and compiles to an xor of it, cheaper than the subtraction). A kernel that decodes sign and magnitude, of fp4
# say, by `where(sign, -magnitude, magnitude)` so differs from the CPU's in every negative zero, bit for bit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1
cat >"$folder/minus.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def minus(x, out):
    tl.store(out, -tl.load(x))


@triton.jit
def times(x, out):
    tl.store(out, tl.load(x) * -1.0)


def instructions(kernel) -> list[str]:
    source = ASTSource(kernel, {"x": "*fp32", "out": "*fp32"})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]  # needs no GPU
    return [line.split()[0] for line in ptx.splitlines() if line.strip().startswith(("sub.", "neg.", "mul.", "xor."))]


print("triton", triton.__version__)
print("guess: -x flips the sign bit (neg.f32), so that minus of +0.0 is -0.0, as in C, NumPy and torch")
seen = {"-x": instructions(minus), "x * -1.0": instructions(times)}
for name, found in seen.items():
    print(f"seen: {name} compiles to {', '.join(found)}")
assert seen["-x"] == ["sub.f32"], "0 - x: of +0.0 it is +0.0"
assert seen["x * -1.0"] == ["xor.b32"]
PY
"$folder/venv/bin/python" "$folder/minus.py"
