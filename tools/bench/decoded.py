"""A part of `tierstore bench decode`: tokens through `TieredEmbedding`, down to the bfloat16 values of a model.

Input: a working set of tokens that DRAM holds. Output: rates beside `F.embedding` on the same rows, resident as fp8
values and scales, followed by dequantisation in torch; and beside `F.embedding` on the same rows kept as bfloat16,
which takes twice the memory. torch and tierstore have the same number of threads. Outputs are compared before anything
is timed. Errors: ImportError without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from engram_adapter import HashSpec, TieredEmbedding
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.units import format_bytes

from . import stores
from .pairs import SUBJECT, Options, Result, seconds_of_all
from .working_set import WorkingSet

TOKENS = 2048
TABLE_FRACTION = 1 / 8  # of the benchmark's table is this one's, which has a hash of tokens
SET_FRACTION = 1 / 4  # of this table is the working set
FP8, BF16 = "F.embedding of fp8, dequantised", "F.embedding of bf16"
TARGETS = {2: {FP8: 2.0}}  # rates, by threads


class TokenSet:
    """Tokens, each with those before it, whose rows an open store holds whole.

    Attributes:
        ids: int64 [N, tokens of the longest n-gram].
        held: The store; use it in a `with`.
    """

    def __init__(self, made: stores.MadeStore, spec: HashSpec, set_bytes: int, threads: int) -> None:
        """Opens the store and looks tokens up until it holds `set_bytes` of entries. Blocks."""
        self._spec = spec
        self._drawn: list[np.ndarray] = []
        self.held = WorkingSet(made, set_bytes, threads=threads, fresh_keys=self._fresh_keys)
        (drawn,) = self._drawn
        keys = self._keys(drawn)
        by_key = np.argsort(keys[:, -1])
        found = by_key[np.searchsorted(keys[:, -1], self.held.keys[:, -1], sorter=by_key)]
        self.ids: np.ndarray = drawn[found]
        assert np.array_equal(self._keys(self.ids), self.held.keys)

    def _fresh_keys(self, generator: np.random.Generator, count: int) -> np.ndarray:
        ids = generator.integers(0, stores.V41_VOCAB, (count, stores.ORDERS[-1]), dtype=np.int64)
        self._drawn.append(ids)
        return self._keys(ids)

    def _keys(self, ids: np.ndarray) -> np.ndarray:
        return self._spec.keys(ids[:, -1:], stores.LAYER, history=ids[:, :-1]).reshape(len(ids), -1)


def measure(folder: Path, size_bytes: int, options: Options) -> Result:
    """Measures decoded lookups. Needs an eighth of the table's size on disk."""
    import torch

    table_bytes = int(size_bytes * TABLE_FRACTION)
    made = stores.make_store(folder, table_bytes // stores.ROW_BYTES, np.arange(stores.V41_VOCAB, dtype=np.int32))
    spec = HashSpec.from_catalog(read_catalog(made.path))
    set_bytes = int(table_bytes * SET_FRACTION)
    tokens = options.tokens or TOKENS
    title = f"decode to bf16, all hits, {format_bytes(set_bytes)} of a table of {format_bytes(made.spec.table_bytes)}"
    result = Result(f"{title}, {options.threads} thread{'s' * (options.threads > 1)}")
    threads_before = torch.get_num_threads()
    token_set = TokenSet(made, spec, set_bytes, options.threads)
    with token_set.held as held:
        torch.set_num_threads(options.threads)
        try:
            misses_before = held.misses()
            sides = _sides(token_set, held, spec, tokens)
            result.compare(
                f"{tokens:,} tokens x {stores.ROWS_PER_TOKEN} rows of {stores.DIM} values, to bf16", "row",
                tokens * stores.ROWS_PER_TOKEN, sides, options.pairs, TARGETS.get(options.threads, {}),
            )  # fmt: skip
            result.facts["keys that missed in decoded runs"] = held.misses() - misses_before
        finally:
            torch.set_num_threads(threads_before)
    return result


def _sides(token_set: TokenSet, held: WorkingSet, spec: HashSpec, tokens: int) -> dict[str, Callable[[], float]]:
    """Returns the sides, each of which draws its tokens anew, after their outputs were found equal."""
    import torch
    from torch.nn import functional

    embedding = TieredEmbedding(held.store, stores.LAYER, spec)
    rows = torch.from_numpy(held.resident_rows())
    values, scales = (part.contiguous() for part in rows.split([stores.DIM, stores.ROW_BYTES - stores.DIM], dim=1))
    values = values.view(torch.float8_e4m3fn)
    del rows

    def tiered(places: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(token_set.ids[places])
        return embedding(ids[:, -1:], history=ids[:, :-1])

    def dequantised(ids: torch.Tensor) -> torch.Tensor:
        # In bfloat16, of which e4m3 values and powers of two are some: the fastest of torch's ways, and rounded once.
        found = functional.embedding(ids, values).to(torch.bfloat16)
        powers = functional.embedding(ids, scales).view(torch.float8_e8m0fnu).to(torch.bfloat16)
        found.unflatten(-1, (powers.shape[-1], -1)).mul_(powers.unsqueeze(-1))
        return found

    places = held.draw(tokens)
    ids = torch.from_numpy(held.resident_ids(places))
    expected = dequantised(ids)
    if not torch.equal(tiered(places)[:, 0].nan_to_num(), expected.nan_to_num()):
        raise ConfigError(
            "TieredEmbedding gives other values than torch; this is a fault of the benchmark or of a codec"
        )
    bf16 = torch.cat([dequantised(part) for part in torch.arange(len(values)).split(1 << 16)])

    def timed(call: Callable[[torch.Tensor], object]) -> float:
        return seconds_of_all(lambda ids, _: call(ids), [torch.from_numpy(held.resident_ids(held.draw(tokens)))], None)

    return {
        SUBJECT: lambda: seconds_of_all(lambda drawn, _: tiered(drawn), [held.draw(tokens)], None),
        FP8: lambda: timed(dequantised),
        BF16: lambda: timed(lambda ids: functional.embedding(ids, bf16)),
    }
