"""One store over two daemons, beside one daemon with the whole table; all over gRPC: `serve.several` measures it.

Input: a folder, in which stores are made. Output: figures with their targets, each the median of interleaved rounds.
Errors: `ImportError` without grpcio.
"""

from __future__ import annotations

from pathlib import Path

from .. import stores
from ..pairs import Result
from ..serve import several

RATE, ONE_TOKEN, WIRE = 0.9, 1.3, 0.55


def measure(folder: Path, tokens: int | None, pairs: int, num_rows: int, result: Result) -> None:
    """Adds figures. Blocks."""
    tokens = tokens or several.TOKENS
    found = several.measure(folder, tokens=tokens, rounds=pairs, size_bytes=num_rows * stores.ROW_BYTES)
    times = f"of one daemon's, {tokens:,} tokens"
    result.figure("two daemons: rate of batches", times, [found["rate"]], RATE, at_least=True)
    result.figure("two daemons: latency of one token", "of one daemon's", [found["one_token"]], ONE_TOKEN)
    result.figure("two daemons: processor time", times, [found["processor"]])
    result.figure("a client's set of half of the accesses: bytes", "of those without", [found["wire_of_set"]], WIRE)
    result.figure("a client's set of half of the accesses: rate", times, [found["rate_of_set"]])
