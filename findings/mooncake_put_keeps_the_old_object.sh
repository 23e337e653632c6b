#!/usr/bin/env bash
# Mooncake's put to a name that exists returns 0, success, and leaves the old object: bytes and length.
#
# Likely guess: a put replaces what is there, as in Redis, S3 or a file system; or it returns an error code, since the
# library has one for objects that exist.
# Seen: 0, and `get` returns the old bytes. Neither other bytes nor another length change that. `upsert` replaces, and
# so does `remove(name, force=True)` before the put; without force, `remove` fails while a reader's lease lasts.
#
# Exits with 0 if it is still so, and with 1 if the behaviour changed. Its master and client run on the loopback.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mooncake-transfer-engine-non-cuda==0.3.13.post1 numpy

cat > "$folder/look.py" <<'PYTHON'
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mooncake
from mooncake.store import MooncakeDistributedStore

LIMIT_S = 60


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


os.dup2(os.open("look.log", os.O_WRONLY | os.O_CREAT, 0o600), 2)  # the library logs every step
port, metrics_port = free_port(), free_port()
program = Path(mooncake.__file__).parent / "mooncake_master"
arguments = [program, f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics_port}"]
master = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    end = time.monotonic() + LIMIT_S
    while not listens(port):
        assert master.poll() is None and time.monotonic() < end, "the master did not start"
        time.sleep(0.05)
    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, 16 << 20, "tcp", "", f"127.0.0.1:{port}") == 0
    assert store.put("name", b"old bytes") == 0
    same_length = store.put("name", b"new bytes"), store.get("name")
    other_length = store.put("name", b"new"), store.get("name")
    upserted = store.upsert("name", b"newer"), store.get("name")
    store.close()
finally:
    master.kill()
    master.wait()
print(f"mooncake-transfer-engine-non-cuda {version('mooncake-transfer-engine-non-cuda')}, "
      f"Python {sys.version.split()[0]}")
print("put b'old bytes', then put b'new bytes' to the same name: code, and what get returns")
print(f"  likely guess: (0, b'new bytes'), or a code below 0\n  seen:         {same_length}")
print("put b'new' to it")
print(f"  likely guess: (0, b'new'), or a code below 0\n  seen:         {other_length}")
print("upsert b'newer' to it")
print(f"  likely guess: (0, b'newer')\n  seen:         {upserted}")
kept = (0, b"old bytes")
sys.exit(0 if (same_length, other_length, upserted) == (kept, kept, (0, b"newer")) else 1)
PYTHON
cd "$folder"
"$folder/venv/bin/python" look.py
