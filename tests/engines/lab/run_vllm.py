"""One run of vLLM on a tiny model: prompts in, tokens and log-probabilities out; run in the lab's environment.

Input: a JSON file of options. Output: a JSON file: tokens, log-probabilities as hexadecimal floats, counters, memory.
Errors: those of vLLM; the exit status is then not 0.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = ([5, 9, 3, 77, 401], [11, 12, 13, 3, 200, 201, 11, 12, 13, 14, 250, 3, 300, 301, 302, 7, 8, 9, 10, 460, 461])
PREFIX = [20 + n % 200 for n in range(660)]  # longer than a block of the engine's cache


def prompts_of(name: str) -> list[list[int]]:
    """Returns "two", of which one is longer than a chunk; "prefix", which begin alike; "repeats", which repeat."""
    if name == "prefix":
        return [[*PREFIX, 50 + n, 60 + n, 3, 70 + n] for n in range(2)]
    if name == "repeats":
        return [[5, 6, 7, 8, 9, 10] * 4, [90, 91, 92] * 8]
    return [list(each) for each in PROMPTS]


def run(options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    begun = time.monotonic()
    drop_from_cache(options.get("drop", []))
    read_before = read_bytes()
    llm = LLM(**options["engine"])
    loaded = {
        "loaded_s": time.monotonic() - begun,
        "load_read_bytes": read_bytes() - read_before,
        "cached_bytes": sum(map(cached_bytes, options.get("drop", []))),
    }
    sampling = SamplingParams(
        temperature=0.0, max_tokens=options.get("max_tokens", 5), logprobs=3, ignore_eos=True, detokenize=False
    )
    answers = []
    for _ in range(options.get("rounds", 1)):  # a second round finds the first one's prefixes
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in prompts_of(options.get("prompts", "two"))]
        answers += llm.generate(prompts, sampling, use_tqdm=False)
    result = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "logprobs": [_logprobs(answer) for answer in answers],
        "cached_tokens": sum(answer.num_cached_tokens or 0 for answer in answers),
        "seconds": time.monotonic() - begun,
    }
    result |= loaded | {"memory": _memory(), "metrics": _metrics(llm)}
    return result


def drop_from_cache(files: list[str]) -> None:
    """Has the system forget the files' pages, so that what is there later was read."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(path: str) -> int:
    """Bytes of a file that lie in the page cache."""
    size = os.path.getsize(path)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    with open(path, "rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    if libc.mincore(address, size, pages):
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    libc.munmap(address, size)
    return sum(byte & 1 for byte in pages.raw) * mmap.PAGESIZE


def read_bytes() -> int:
    """Bytes that this process had the disks read."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def _logprobs(answer: Any) -> list[dict[str, str]]:
    return [
        {str(token): float(each.logprob).hex() for token, each in sorted(step.items())}
        for step in answer.outputs[0].logprobs
    ]


def _memory() -> dict[str, int]:
    """Bytes of this process: resident now and at most, of its own and of files."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem"):
            found[name] = int(value.split()[0]) * 1024
    return found


def _metrics(llm: Any) -> dict[str, float]:
    try:
        return {each.name: each.value for each in llm.get_metrics() if each.name.startswith("vllm:spec")}
    except (AssertionError, AttributeError):
        return {}


def main() -> None:
    options = json.loads(Path(sys.argv[1]).read_text())
    if options.get("rotate"):  # the negative control: every row is its neighbour's
        _rotate()
    result = run(options)
    Path(sys.argv[2]).write_text(json.dumps(result))


def _rotate() -> None:
    from tierstore.store.table import Table

    submit = Table.submit_rows

    def rotated(self: Any, row_ids: Any, out: Any, **named: Any) -> Any:
        return submit(self, (row_ids + 1) % self.spec.num_rows, out, **named)

    Table.submit_rows = rotated


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
