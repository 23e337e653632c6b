#!/usr/bin/env bash
# python-zstandard's stream_reader and copy_stream read all frames of a file that has several (as parallel compressors write, and as
# files joined with cat have), but read_to_iter, decompressobj and decompress end after the first one, without an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check zstandard==0.25.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import io

import zstandard

print("zstandard", zstandard.__version__)
print("guess: all ways of reading one stream give the same bytes, or raise for what they do not read")
compressor = zstandard.ZstdCompressor()
stream = compressor.compress(b"first document\n") + compressor.compress(b"second document\n")
copied = io.BytesIO()
zstandard.ZstdDecompressor().copy_stream(io.BytesIO(stream), copied)
seen = {
    "stream_reader": zstandard.ZstdDecompressor().stream_reader(io.BytesIO(stream)).read(),
    "read_to_iter": b"".join(zstandard.ZstdDecompressor().read_to_iter(io.BytesIO(stream))),
    "copy_stream": copied.getvalue(),
    "decompressobj": zstandard.ZstdDecompressor().decompressobj().decompress(stream),
    "decompress": zstandard.ZstdDecompressor().decompress(stream),
}
for name, value in seen.items():
    print(f"seen: {name}: {value!r}")
for name in ("stream_reader", "copy_stream"):
    assert seen.pop(name) == b"first document\nsecond document\n"
assert set(seen.values()) == {b"first document\n"}
PY
