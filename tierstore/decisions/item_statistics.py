"""Statistics of counted items: classes of items by (order, count), and the held-out documents as replays.

Input: a profile's items, sorted, block by block, and the items that held-out documents accessed, in their order.
Output: a `TableGroup` for each set of tables whose accesses are the same: all tables of a profile of n-grams, each
table of a profile of keys. Errors: `FormatError` if the documents are not those that were counted. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .. import kernels
from ..errors import FormatError
from ..formats.profile import KEYS, ProfileHeader
from ..process.workers import aside
from .choose import ItemClasses, Part, item_hash
from .replay import Replay

_SECOND_HASH = np.uint64(0xD6E8FEB86659FD93)  # sampling must not follow the hash by which a class is taken in part
Counted = tuple[np.ndarray, np.ndarray]  # items uint64 [M, 2], sums int64 [M, 2]: counted, held out
GATHERED_MAX = 1 << 22  # counts that wait to be folded into classes, of all tables: 100 MB
PART_OVERHEAD = 16  # what the arrays of a part take beside their counts, in counts


@dataclass(frozen=True, eq=False)
class TableGroup:
    """Tables whose accesses are the same, what was counted of them, and what was held out.

    counted_rate: the share of items that were counted at all, 1 but for recorded keys; a replay may have fewer.
    item_classes: int64 [U], the class of each item of the replay, -1 if it was not counted; item_hashes: uint64 [U].
    """

    tables: tuple[str, ...]
    orders: tuple[int, ...]
    classes: ItemClasses
    counted_rate: float
    distinct: tuple[int, ...]
    replay: Replay
    item_classes: np.ndarray
    item_hashes: np.ndarray

    def truncated(self, tokens_max: int) -> TableGroup:
        """Returns the group with its replay cut after the last document that ends within tokens_max tokens,
        one at least."""
        replay = self.replay
        num_documents = max(1, int(np.searchsorted(replay.document_ends, tokens_max, side="right")))
        if num_documents >= len(replay.document_ends):
            return self
        ends = replay.document_ends[:num_documents]
        num_accesses = int(np.searchsorted(replay.tokens, ends[-1]))
        cut = {name: getattr(replay, name)[:num_accesses] for name in ("order_index", "items", "tokens")}
        return replace(self, replay=replace(replay, document_ends=ends, **cut))

    def sampled(self, accesses_max: int) -> TableGroup:
        """Returns the group with a replay of at most about `accesses_max` accesses: all those of a share of its items.

        The share is of items, by hash, since a share of the accesses would say nothing of a cache (SHARDS: Waldspurger
        et al., "Efficient MRC Construction with SHARDS", FAST 2015).
        """
        replay = self.replay
        share = accesses_max / max(len(replay.items), 1)
        if share >= 1:
            return self
        kept = (self.item_hashes * _SECOND_HASH >> np.uint64(11)) * 2.0**-53 < share
        accesses = kept[replay.items]
        renamed = np.cumsum(kept, dtype=np.int32) - 1
        return replace(
            self,
            replay=Replay(
                orders=replay.orders,
                order_index=replay.order_index[accesses],
                items=renamed[replay.items[accesses]],
                counts=replay.counts[kept],
                item_order=replay.item_order[kept],
                tokens=replay.tokens[accesses],
                document_ends=replay.document_ends,
                sample_rate=replay.sample_rate * share,
            ),
            item_classes=self.item_classes[kept],
            item_hashes=self.item_hashes[kept],
        )


class OrderSums:
    """Sums of a stream of sorted items after a shift; the last one waits,
    since it may go on in the next block."""

    def __init__(self, shift: int) -> None:
        self._shift = shift
        self._last: Counted | None = None

    def add(self, items: np.ndarray, sums: np.ndarray) -> Counted:
        """Takes the next items; returns those that are complete."""
        items, sums = kernels.sum_items(items, sums, self._shift)
        if self._last is not None:
            items, sums = np.concatenate([self._last[0], items]), np.concatenate([self._last[1], sums])
            items, sums = kernels.sum_items(items, sums, 0)
        self._last = (items[-1:].copy(), sums[-1:].copy()) if len(items) else None
        return items[:-1], sums[:-1]

    def end(self) -> Counted:
        """Returns the last item, if there was any."""
        last, self._last = self._last, None
        return last if last is not None else (np.empty((0, 2), np.uint64), np.empty((0, 2), np.int64))


class OrderSplit:
    """Splits a stream of a profile's items into the items of each (table, order): n-grams by shifting,
    keys by their mark."""

    def __init__(self, header: ProfileHeader) -> None:
        self._header = header
        self._sums = [] if header.kind == KEYS else [OrderSums(header.shift(order)) for order in header.orders]

    def add(self, items: np.ndarray, sums: np.ndarray) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        """Takes the next items; returns (table index, order index, items, sums) of those that are complete."""
        if self._header.kind != KEYS:
            return [(0, order_index, *part.add(items, sums)) for order_index, part in enumerate(self._sums)]
        marks, starts = np.unique(items[:, 0], return_index=True)
        bounds = np.append(starts, len(items)).tolist()
        return [
            (int(mark) >> 32, int(mark) & 0xFFFFFFFF, items[start:end], sums[start:end])
            for mark, start, end in zip(marks.tolist(), bounds[:-1], bounds[1:], strict=True)
        ]

    def end(self) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        """Returns the items that wait."""
        return [(0, order_index, *part.end()) for order_index, part in enumerate(self._sums)]


class ItemStatistics:
    """Takes a profile's items as they stream by, and in the end the held-out accesses; gives the groups."""

    def __init__(self, header: ProfileHeader) -> None:
        self._header = header
        self._split = OrderSplit(header)
        self._parts: dict[int, list[Part]] = {}
        self._kept: dict[tuple[int, int], list[Counted]] = {}
        self._distinct: dict[tuple[int, int], int] = {}
        self._num_gathered = 0

    @property
    def kind(self) -> str:
        """What is counted: NGRAMS or KEYS."""
        return self._header.kind

    def add(self, items: np.ndarray, sums: np.ndarray) -> None:
        """Takes the next items, uint64 [M, 2] sorted, and their sums, int64 [M, 2]."""
        self._take(self._split.add(items, sums))

    def _take(self, parts: list[tuple[int, int, np.ndarray, np.ndarray]]) -> None:
        for table_index, order_index, items, sums in parts:
            table_order = table_index, order_index
            counts, held_out = np.ascontiguousarray(sums[:, 0]), np.ascontiguousarray(sums[:, 1])
            self._parts.setdefault(table_index, []).append((order_index, counts, held_out, np.ones_like(counts)))
            self._distinct[table_order] = self._distinct.get(table_order, 0) + len(items)
            again = held_out > 0
            self._kept.setdefault(table_order, []).append((items[again], sums[again]))
            self._num_gathered += len(items) + PART_OVERHEAD
        if self._num_gathered >= GATHERED_MAX:  # what is gathered must not grow with the profile
            self._parts = {index: ItemClasses.of_parts(gathered).as_parts() for index, gathered in self._parts.items()}
            self._num_gathered = 0

    def groups(
        self, held_out_items: np.ndarray, document_ends: np.ndarray, tokens: np.ndarray | None
    ) -> list[TableGroup]:
        """Returns the groups. held_out_items: uint64 [T, 2], the items that held-out documents accessed, in order.

        document_ends: int64 [D], in tokens; tokens: int64 [T], the token (of keys: the lookup) of each, None if each
        is its own. Raises `FormatError` if they are not those that were counted.
        """
        self._take(self._split.end())
        if tokens is None:
            tokens = np.arange(len(held_out_items))
        if self._header.kind != KEYS:
            return [self._group(0, held_out_items, document_ends, tokens)]
        table_of = (held_out_items[:, 0] >> np.uint64(32)).astype(np.int64)
        groups = [
            self._group(index, held_out_items[table_of == index], document_ends, tokens[table_of == index])
            for index in range(len(self._header.tables))
        ]
        if (num_known := sum(len(group.replay.items) for group in groups)) != len(held_out_items):
            raise FormatError(
                f"the profile's held-out documents access {len(held_out_items)} keys, {num_known} of them of its "
                f"tables and orders; profile again"
            )
        return groups

    def _group(
        self, table_index: int, held_out: np.ndarray, document_ends: np.ndarray, tokens: np.ndarray
    ) -> TableGroup:
        header = self._header
        names = tuple(name for name, _, _ in header.tables)
        orders = header.tables[table_index][2]
        ordered = held_out.copy()
        access = np.arange(len(held_out), dtype=np.int64)[:, None]
        aside(kernels.sort_items, ordered, access)
        ids, counts, hashes, item_order = [], [], [], []
        num_items = 0
        for order_index, order in enumerate(orders):
            mine, shift = ordered, 0 if header.kind == KEYS else header.shift(order)
            at = access[:, 0]
            if header.kind == KEYS:
                wanted = ordered[:, 0] == np.uint64(table_index << 32 | order_index)
                mine, at = ordered[wanted], at[wanted]
            unique, uses = aside(kernels.sum_items, mine, None, shift)
            kept_items, kept_sums = self._kept_of(table_index, order_index)
            if not np.array_equal(unique, kept_items) or not np.array_equal(uses[:, 0], kept_sums[:, 1]):
                raise FormatError(
                    f"the profile's held-out documents are not those that it counted: {len(unique)} n-grams of order "
                    f"{order}, {len(kept_items)} counted; profile again"
                )
            of_access = np.full(len(held_out), -1, dtype=np.int32)
            of_access[at] = num_items + np.repeat(np.arange(len(unique), dtype=np.int32), uses[:, 0])
            ids.append(of_access)
            counts.append(kept_sums[:, 0])
            hashes.append(item_hash(unique))
            item_order.append(np.full(len(unique), order_index, dtype=np.uint8))
            num_items += len(unique)
        items = np.stack(ids, axis=1).reshape(-1)
        del ordered, access, ids, of_access
        there = items >= 0
        replay = Replay(
            orders=orders,
            order_index=np.tile(np.arange(len(orders), dtype=np.uint8), len(held_out))[there],
            items=items[there],
            counts=np.concatenate(counts),
            item_order=np.concatenate(item_order),
            tokens=np.repeat(tokens, len(orders))[there],
            document_ends=document_ends,
            sample_rate=header.sample_rate,
        )
        classes = ItemClasses.of_parts(self._parts.get(table_index, []))
        return TableGroup(
            tables=names if header.kind != KEYS else (names[table_index],),
            orders=orders,
            classes=classes,
            counted_rate=header.sample_rate,
            distinct=tuple(self._distinct.get((table_index, index), 0) for index in range(len(orders))),
            replay=replay,
            item_classes=classes.class_of(replay.item_order, replay.counts),
            item_hashes=np.concatenate(hashes),
        )

    def _kept_of(self, table_index: int, order_index: int) -> Counted:
        empty = np.empty((0, 2), np.uint64), np.empty((0, 2), np.int64)
        parts = [empty, *self._kept.get((table_index, order_index), [])]
        items, sums = zip(*parts, strict=True)
        return np.concatenate(items), np.concatenate(sums)
