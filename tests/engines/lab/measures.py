"""What the lab measures: a step's own time, hidden reads, bytes read at load, memory.

Input: the lab. Output: results as the lab prints them. Errors: `SystemExit` of runs that fail.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from cases import ENGINE, Case
from environments import LAB

MIB = 1 << 20
TABLE_FILE = "model-00002-of-00002.safetensors"  # of model.py, which loads torch
BIG_ROWS_PER_HEAD = 4_200_000  # 4 heads of 64-byte rows: 1.0 GiB
BIG_DRAM_MIB = 64
BESIDE_MIB = 64  # what the engine's process may take beside the DRAM budget


def layer_times(lab: Any) -> dict[str, Any]:
    """The layer's start and finalize against `Table.rows`, and the waits of staged steps."""
    begun = time.monotonic()
    checkpoint = lab.folder / "models" / "qwen4_exp-layer"
    if not checkpoint.exists():
        lab.command(
            "synth", str(checkpoint), "--family", "qwen4_exp", "--size", "1GiB", "--dtype", "bf16", "--parts", "8"
        )
    out = lab.folder / "logs" / "layer.json"
    arguments = [str(LAB / "run_layer.py"), str(lab.store(checkpoint)), str(checkpoint / "config.json"), str(out)]
    lab.python(lab.base, "layer", arguments, {})
    found = json.loads(out.read_text())
    hits = [f"{each['tokens']}: {each['layer_us']:.0f} of {each['target_us']:.0f} us" for each in found["hits"]]
    waits = [f"{each['tokens']}: {each['fraction']:.1%} of {each['read_us']:.0f} us" for each in found["staged"]]
    return {
        "case": "the layer's own time by tokens, all rows hit; waits of staged steps, a tenth of the rows in DRAM",
        "result": f"{'; '.join(hits)}; waits {'; '.join(waits)}",
        "passed": all(each["met"] for each in found["hits"] + found["staged"]),
        "seconds": round(time.monotonic() - begun, 1),
    } | found


def load_and_memory(lab: Any) -> dict[str, Any]:
    """A table of 1 GiB: bytes that loading reads of its file, and the process's memory against a tiny table's."""
    begun = time.monotonic()
    checkpoint, store = lab.model("bf16", BIG_ROWS_PER_HEAD)
    small, _ = lab.model("bf16")
    case = Case("load")
    files = [str(checkpoint / TABLE_FILE)]
    table_bytes = sum(os.path.getsize(path) for path in files)
    settings = {"store": str(store), "dram": f"{BIG_DRAM_MIB}MiB"}
    engine = ENGINE | {"model": str(checkpoint), "additional_config": {"tierstore": settings}}
    embedded = lab.vllm("load-embedded", case, {"engine": engine, "drop": files}, {})
    with lab.serving(store) as socket:
        attached_engine = engine | {"additional_config": {"tierstore": {"store": str(socket)}}}
        attached = lab.vllm("load-attached", case, {"engine": attached_engine, "drop": files}, {})
    plain_engine = ENGINE | {"model": str(small), "engram_config": {"cpu_offload": False}}
    plain = lab.vllm("load-resident-tiny", case, {"engine": plain_engine}, {})
    read = embedded["cached_bytes"]
    more = {name: run["memory"]["RssAnon"] - plain["memory"]["RssAnon"] for name, run in
            (("embedded", embedded), ("attached", attached))}  # fmt: skip
    limits = {"embedded": (BIG_DRAM_MIB + BESIDE_MIB) * MIB, "attached": BESIDE_MIB * MIB}
    shown = ", ".join(f"{name} {more[name] / MIB:.0f} of {limits[name] / MIB:.0f} MiB" for name in more)
    return {
        "case": "a table of 1 GiB: bytes of its file read at load, memory beside the engine's",
        "result": f"{read / table_bytes:.2%} of {table_bytes} bytes; {shown}",
        "passed": read < 0.01 * table_bytes and all(more[name] <= limits[name] for name in more),
        "read_bytes": read,
        "process_read_bytes": embedded["load_read_bytes"],
        "table_bytes": table_bytes,
        "memory": {"embedded": embedded["memory"], "attached": attached["memory"], "tiny table": plain["memory"]},
        "seconds": round(time.monotonic() - begun, 1),
    }


def metrics(lab: Any) -> dict[str, Any]:
    """The counters of a worker in the metrics of the process that serves."""
    begun = time.monotonic()
    checkpoint, store = lab.model("bf16")
    settings = {"store": str(store), "dram": "4MiB"}
    engine = ENGINE | {
        "model": str(checkpoint),
        "additional_config": {"tierstore": settings},
        "disable_log_stats": False,
    }
    paths = [lab.folder / "logs" / f"metrics.{kind}.json" for kind in ("options", "lines")]
    paths[0].write_text(json.dumps({"engine": engine}))
    arguments = [str(LAB / "run_metrics.py"), *map(str, paths)]
    lab.python(lab.base, "metrics", arguments, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    lines = json.loads(paths[1].read_text())
    rows = [line for line in lines if line.startswith("tierstore_engine_rows_total{")]
    counted = sum(float(line.rpartition(" ")[2]) for line in rows)
    return {
        "case": "counters of a worker in the metrics of the process that serves",
        "result": f"{len(lines)} metrics, {counted:.0f} rows",
        "passed": counted >= 7 * 4,  # 5 tokens of the prompt and 2 that were fed back, 4 rows each
        "lines": lines,
        "seconds": round(time.monotonic() - begun, 1),
    }


MEASURES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "layer times": layer_times,
    "load and memory": load_and_memory,
    "metrics": metrics,
}
