#!/usr/bin/env bash
# prometheus_client picks the format of metrics by the order of the Accept header, not by its weights, and passes over
# "text/plain;version=0.0.4", the format that it answers by default, if anything else that it knows comes after it.
#
# Likely guess: as RFC 9110 says, the acceptable format with the largest q is given, and one with q=0 never.
# Seen: OpenMetrics, or the text format 1.0.0, although 0.0.4 was preferred, and although q=0 excludes them.
#
# Exits with 0 if it is still so, and with 1 if the behaviour changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q prometheus-client==0.26.0

cat > "$folder/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

from prometheus_client.exposition import choose_encoder

PLAIN = "text/plain; version=0.0.4"
# A header whose most wanted format is the text format 0.0.4, and what is given.
HEADERS = {
    "text/plain;version=0.0.4;q=0.9,application/openmetrics-text;version=1.0.0;q=0.1": "application/openmetrics-text",
    "text/plain;version=0.0.4,application/openmetrics-text;version=1.0.0;q=0": "application/openmetrics-text",
    "text/plain;version=1.0.0;q=0.3,text/plain;version=0.0.4;q=0.5": "text/plain; version=1.0.0",
}

print(f"prometheus_client {version('prometheus_client')}, Python {sys.version.split()[0]}")
as_before = True
for accept, seen_before in HEADERS.items():
    content_type = choose_encoder(accept)[1]
    as_before &= content_type.startswith(seen_before)
    print(f"Accept: {accept}\n  likely guess: {PLAIN}\n  seen:         {content_type}")
sys.exit(0 if as_before else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
