"""A worker that tokenizes texts on one thread.

Input: a request {"do": "load"} with a tokenizer's JSON, then requests {"do": "encode", "bytes": of each text in UTF-8}
with the texts back to back. Output: for each the number of tokens of each text (int64) and the ids (int32) behind.
Errors: what the library raises; its panics end the process.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

if __package__:
    from .worker_messages import Message, memory_argument, serve
else:  # as a program
    from worker_messages import Message, memory_argument, serve  # type: ignore[import-not-found,no-redef]

_loaded: list[Tokenizer] = []  # the one tokenizer


def handle(head: dict[str, Any], body: memoryview) -> Iterator[Message]:
    """Answers one request."""
    if head["do"] == "load":
        _loaded[:] = [Tokenizer.from_str(bytes(body).decode())]
        return
    texts, end = [], 0
    for num_bytes in head["bytes"]:
        texts.append(bytes(body[end : end + num_bytes]).decode())
        end += num_bytes
    counts, ids = array("q"), array("i")
    for encoding in _loaded[0].encode_batch_fast(texts, add_special_tokens=False):
        counts.append(len(encoding))
        ids.extend(encoding.ids)
    yield {"texts": len(counts)}, (counts, ids)


if __name__ == "__main__":
    serve(handle, memory_argument())
