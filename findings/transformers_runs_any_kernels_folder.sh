#!/usr/bin/env bash
# transformers looks for the Hub's package `kernels`, and if some other package of that name lies on the path, as in the
# folder where Python was started, it imports it. A project with a folder kernels/ has its code run by transformers.
#
# Likely guess: an availability check asks for installed metadata or a spec; it runs nobody's code, and cannot raise.
# Seen: `is_kernels_available()` imports the folder's package, and what that raises comes out of transformers.
#
# Exits with 0 if it is still so, and with 1 if the behaviour changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0

mkdir -p "$folder/project/kernels"
echo 'raise ImportError("this project is not meant to be imported by that name")' > "$folder/project/kernels/__init__.py"

cat > "$folder/project/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

from transformers.utils.import_utils import is_kernels_available

print(f"transformers {version('transformers')}, Python {sys.version.split()[0]}")
try:
    seen = f"answered {is_kernels_available()}"
except ImportError as error:
    seen = f"raised {error!r}"
print("a folder kernels/ beside the program, and no such package installed")
print(f"  likely guess: answered False\n  seen:         {seen}")
sys.exit(0 if seen.startswith("raised") else 1)
PYTHON
"$folder/venv/bin/python" "$folder/project/look.py"
