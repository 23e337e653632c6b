#!/usr/bin/env bash
# prometheus_client.CONTENT_TYPE_LATEST names version 1.0.0 of the text format. A scraper that asks for nothing, or for 0.0.4, gets
# 0.0.4 from the library's own server; a handler of one's own that pairs generate_latest() with that constant sends a version that
# was not asked for, which agents that know 0.0.4 only refuse.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check prometheus-client==0.26.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.exposition import choose_encoder

print("prometheus-client", version("prometheus-client"))
print("guess: CONTENT_TYPE_LATEST is what the library's own server answers to a request without Accept: 0.0.4")
for accept in ("", "text/plain;version=0.0.4", "*/*"):
    kind = choose_encoder(accept)[1]
    print(f"seen: its server, Accept {accept!r}: {kind}")
    assert "version=0.0.4" in kind
print("seen: CONTENT_TYPE_LATEST:", CONTENT_TYPE_LATEST)
assert "version=1.0.0" in CONTENT_TYPE_LATEST
PY
