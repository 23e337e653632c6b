"""Lock-step lookups of two ranks with a slice each, beside a bare all_to_all of as many bytes.

Input: the stores of the slices, each whole in its rank's memory. Output: seconds of batches and of single tokens.
Rows are checked before anything is timed. Keys are all distinct: what is measured is the way, and not what the exchange
saves by sending each entry once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tierstore
from tierstore.errors import ConfigError

from .. import stores
from ..pairs import SUBJECT, Result
from . import rank_group

if TYPE_CHECKING:
    from engram_adapter.exchange import Ranks

TOKENS = 2_048
BARE, FIXED = "bare all_to_all", "fixed sizes"
ROW_TARGETS = {BARE: 0.8}
ONES = 50  # single tokens of a run


def measure(paths: list[Path], tokens: int | None, pairs: int, threads: int, result: Result) -> None:
    """Adds lookups of batches and of single tokens. Blocks."""
    given = {"paths": list(map(str, paths)), "tokens": tokens or TOKENS, "pairs": pairs, "threads": threads}
    found = rank_group.run("lookups", given)
    work = (tokens or TOKENS) * len(paths)
    case = f"lock-step lookup, {len(paths)} ranks, {tokens or TOKENS:,} tokens each"
    rank_group.add(result, case, "token", work, found["batches"], ROW_TARGETS)
    rank_group.add(result, "lock-step lookup of one token a rank", "token", ONES * len(paths), found["ones"], {})
    result.facts["bytes that each rank receives in such a lookup"] = f"{found['bytes']:,}"


def work(ranks: Ranks, given: Mapping[str, Any]) -> dict[str, Any]:
    """Is a rank: looks up beside the bare exchange."""
    import torch

    from engram_adapter.lockstep import LockStep
    from engram_adapter.lockstep_fixed import FixedLockStep

    path, tokens = Path(given["paths"][ranks.rank]), int(given["tokens"])
    made = stores.find_store(path)
    dram_bytes = made.spec.table_bytes * 5 // 4 + (64 << 20)
    with tierstore.open(path, dram=dram_bytes, threads=int(given["threads"])) as store:
        table = store[stores.TABLE]
        lock_step = LockStep(ranks, store, table)
        fixed, fixed_one = (FixedLockStep(ranks, store, table, size) for size in (tokens, 1))
        generator = np.random.default_rng(ranks.rank)
        whole = lock_step.slices.whole
        _check(lock_step.look_up, whole, made.block, stores.fresh_keys(generator, 64))
        num_bytes = tokens * whole.num_heads * whole.row_bytes
        sent, came = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
        one_sent, one_came = (torch.ones(num_bytes // tokens, dtype=torch.uint8) for _ in range(2))
        out = stores.rows_buffer(tokens)
        batches = {
            SUBJECT: lambda: lock_step.look_up(lambda: stores.fresh_keys(generator, tokens), out),
            FIXED: lambda: fixed.look_up(lambda: stores.fresh_keys(generator, tokens)),
            BARE: lambda: ranks.all_to_all("bare", sent, None, None, came),
        }
        one = stores.fresh_keys(generator, 1)
        ones = {
            SUBJECT: lambda: [lock_step.look_up(lambda: one) for _ in range(ONES)],
            FIXED: lambda: [fixed_one.look_up(lambda: one) for _ in range(ONES)],
            BARE: lambda: [ranks.all_to_all("bare", one_sent, None, None, one_came) for _ in range(ONES)],
        }
        return {
            "batches": rank_group.compare(ranks, batches, int(given["pairs"])),
            "ones": rank_group.compare(ranks, ones, int(given["pairs"])),
            "bytes": num_bytes * (ranks.size - 1) // ranks.size,
        }


def _check(look_up: Any, whole: Any, block: np.ndarray, keys: np.ndarray) -> None:
    row_ids = whole.row_ids(keys)
    if not np.array_equal(look_up(lambda: keys), block[row_ids % stores.BLOCK_ROWS]):
        raise ConfigError("a lock-step lookup gave other rows than were built; run the tests of engram_adapter/ranks")
