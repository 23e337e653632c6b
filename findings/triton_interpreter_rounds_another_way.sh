#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1, how kernels are tested without a GPU) casts floats by other rules than
# compiled code. To bfloat16 it cuts the low bits off, compiled code rounds to nearest even; to float8e4nv it makes
# 256 of 500 and of infinity, where compiled code saturates at 448. A kernel that is tested interpreted, with a
# tolerance or without one, is another kernel on a GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1 torch==2.13.0 numpy==2.4.6
cat >"$folder/look.py" <<'PY'
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def to_bfloat16(x, out):
    at = tl.arange(0, 4)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


@triton.jit
def to_float8(x, out):
    at = tl.arange(0, 4)
    tl.store(out + at, tl.load(x + at).to(tl.float8e4nv))


def run(kernel, values: list[float], dtype: torch.dtype) -> list[float]:
    out = torch.zeros(4).to(dtype)
    kernel[(1,)](torch.tensor(values), out)
    return out.float().tolist()


def instructions(kernel, out: str) -> list[str]:
    source = triton.compiler.ASTSource(kernel, {"x": "*fp32", "out": out})
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target).asm["ptx"]  # needs no GPU
    return sorted({word for line in ptx.splitlines() for word in line.split()[:1] if word.startswith("cvt.rn")})


if INTERPRETED:
    print("triton", triton.__version__, "torch", torch.__version__)
    print("guess: interpreted, .to() gives what it gives compiled, or what torch gives")
    above, large = [1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -(1 + 3 * 2.0**-8), 2.0], [448.0, 500.0, float("inf"), 2.0]
    cut, wrapped = run(to_bfloat16, above, torch.bfloat16), run(to_float8, large, torch.float8_e4m3fn)
    print(f"seen: bfloat16 of {above}: {cut}; by torch {torch.tensor(above).bfloat16().tolist()}")
    by_torch = torch.tensor(large).to(torch.float8_e4m3fn).float().tolist()
    print(f"seen: float8e4nv of {large}: {wrapped}; by torch {by_torch}")
    assert cut == [1 + 2.0**-7, 1.0, -(1 + 2.0**-7), 2.0]
    assert wrapped == [448.0, 256.0, 256.0, 2.0]
else:
    bfloat16, float8 = instructions(to_bfloat16, "*bf16"), instructions(to_float8, "*fp8e4nv")
    print("seen: compiled for sm_90:", *bfloat16, *float8)
    assert bfloat16 == ["cvt.rn.bf16.f32"]
    assert float8 == ["cvt.rn.satfinite.e4m3x2.f32"]
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/look.py"
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/look.py"
