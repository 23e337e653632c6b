"""`tierstore bench streams`: writing traces, beside merely reading or copying what they are made of.

Input: token ids (a trace file, else what `real_text` finds), repeated up to a size; this machine's own text. Output: a
trace of a Parquet file beside pyarrow's reading of its column; of a Megatron pair beside cp and a sync, both from a
dropped page cache; text through two processes beside one; and the memory that these took together.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tierstore.errors import ConfigError
from tierstore.extras import missing
from tierstore.units import format_bytes

from ..corpus import python_text_files, train_tokenizer
from ..trace import write_trace
from . import memory, page_cache, real_text
from .pairs import SUBJECT, Options, Result

SIZE_BYTES = 256 << 20  # of the ids, 4 bytes each
REAL_TOKENS = 1 << 24  # of which they are made
ROWS_PER_GROUP = 1000
TEXT_BYTES = 16 << 20
JOBS = 2
VOCAB_SIZE = 8192  # of a tokenizer that is trained if there is no real one
PYARROW, COPY, ONE_JOB = "pyarrow, its column", "cp and sync", "1 job"
PEAK_BYTES_MAX = 1 << 30

_TRACE = """
import sys
from tierstore.tools.trace import write_trace
write_trace([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], jobs=int(sys.argv[4]))
"""


def run(folder: Path, options: Options) -> Result:
    """Measures all three. Needs three times the size on disk (256 MiB by default)."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-streams-") as name:
        made = Path(name)
        ids, lengths = _ids(options)
        result = Result(f"traces of {len(ids):,} tokens, {format_bytes(ids.nbytes)}")
        _parquet(made, ids, lengths, options.pairs, result)
        _megatron(made, ids, lengths, options.pairs, result)
        _text(made, options, result)
    return result


def _ids(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, int32 [tokens], and the length of each document."""
    wanted = max(1, (options.size_bytes or SIZE_BYTES) // 4)
    documents = real_text.load(options.trace, min(wanted, REAL_TOKENS)).documents
    ids = np.concatenate(documents).astype(np.int32)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    times = -(-wanted // len(ids))
    return np.tile(ids, times), np.tile(lengths, times)


def _seconds(work: Callable[[], object], dropped: list[Path]) -> float:
    """Seconds of some work on files that are not in the page cache."""
    os.sync()
    page_cache.drop(dropped)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _parquet(made: Path, ids: np.ndarray, lengths: np.ndarray, rounds: int, result: Result) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        result.skipped["Parquet"] = str(missing("it", "data", error))
        return
    file = made / "ids.parquet"
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]), type=pyarrow.int64())
    rows = pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(ids))
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows}), file, row_group_size=ROWS_PER_GROUP)
    sides = {
        SUBJECT: lambda: _seconds(lambda: write_trace([file], made / "ids.trace"), [file]),
        PYARROW: lambda: _seconds(lambda: pyarrow.parquet.read_table(file, columns=["input_ids"]), [file]),
    }
    result.compare("Parquet, a column of ids", "token", len(ids), sides, rounds, {PYARROW: 0.5})


def _megatron(made: Path, ids: np.ndarray, lengths: np.ndarray, rounds: int, result: Result) -> None:
    file, copy = made / "ids.bin", made / "copy.bin"
    starts = (np.cumsum(lengths) - lengths) * ids.itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(lengths), len(lengths) + 1)
    ends = np.arange(len(lengths) + 1, dtype="<i8")
    ids.tofile(file)
    file.with_suffix(".idx").write_bytes(
        head + lengths.astype("<i4").tobytes() + starts.astype("<i8").tobytes() + ends.tobytes()
    )

    def copied() -> None:
        subprocess.run(["cp", "--reflink=never", str(file), str(copy)], check=True)
        with copy.open("rb") as opened:
            os.fsync(opened.fileno())

    sides = {
        SUBJECT: lambda: _seconds(lambda: write_trace([file], made / "ids.trace"), [file]),
        COPY: lambda: _seconds(copied, [file]),
    }
    result.compare("Megatron .bin and .idx, int32", "token", len(ids), sides, rounds, {COPY: 0.7})
    copy.unlink()


def _text(made: Path, options: Options, result: Result) -> None:
    """Text of this machine's Python, through the real tokenizer if there is one."""
    files = python_text_files()[: real_text.CORPUS_FILES_MAX]
    text = "".join(file.read_text(errors="replace") for file in files)
    if not text:
        raise ConfigError("this machine has no text to tokenize; install Python's library")
    size = min(TEXT_BYTES, options.size_bytes or TEXT_BYTES)
    text = (text * -(-size // len(text)))[:size]
    corpus = made / "corpus.txt"
    corpus.write_text(text)
    tokenizer = real_text.SHARED_DATA / real_text.TOKENIZER_FILE
    if not tokenizer.is_file():
        tokenizer = made / "tokenizer.json"
        train_tokenizer(files[:200], VOCAB_SIZE).save(str(tokenizer))

    output = made / "text.trace"

    def traced(jobs: int) -> Callable[[], float]:
        return lambda: _seconds(lambda: write_trace([corpus], output, tokenizer=tokenizer, jobs=jobs), [])

    subject = f"{JOBS} jobs"
    sides = {subject: traced(JOBS), ONE_JOB: traced(1)}
    result.compare("text", "character", len(text), sides, options.pairs, {ONE_JOB: 1.8}, subject=subject)
    peak = memory.peak_bytes([sys.executable, "-c", _TRACE, *map(str, (corpus, output, tokenizer, JOBS))])
    result.figure(f"memory of a trace of text, {subject}", "bytes", [float(peak)], PEAK_BYTES_MAX)
    result.facts["processors"] = len(os.sched_getaffinity(0))
