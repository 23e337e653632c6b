#!/usr/bin/env bash
# Dataset.map on a data set that load_from_disk opened writes its result as cache-*.arrow into the saved folder itself. Whoever reads
# all *.arrow files of such a folder reads the mapped rows besides the saved ones; only state.json says which files are the data set.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PY'
import json
from pathlib import Path

import datasets
import pyarrow

print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
print("guess: a folder of save_to_disk holds what was saved; what map computes goes to the user's cache folder")
datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}).save_to_disk("saved")
before = {path.name for path in Path("saved").iterdir()}
mapped = datasets.load_from_disk("saved").map(lambda row: {"input_ids": row["input_ids"] * 2})
new = {path.name for path in Path("saved").iterdir()} - before
rows = sum(pyarrow.ipc.open_stream(path).read_all().num_rows for path in Path("saved").glob("*.arrow"))
listed = [each["filename"] for each in json.loads(Path("saved/state.json").read_text())["_data_files"]]
print("seen: new in the saved folder after map:", ", ".join(new))
print("seen: rows of all *.arrow files:", rows, "of the data set:", len(mapped), "files in state.json:", listed)
assert len(new) == 1
assert next(iter(new)).startswith("cache-")
assert next(iter(new)).endswith(".arrow")
assert (rows, len(mapped), len(listed)) == (4, 2, 1)
PY
