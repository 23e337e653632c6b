#!/usr/bin/env bash
# mosaicml-streaming's column type "ndarray" takes a big-endian array, writes its bytes as they are and its type
# without the byte order: token 1 is read as 16,777,216. Beside it, a scalar column of "uint16" refuses a Python int
# of 70,000 and takes NumPy's as 4,464.
#
# Likely guess: an array is read as it was written, or refused; and a number that a column cannot hold is refused,
# whoever made it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 pillow==13.0.0 typing_extensions==4.16.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps mosaicml-streaming==0.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import distribution, version
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np

# The encodings alone: importing all of streaming takes the clients of several clouds.
path = distribution("mosaicml-streaming").locate_file("streaming/base/format/mds/encodings.py")
spec = spec_from_file_location("encodings_of_mds", path)
encodings = module_from_spec(spec)
spec.loader.exec_module(encodings)


def read_back(kind, value):
    return encodings.mds_decode(kind, encodings.mds_encode(kind, value))


print("mosaicml-streaming", version("mosaicml-streaming"), "numpy", np.__version__)
tokens = np.array([0, 1, 2], dtype=">i4")
print("guess: the tokens 0, 1, 2 are read as 0, 1, 2")
print("seen: as ndarray, from a big-endian array:", read_back("ndarray", tokens).tolist())
assert read_back("ndarray", tokens).tolist() == [0, 1 << 24, 2 << 24]
assert read_back("ndarray", tokens.astype("<i4")).tolist() == [0, 1, 2]
print("guess: 70,000 as uint16 is an error")
print("seen: NumPy's 70,000 as uint16:", int(read_back("uint16", np.int64(70_000))))
assert read_back("uint16", np.int64(70_000)) == 70_000 - 65_536
try:
    read_back("uint16", 70_000)
except OverflowError as error:
    print("seen: Python's 70,000 as uint16: OverflowError:", error)
else:
    raise SystemExit("a Python int of 70,000 is no error any more")
PY
