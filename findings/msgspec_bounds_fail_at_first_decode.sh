#!/usr/bin/env bash
# msgspec takes a bound of 64 bits in an annotation, and refuses it only when a message is decoded for the first time.
#
# Likely guess: Meta(lt=1 << 63), "below 2^63", is either right or refused where it is written; the types of a protocol
# that import are types that decode.
# Seen: the annotation, the Struct with it, and `msgspec.json.encode` of one are fine. The first decode raises ValueError.
# Meta(le=(1 << 63) - 1) says the same and works.
#
# Exits with 0 if it is still so, and with 1 if the behaviour changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q msgspec==0.23.0

cat > "$folder/look.py" <<'PYTHON'
import sys
from importlib.metadata import version
from typing import Annotated

import msgspec


class Below(msgspec.Struct):
    count: Annotated[int, msgspec.Meta(lt=1 << 63)]


class UpTo(msgspec.Struct):
    count: Annotated[int, msgspec.Meta(le=(1 << 63) - 1)]


def seen(act):
    try:
        return f"gives {act()!r}"
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"


encoded = seen(lambda: msgspec.json.encode(Below(3)))
below = seen(lambda: msgspec.json.decode(b'{"count":3}', type=Below))
at_most = seen(lambda: msgspec.json.decode(b'{"count":3}', type=UpTo))
print(f"msgspec {version('msgspec')}, Python {sys.version.split()[0]}")
print(f"encode a count below 2^63\n  likely guess: gives b'{{\"count\":3}}'\n  seen:         {encoded}")
print(f"decode a count below 2^63\n  likely guess: gives Below(count=3)\n  seen:         {below}")
print(f"decode a count of at most 2^63 - 1\n  likely guess: gives UpTo(count=3)\n  seen:         {at_most}")
as_before = encoded.startswith("gives") and below.startswith("raises ValueError") and at_most.startswith("gives")
sys.exit(0 if as_before else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
