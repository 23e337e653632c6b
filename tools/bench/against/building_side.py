"""One process of `tierstore bench build --against OTHER`: a build of tierstore builds one store.

Input: a JSON object as the only argument: "bench" (the case), "checkpoint", "store". Output: a last line of JSON as
`side.py` gives it: seconds without the interpreter's start, and a checksum of all shards. The store is removed. The
text of this file runs under either build (`python -c`), and calls only what commit 8498e4b has, too.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import engram_adapter  # noqa: F401 - what the command loads is not what is timed
import tierstore
import tierstore.tools.build
from tierstore.tools.cli import cli

READ_BYTES = 1 << 24


def measure(ask: dict[str, Any]) -> dict[str, Any]:
    """Builds the store; returns what it took, and what came of it."""
    started, started_cpu = time.perf_counter(), time.process_time()
    cli.main(["build", ask["checkpoint"], ask["store"]], standalone_mode=False)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    checksum = 0
    for file in sorted(Path(ask["store"]).rglob("*.shard")):
        with file.open("rb") as shard:
            while data := shard.read(READ_BYTES):
                checksum = zlib.crc32(data, checksum)
    shutil.rmtree(ask["store"])
    build = {"package": str(Path(tierstore.__file__).parent), "version": tierstore.__version__}
    return {
        "build": build,
        "checksum": checksum,
        "cpu_s": cpu_s,
        "missed": 0,
        "seconds": {ask["bench"]: seconds},
        "skipped": {},
    }


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
