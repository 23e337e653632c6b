"""Runs the plug-in on a real SGLang, layer by layer: `python sglang_layers.py FAMILY [--json FILE] [--case NAME]`.

FAMILY: deepseek_v41, qwen4_exp, or process: how whole processes start and end. Needs sglang 0.5.23 and what it imports
(sglang_requirements.txt), and tierstore, installed; no GPU and no kernels of SGLang.
Every case compares SGLang's own classes, with the whole table in memory, to the replaced ones over a store.
Output: a line a case; in FILE, {"engine", "family", "cases": [{"name", "passed", "seconds", "error"}]}. Exit status 1
if a case failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sglang_lab as lab  # before anything loads SGLang

FAMILIES = {"deepseek_v41": "sglang_v41_cases", "qwen4_exp": "sglang_qwen_cases", "process": "sglang_process_cases"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--case", help="this case alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tierstore-sglang-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # as the server does, before anything imports its client
        import sglang

        lab.announce_entry_point(Path(folder))
        module = importlib.import_module(FAMILIES[options.family])
        cases = module.prepare(Path(folder))
        results = [run(name, case) for name, case in cases.items() if options.case in (None, name)]
    report = {"engine": f"sglang {sglang.__version__}", "family": options.family, "cases": results}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    failed = [each["name"] for each in results if not each["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} cases of {options.family} passed", *failed)
    return 1 if failed or not results else 0


def run(name: str, case: Any) -> dict[str, Any]:
    begun, error = time.monotonic(), None
    try:
        case()
    except BaseException as raised:  # a plug-in that stops the process raises SystemExit
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"
    seconds = round(time.monotonic() - begun, 2)
    print(f"{'failed' if error else 'passed'} {name} ({seconds} s)", flush=True)
    return {"name": name, "passed": error is None, "seconds": seconds, "error": error}


if __name__ == "__main__":
    sys.exit(main())
