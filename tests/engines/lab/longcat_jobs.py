"""What `make engines` runs of LongCat: vLLM's n-gram embedding over a store, and the row ids of both engines.

Input: the lab. Output: a result for each version of vLLM. Errors: `SystemExit` as the lab's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environments import LAB
from sglang_jobs import sglang_environment

ROWS_PER_HEAD, DIM = 5000, 32
_KERNEL = "lib/python3*/site-packages/sglang/kernels/jit/csrc/speculative/ngram_embedding.cuh"


def longcat_jobs(lab: Any) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """Returns the jobs by name; lab: has `folder`, `environments`, `command`, `store`, and `python`."""
    return [(f"longcat {version}", lambda v=version: _layer(lab, v)) for version in lab.environments]


def _layer(lab: Any, version: str) -> dict[str, Any]:
    checkpoint: Path = lab.folder / "models" / "longcat"
    if not checkpoint.exists():
        size = ("--rows-per-head", str(ROWS_PER_HEAD), "--dim", str(DIM))
        lab.command("synth", str(checkpoint), "--family", "longcat", *size)
    (kernel,) = sglang_environment(lab.folder).python.parents[1].glob(_KERNEL)
    begun, out = time.monotonic(), lab.folder / "logs" / f"longcat-{version}.json"
    arguments = [str(LAB / "run_longcat.py"), str(checkpoint), str(lab.store(checkpoint)), str(kernel), str(out)]
    lab.python(lab.environments[version], f"longcat-{version}", arguments, {})
    found = json.loads(out.read_text())
    # These versions look up row 0 of each head at an end of text; SGLang and the model's own code, its n-gram.
    checks = ("equal", "rotated_differs", "row_ids_equal", "sglang_row_ids_equal")
    passed = all(found[each] for each in checks) and found["ends_of_text"] > 0
    return {
        "case": f"vLLM {version}, LongCat: the n-gram embedding alone, rotated, and row ids of vLLM and SGLang",
        "result": "identical" if passed else "differ",
        "passed": passed,
        "seconds": round(time.monotonic() - begun, 1),
    } | found
