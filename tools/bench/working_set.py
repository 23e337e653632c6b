"""A working set: tokens whose entries a store's caches hold whole, the same entries in the yardstick, the same rows in
a table.

Input: a made store and how many bytes of entries are wanted. Output: an open store that answers all of those keys from
DRAM, and views of the same data for the sides that it is compared with. Errors: `ConfigError` for a budget that cannot
hold them all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import tierstore
from tierstore.errors import ConfigError

from . import stores
from .stores import MadeStore

SPARE_TOKENS = 1.2  # tokens tried for each that is wanted: those whose sets are full are given up
DRAM_FACTOR = 2.75  # budget for each byte of the working set, where none is given
FILL_TOKENS = 1024  # in a lookup
FILL_ROUNDS_MAX = 8


class WorkingSet:
    """An open store and the tokens that it holds whole: `keys`, int64 [N, O]. Use it in a `with`."""

    def __init__(
        self,
        made: MadeStore,
        set_bytes: int,
        dram_bytes: int | None = None,
        *,
        io: str = "auto",
        threads: int | None = None,
        fresh_keys: Callable[[np.random.Generator, int], np.ndarray] = stores.fresh_keys,
    ) -> None:
        """Opens the store and looks tokens up until `set_bytes` of entries are held. Blocks:
        reads every row once or twice. io, threads: as of `tierstore.open`. fresh_keys: draws them, [count, O]."""
        self.made = made
        wanted = max(1, set_bytes // (stores.ROWS_PER_TOKEN * stores.ROW_BYTES))
        self.dram_bytes = dram_bytes or max(int(set_bytes * DRAM_FACTOR), 1 << 20)
        if self.dram_bytes >= made.spec.table_bytes:
            raise ConfigError(
                f"a budget of {self.dram_bytes} bytes holds the whole table of {made.spec.table_bytes} bytes; "
                f"give a larger --size or less --dram"
            )
        self.store = tierstore.open(made.path, dram=self.dram_bytes, io=io, threads=threads)
        try:
            self.table = self.store[stores.TABLE]
            self._out = stores.rows_buffer(FILL_TOKENS)
            generator = np.random.default_rng()
            keys = fresh_keys(generator, int(wanted * SPARE_TOKENS) + 16)
            self.keys = self._filled(keys, wanted)
            self.generator = generator
        except BaseException:
            self.store.close()
            raise

    def _filled(self, keys: np.ndarray, wanted: int) -> np.ndarray:
        """Looks keys up until the caches hold `wanted` of the tokens whole; returns those tokens' keys.

        A set that is asked for nine keys loses one for each that it takes in. So tokens are tried one by one, each
        round in the other direction (the last one in is the first to be asked for),
        and those that miss are given up for good.
        """
        self._misses_of(keys, FILL_TOKENS)
        kept = keys
        for _ in range(FILL_ROUNDS_MAX):
            kept = kept[::-1]
            kept = kept[[not self._misses_of(kept[i : i + 1], 1) for i in range(len(kept))]]
            if len(kept) < wanted:
                break
            if not self._misses_of(kept, FILL_TOKENS):
                return kept[:wanted]
        raise ConfigError(
            f"a budget of {self.dram_bytes} bytes holds {len(kept)} of {len(keys)} tokens whole, {wanted} are wanted "
            f"and none may miss; give --dram more"
        )

    def _misses_of(self, keys: np.ndarray, chunk: int) -> int:
        before = self.misses()
        for start in range(0, len(keys), chunk):
            part = keys[start : start + chunk]
            self.table.lookup(part, self._out[: len(part)])
        return self.misses() - before

    def draw(self, num_tokens: int) -> np.ndarray:
        """Returns the places in `keys` of tokens drawn at random, int64 [num_tokens]."""
        return self.generator.integers(0, len(self.keys), num_tokens)

    def single_tokens(self, count: int) -> list[np.ndarray]:
        """Returns keys [1, O] of `count` tokens drawn at random."""
        return list(self.keys[self.draw(count)][:, None])

    def misses(self) -> int:
        """Returns how many keys the store has read from NVMe since it was opened."""
        return int(self.store.stats()["hits"]["nvme"])

    def resident_rows(self) -> np.ndarray:
        """Returns the set's rows as one embedding table, uint8 [O * H * N, R]: row h * N + n is row h of token n.

        A token's rows lie as far apart as in a model's table, where every head has a range of its own.
        """
        num_tokens = len(self.keys)
        rows = np.empty((stores.ROWS_PER_TOKEN, num_tokens, stores.ROW_BYTES), dtype=np.uint8)
        step = 4096
        for start in range(0, num_tokens, step):
            part = self.table.lookup(self.keys[start : start + step])
            rows[:, start : start + len(part)] = part.transpose(1, 0, 2)
        return rows.reshape(-1, stores.ROW_BYTES)

    def resident_entries(self) -> np.ndarray:
        """Returns the set's entries as one table, uint8 [O * N, H * R]: row o * N + n is entry o of token n."""
        num_tokens, num_orders = len(self.keys), len(stores.ORDERS)
        entries = np.empty((num_orders, num_tokens, stores.ENTRY_BYTES), dtype=np.uint8)
        step = 4096
        for start in range(0, num_tokens, step):
            part = self.table.lookup(self.keys[start : start + step]).reshape(-1, num_orders, stores.ENTRY_BYTES)
            entries[:, start : start + len(part)] = part.transpose(1, 0, 2)
        return entries.reshape(-1, stores.ENTRY_BYTES)

    def entry_ids(self, places: np.ndarray) -> np.ndarray:
        """Returns the ids, int64 [N, O], in `resident_entries` of the entries of tokens at `places`."""
        return np.arange(len(stores.ORDERS)) * len(self.keys) + places[:, None]

    def resident_ids(self, places: np.ndarray) -> np.ndarray:
        """Returns the ids, int64 [N, O * H], in `resident_rows` of the rows of tokens at `places`."""
        return np.arange(stores.ROWS_PER_TOKEN) * len(self.keys) + places[:, None]

    def __enter__(self) -> WorkingSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()
