#!/usr/bin/env bash
# numpy.load of a .npy file whose head is damaged may raise tokenize.TokenError, which is neither ValueError, OSError nor EOFError:
# a head that is no Python literal is tokenized once more, as heads of Python 2 were. Code that catches ValueError lets it through.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import io
import tokenize

import numpy as np

print("numpy", np.__version__)
print("guess: a damaged .npy file raises ValueError, as the documentation of numpy.load and of numpy.lib.format says")


def seen(version: tuple[int, int], change: tuple[bytes, bytes]) -> type[BaseException] | None:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.arange(5), version=version)
    try:
        np.load(io.BytesIO(out.getvalue().replace(*change)))
    except Exception as error:
        return type(error)
    return None


for what, change in (("a bracket that is a space", (b")", b" ")), ("another key", (b"'shape'", b"'shapf'"))):
    for version in ((1, 0), (3, 0)):
        print(f"seen: {what}, version {version}: {seen(version, change).__name__}")
assert seen((1, 0), (b")", b" ")) is tokenize.TokenError
assert not issubclass(tokenize.TokenError, (ValueError, OSError, EOFError))
assert seen((3, 0), (b")", b" ")) is ValueError
assert seen((1, 0), (b"'shape'", b"'shapf'")) is ValueError
PY
