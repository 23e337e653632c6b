"""Counted items give the classes and replays that plain dictionaries of n-grams and keys give, however they are cut."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from tierstore.decisions import choose, item_statistics
from tierstore.decisions.item_statistics import ItemStatistics, OrderSplit, OrderSums, TableGroup
from tierstore.errors import FormatError
from tierstore.formats.profile import KEYS, NGRAMS, ProfileHeader

PAD = 0
WORD = 2**64
Access = tuple[int, ...]  # (order index, the n-gram, newest first) or (order index, key)


def array_of(values: list[int]) -> np.ndarray:
    return np.array([divmod(value, WORD) for value in values], dtype=np.uint64).reshape(-1, 2)


def ngram_header(orders: tuple[int, ...], bits: int, rate: float = 1.0) -> ProfileHeader:
    return ProfileHeader(NGRAMS, (("layers.1", "a", orders), ("layers.4", "b", orders)), bits, 0.5, rate)


KEY_HEADER = ProfileHeader(KEYS, (("layers.1", "a", (2, 3, 4)), ("plain", "b", (1,))), 0, 0.5, 0.25)


def cut(rng: np.random.Generator, count: int, block: int) -> Iterator[slice]:
    """Cuts a stream into blocks of about `block`, some of them empty."""
    start = 0
    while start < count:
        end = start + int(rng.integers(0, 2 * block))
        yield slice(start, end)
        start = end


def statistics_of(
    header: ProfileHeader, counted: list[int], held_out: list[int], seed: int, block: int
) -> ItemStatistics:
    """Counts accesses in plain Python, and streams what comes of it through a statistics."""
    sums = Counter(counted)
    held = Counter(held_out)
    values = sorted(sums | held)
    items = array_of(values)
    columns = np.array([[sums[value], held[value]] for value in values], dtype=np.int64).reshape(-1, 2)
    made = ItemStatistics(header)
    for part in cut(np.random.default_rng(seed), len(values), block):
        made.add(items[part], columns[part])
    return made


def assert_group(
    group: TableGroup, header: ProfileHeader, counted: list[Access], held: list[Access], tokens: list[int]
) -> None:
    """Holds a group against accesses counted one by one; which access gets which id is free,
    but equal ones get equal ids."""
    sums, held_sums = Counter(counted), Counter(held)
    expected: dict[tuple[int, int], list[int]] = {}
    for access in sums:
        told = expected.setdefault((access[0], sums[access]), [0, 0])
        told[0] += 1
        told[1] += held_sums[access]
    classes = group.classes
    columns = (classes.order_index, classes.counts, classes.num_items, classes.held_out)
    found = [tuple(row) for row in np.stack(columns, axis=1).tolist()]
    assert found == [(*key, *told) for key, told in sorted(expected.items())]
    everything = set(sums) | set(held_sums)
    assert group.distinct == tuple(
        sum(access[0] == index for access in everything) for index in range(len(group.orders))
    )

    replay = group.replay
    assert replay.sample_rate == header.sample_rate
    assert replay.order_index.tolist() == [access[0] for access in held]
    assert replay.tokens.tolist() == tokens
    name_of: dict[int, Access] = {}
    for item, access in zip(replay.items.tolist(), held, strict=True):
        assert name_of.setdefault(item, access) == access
    assert len(name_of) == len(held_sums) == len(replay.counts) == len(replay.item_order) == len(group.item_classes)
    for item, access in name_of.items():
        assert replay.counts[item] == sums[access]
        assert replay.item_order[item] == access[0]
        place = int(group.item_classes[item])
        assert (place == -1) == (sums[access] == 0)
        assert place == -1 or found[place][:2] == (access[0], sums[access])


def windows_of(documents: list[list[int]], orders: tuple[int, ...], bits: int) -> tuple[list[int], list[Access]]:
    """Packed windows of the largest order, one a token; and of each token the n-gram of every order, newest first."""
    windows, accesses = [], []
    for ids in documents:
        for place in range(len(ids)):
            back = [ids[place - i] if place >= i else PAD for i in range(orders[-1])]
            windows.append(sum(token << bits * (orders[-1] - 1 - i) for i, token in enumerate(back)))
            accesses += [(index, *back[:order]) for index, order in enumerate(orders)]
    return windows, accesses


def some_documents(rng: np.random.Generator, num_documents: int, bits: int) -> list[list[int]]:
    """Documents over few ids, the pad and the largest among them, so that n-grams repeat within and over documents."""
    alphabet = [PAD, 1, 2, 2**bits - 1]
    return [rng.choice(alphabet, int(rng.integers(1, 60))).tolist() for _ in range(num_documents)]


CASES = [((2, 3, 4), 5), ((2, 3, 4), 32), ((2, 3), 17), ((2, 3), 42), ((3,), 2), ((1, 8), 16)]


@pytest.mark.parametrize("block", [1, 5, 70, 10_000])
@pytest.mark.parametrize(("orders", "bits"), CASES, ids=str)
def test_groups_of_n_grams_are_what_counters_of_them_say(orders: tuple[int, ...], bits: int, block: int) -> None:
    rng = np.random.default_rng([bits, block])
    header = ngram_header(orders, bits)
    counted, held = some_documents(rng, 12, bits), some_documents(rng, 4, bits)
    (windows, accesses), (held_windows, held_accesses) = (windows_of(part, orders, bits) for part in (counted, held))
    made = statistics_of(header, windows, held_windows, seed=block, block=block)
    ends = np.cumsum([len(ids) for ids in held])
    (group,) = made.groups(array_of(held_windows), ends, None)
    assert group.tables == ("layers.1", "layers.4")
    assert group.orders == orders
    assert group.replay.document_ends.tolist() == ends.tolist()
    tokens = np.repeat(np.arange(ends[-1]), len(orders)).tolist()
    assert_group(group, header, accesses, held_accesses, tokens)
    for access, item in zip(held_accesses, group.replay.items.tolist(), strict=True):
        packed = sum(token << bits * place for place, token in enumerate(reversed(access[1:])))
        assert group.item_hashes[item] == choose.item_hash(array_of([packed]))[0]


@pytest.mark.parametrize("block", [1, 40, 10_000])
def test_groups_of_keys_are_what_counters_of_each_table_say(block: int) -> None:
    rng = np.random.default_rng(block)
    parts: list[list[tuple[int, int, int]]] = []
    for count in (500, 120):
        tables, keys = rng.integers(0, 2, count), rng.choice([0, 1, 7, 2**63 - 1], count)
        order_index = np.where(tables == 0, rng.integers(0, 3, count), 0)
        parts.append([tuple(access) for access in np.stack([tables, order_index, keys], axis=1).tolist()])
    held = parts[1]
    tokens = np.sort(rng.integers(0, 300, len(held)))
    packed = [[(table << 32 | order) * WORD + key for table, order, key in part] for part in parts]
    made = statistics_of(KEY_HEADER, *packed, seed=block, block=block)
    ends = np.array([100, 300, 310])
    groups = made.groups(array_of(packed[1]), ends, tokens)
    assert [(group.tables, group.orders) for group in groups] == [(("layers.1",), (2, 3, 4)), (("plain",), (1,))]
    for index, group in enumerate(groups):
        of_table = [[(order, key) for table, order, key in part if table == index] for part in parts]
        mine = [token for (table, _, _), token in zip(held, tokens.tolist(), strict=True) if table == index]
        assert_group(group, KEY_HEADER, *of_table, mine)
        assert group.replay.document_ends.tolist() == ends.tolist()


@pytest.mark.parametrize("header", [ngram_header((2, 3), 4), KEY_HEADER], ids=[NGRAMS, KEYS])
@pytest.mark.parametrize(("num_counted", "num_held"), [(0, 0), (1, 0), (9, 0), (0, 1), (0, 9), (1, 1)])
def test_parts_of_no_or_one_access_give_groups(header: ProfileHeader, num_counted: int, num_held: int) -> None:
    """A profile of keys whose held-out part was empty failed an assertion once."""
    counted, held = [3] * num_counted, [3] * num_held
    made = statistics_of(header, counted, held, seed=0, block=1)
    groups = made.groups(array_of(held), np.array([num_held] if num_held else [], dtype=np.int64), None)
    assert len(groups) == {NGRAMS: 1, KEYS: 2}[header.kind]
    num_orders = len(groups[0].orders) if header.kind == NGRAMS else 1
    assert len(groups[0].replay.items) == num_held * num_orders
    assert groups[0].classes.counts.tolist() == [num_counted] * (num_orders if num_counted else 0)
    assert groups[0].classes.held_out.tolist() == [num_held] * (num_orders if num_counted else 0)
    assert set(groups[0].item_classes.tolist()) <= ({-1} if num_counted == 0 else set(range(num_orders)))
    if header.kind == KEYS:
        assert (groups[1].distinct, len(groups[1].replay.items), len(groups[1].classes.counts)) == ((0,), 0, 0)


@pytest.mark.parametrize("change", ["one more", "one less", "another", "none"])
@pytest.mark.parametrize("header", [ngram_header((2, 3), 4), KEY_HEADER], ids=[NGRAMS, KEYS])
def test_held_out_documents_that_were_not_counted_are_refused(header: ProfileHeader, change: str) -> None:
    held = [5, 5, 9]
    others = {"one more": [*held, 9], "one less": held[:2], "another": [5, 9, 9], "none": []}[change]
    made = statistics_of(header, [5, 6], held, seed=0, block=2)
    with pytest.raises(FormatError, match="not those that it counted"):
        made.groups(array_of(others), np.array([len(others)]), None)


@pytest.mark.parametrize("mark", [3, 1 << 32 | 1, 2 << 32])
def test_held_out_keys_of_no_table_or_order_are_refused(mark: int) -> None:
    made = statistics_of(KEY_HEADER, [5], [5], seed=0, block=2)
    with pytest.raises(FormatError, match="access 2 keys, 1 of them of its tables"):
        made.groups(array_of([5, mark * WORD]), np.array([2]), None)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shift", [0, 1, 7, 64, 100, 127])
def test_sums_of_a_stream_do_not_depend_on_its_blocks(shift: int, seed: int) -> None:
    rng = np.random.default_rng([shift, seed])
    values = sorted(
        {int(high) * WORD + int(low) for high, low in rng.integers(0, 2**64, (200, 2), dtype=np.uint64) % 97}
    )
    weights = rng.integers(0, 9, (len(values), 2))
    expected: Counter[tuple[int, int]] = Counter()
    for value, (counted, held) in zip(values, weights.tolist(), strict=True):
        expected[value >> shift, 0] += counted
        expected[value >> shift, 1] += held
    sums, found = OrderSums(shift), []
    items = array_of(values)
    for part in cut(rng, len(values), 6):
        found.append(sums.add(items[part], weights[part]))
    found += [sums.end(), sums.end()]
    got = np.concatenate([np.concatenate([part, columns.astype(np.uint64)], axis=1) for part, columns in found])
    distinct = sorted({value for value, _ in expected})
    assert got.tolist() == [[*divmod(value, WORD), expected[value, 0], expected[value, 1]] for value in distinct]


def test_an_n_gram_that_goes_on_over_many_blocks_is_counted_once() -> None:
    """Every window starts with the same two ids: their n-gram is complete only at the end."""
    split = OrderSplit(ngram_header((2, 3), 8))
    values = [(7 << 8 | 9) << 8 | newest for newest in range(40)]
    complete = []
    for start in range(0, 40, 3):
        part = array_of(values[start : start + 3])
        complete += split.add(part, np.ones((len(part), 2), dtype=np.int64))
    assert sum(len(items) for _, order, items, _ in complete if order == 0) == 0
    ends = {order: (items.tolist(), sums.tolist()) for _, order, items, sums in split.end()}
    assert ends == {0: ([[0, 7 << 8 | 9]], [[40, 40]]), 1: ([[0, values[-1]]], [[1, 1]])}


def test_keys_split_by_table_and_order_wherever_blocks_end() -> None:
    split = OrderSplit(KEY_HEADER)
    items = np.array([[0, 1], [0, 2], [2, 1], [1 << 32, 5]], dtype=np.uint64)
    sums = np.arange(8).reshape(4, 2)
    found = [
        (table, order, part.tolist(), columns.tolist())
        for block in (slice(0, 1), slice(1, 1), slice(1, 4))
        for table, order, part, columns in split.add(items[block], sums[block])
    ]
    assert found == [
        (0, 0, [[0, 1]], [[0, 1]]),
        (0, 0, [[0, 2]], [[2, 3]]),
        (0, 2, [[2, 1]], [[4, 5]]),
        (1, 0, [[1 << 32, 5]], [[6, 7]]),
    ]
    assert split.end() == []


def test_memory_does_not_grow_with_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts waited in 64 parts of any size once: 1.9 GB for 22 million n-grams of text."""
    monkeypatch.setattr(item_statistics, "GATHERED_MAX", 1 << 15)
    rng = np.random.default_rng(0)
    made, peaks = ItemStatistics(ngram_header((2, 3, 4), 17)), []
    counted = Counter[int]()
    tracemalloc.start()
    for step in range(60):
        low = np.sort(rng.integers(0, 2**60, 10_000, dtype=np.uint64))
        sums = np.stack([rng.zipf(1.6, 10_000) % 5000, np.zeros(10_000, dtype=np.int64)], axis=1)
        made.add(np.stack([np.full(10_000, step, dtype=np.uint64), low], axis=1), sums)
        counted.update(sums[:, 0].tolist())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
    tracemalloc.stop()
    assert max(peaks) < 8e6  # they took 18 MB
    (group,) = made.groups(np.empty((0, 2), dtype=np.uint64), np.array([], dtype=np.int64), None)
    largest = group.classes.order_index == 2
    assert dict(
        zip(group.classes.counts[largest].tolist(), group.classes.num_items[largest].tolist(), strict=True)
    ) == {count: num for count, num in counted.items() if count}


def test_folding_midway_changes_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    windows, accesses = windows_of(some_documents(rng, 30, 4), (2, 3), 4)
    held_windows, held_accesses = windows_of(some_documents(rng, 5, 4), (2, 3), 4)
    monkeypatch.setattr(item_statistics, "GATHERED_MAX", 1)
    header = ngram_header((2, 3), 4)
    made = statistics_of(header, windows, held_windows, seed=0, block=3)
    (group,) = made.groups(array_of(held_windows), np.array([len(held_windows)]), None)
    assert_group(group, header, accesses, held_accesses, np.repeat(np.arange(len(held_windows)), 2).tolist())
