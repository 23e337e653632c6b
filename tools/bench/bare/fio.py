"""fio on the same shards: what the disk gives a program that does nothing but read it at random.

Input: files, never written (--readonly). Output: the seconds that a number of 4 KiB reads took, by fio's own clock.
Errors: `ConfigError` without fio, or if it fails.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tierstore.errors import ConfigError

DEPTH = 128
TIMEOUT_S = 300


def installed() -> bool:
    """Says whether fio is there."""
    return shutil.which("fio") is not None


def read_seconds(files: Sequence[Path], num_reads: int) -> float:
    """Returns the seconds of `num_reads` random 4 KiB reads, O_DIRECT, 128 at a time, in one job. Blocks."""
    if not installed():
        raise ConfigError("fio is not installed; apt-get install fio")
    names = ":".join(str(file).replace(":", r"\:") for file in files)
    command = [
        "fio", "--name=cold", "--readonly", "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=io_uring",
        f"--iodepth={DEPTH}", f"--filename={names}", f"--number_ios={num_reads}", "--file_service_type=random",
        "--randrepeat=0", "--norandommap", "--thread", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise ConfigError(f"fio failed: {(done.stderr or done.stdout).strip()[:300]}")
    read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    return num_reads / float(read["iops"])
