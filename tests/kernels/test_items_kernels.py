"""128-bit items of the compiled kernels and of the NumPy reference, against Python's own integers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from tierstore import kernels
from tierstore.kernels import reference

IMPLEMENTATIONS: dict[str, Any] = {"reference": reference, "compiled": kernels}
every = pytest.mark.parametrize("name", IMPLEMENTATIONS)

KEY_MAX = 2**63 - 1
WORD = 2**64
EDGES = [0, 1, 255, 256, WORD - 1, WORD, WORD + 1, 1 << 120, 2**127, 2**128 - 1, 2**128 - 256, (2**56) << 64]


def items_of(values: list[int]) -> np.ndarray:
    return np.array([divmod(value, WORD) for value in values], dtype=np.uint64).reshape(-1, 2)


def values_of(items: np.ndarray) -> list[int]:
    return [high * WORD + low for high, low in items.tolist()]


def random_values(seed: int, count: int) -> list[int]:
    """Values of all widths and with zero bytes at either end, many equal, some at the edges."""
    rng = np.random.default_rng(seed)
    values = []
    for width in rng.integers(1, 17, count).tolist():
        value = int.from_bytes(rng.bytes(width), "big") << 8 * int(rng.integers(0, 17 - width))
        values += [value, *(rng.choice(values, 2).tolist() if rng.random() < 0.1 and values else [])]
    values = [*values, *EDGES][len(values) + len(EDGES) - count :]
    return [values[i] for i in rng.permutation(len(values))]


class Document:
    """Random arguments of `windows_of_tokens`, and the ids of each n-gram, newest first, token by token."""

    def __init__(
        self, seed: int, num_tokens: int, order_max: int, bits: int, with_map: bool, with_barrier: bool
    ) -> None:
        rng = np.random.default_rng([seed, num_tokens, order_max, bits, with_map, with_barrier])
        self.order_max, self.bits = order_max, bits
        self.vocab_size = min(50, 2**bits)
        ids_max = min(2**bits, 2**31 if with_map else self.vocab_size)
        self.token_map = rng.integers(0, ids_max, self.vocab_size).astype(np.int32) if with_map else None
        if self.token_map is not None:
            self.token_map[0] = ids_max - 1
        self.pad_id = int(rng.integers(0, 2**bits))
        self.barrier_id = 1 if with_barrier else -1
        self.token_ids = rng.integers(0, self.vocab_size, num_tokens)
        self.token_ids[rng.random(num_tokens) < 0.2] = 1

    def run(self, name: str, out: np.ndarray) -> int:
        return IMPLEMENTATIONS[name].windows_of_tokens(
            self.token_ids,
            self.token_map,
            self.vocab_size,
            self.pad_id,
            self.barrier_id,
            self.order_max,
            self.bits,
            out,
        )

    def ngrams(self) -> list[list[int]]:
        found = []
        for place in range(len(self.token_ids)):
            ngram, ended = [], False
            for back in range(self.order_max):
                token = int(self.token_ids[place - back]) if place >= back else -1
                ended = ended or token == -1 or (back > 0 and token == self.barrier_id)
                mapped = token if self.token_map is None else int(self.token_map[token])
                ngram.append(self.pad_id if ended else mapped)
            found.append(ngram)
        return found

    def expected(self) -> list[int]:
        places = range(self.order_max - 1, -1, -1)
        return [
            sum(number << self.bits * i for number, i in zip(ngram, places, strict=True)) for ngram in self.ngrams()
        ]


def poisoned(*shape: int) -> np.ndarray:
    return np.full(shape, 0xA5A5A5A5A5A5A5A5, dtype=np.uint64)


@every
@pytest.mark.parametrize(
    ("order_max", "bits"), [(1, 1), (1, 63), (2, 63), (2, 32), (3, 42), (4, 17), (4, 32), (5, 25), (16, 8), (128, 1)]
)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 150])
def test_windows_equal_plain_integers(name: str, order_max: int, bits: int, num_tokens: int) -> None:
    for with_map in (False, True):
        for with_barrier in (False, True):
            document = Document(0, num_tokens, order_max, bits, with_map, with_barrier)
            out = poisoned(num_tokens, 2)
            assert document.run(name, out) == -1
            assert values_of(out) == document.expected()


@every
@pytest.mark.parametrize("with_map", [False, True])
def test_windows_shifted_to_each_order_give_the_keys_of_the_tokens(name: str, with_map: bool) -> None:
    """Also with multipliers whose products leave 63 bits: both wrap around alike."""
    rng = np.random.default_rng(1)
    for order_max, bits in ((1, 6), (3, 17), (4, 32), (16, 8)):
        document = Document(1, 300, order_max, bits, with_map, True)
        windows = poisoned(300, 2)
        document.run(name, windows)
        multipliers = rng.integers(1, KEY_MAX, order_max)
        orders = np.arange(1, order_max + 1)
        keys = np.empty((1, 300, order_max), dtype=np.int64)
        assert IMPLEMENTATIONS[name].keys_of_tokens(
            document.token_ids[None], None, None, document.token_map, document.vocab_size, multipliers, orders,
            document.pad_id, document.barrier_id, keys,
        ) == -1  # fmt: skip
        for order in orders.tolist():
            shifted = items_of([value >> bits * (order_max - order) for value in values_of(windows)])
            found = np.full(300, -7)
            IMPLEMENTATIONS[name].keys_of_windows(shifted, order, bits, multipliers, found)
            np.testing.assert_array_equal(found, keys[0, :, order - 1])


@every
@pytest.mark.parametrize("bad", [50, -1, -(2**63), KEY_MAX])
def test_the_first_id_outside_the_vocabulary_is_found_at_every_place(name: str, bad: int) -> None:
    document = Document(2, 6, 3, 17, True, True)
    for place in range(6):
        document.token_ids[place:] = bad
        assert document.run(name, poisoned(6, 2)) == place
        document.token_ids[place:] = 3


@every
def test_an_id_that_does_not_fit_its_bits_is_refused(name: str) -> None:
    for wrong in (64, -1, 2**31 - 1):
        document = Document(3, 9, 3, 6, True, False)
        assert document.token_map is not None
        document.token_map[7], document.token_ids[4] = wrong, 7
        with pytest.raises(ValueError, match="fit bits"):
            document.run(name, poisoned(9, 2))
    document = Document(3, 9, 3, 6, False, False)
    document.bits, document.token_ids[4] = 4, 16
    document.pad_id = 0
    with pytest.raises(ValueError, match="fit bits"):
        document.run(name, poisoned(9, 2))


@every
def test_a_string_of_sixteen_bytes_orders_as_its_number_whatever_its_zero_bytes(name: str) -> None:
    """NumPy drops trailing zero bytes of a string; the reference rests on that making no difference."""
    values = [lead << 8 * zeros for zeros in range(16) for lead in (1, 2, 255) if lead << 8 * zeros < 2**128] + [0]
    values += [(1 << 120) + (1 << 8 * zeros) for zeros in range(15)]
    items = items_of(values[::-1] + values)
    IMPLEMENTATIONS[name].sort_items(items)
    assert values_of(items) == sorted(values * 2)
    distinct, counts = IMPLEMENTATIONS[name].sum_items(items, None, 0)
    assert values_of(distinct) == sorted(set(values))
    assert counts.sum() == 2 * len(values)
    assert IMPLEMENTATIONS[name].find_items(distinct, distinct).tolist() == list(range(len(distinct)))


@every
@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 256, 257, 4000])
def test_items_are_sorted_and_their_weights_with_them_in_given_order(name: str, count: int) -> None:
    values = random_values(count, count)
    for width in (0, 1, 3):
        items, weights = items_of(values), np.arange(count * width).reshape(count, width)
        IMPLEMENTATIONS[name].sort_items(items, weights)
        order = sorted(range(count), key=lambda i: values[i])  # stable
        assert values_of(items) == [values[i] for i in order]
        assert weights.tolist() == [[i * width + column for column in range(width)] for i in order]
    items = items_of(values)
    IMPLEMENTATIONS[name].sort_items(items)
    assert values_of(items) == sorted(values)


@every
@pytest.mark.parametrize("shift", [0, 1, 17, 63, 64, 65, 100, 127])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_sums_equal_plain_integers(name: str, shift: int, count: int) -> None:
    values = sorted(random_values(shift, count))
    weights = np.random.default_rng(shift).integers(-5, 2**40, (count, 2))
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for value, (one, other) in zip(values, weights.tolist(), strict=True):
        of_value = sums[value >> shift]
        of_value[:] = of_value[0] + one, of_value[1] + other, of_value[2] + 1
    distinct, found = IMPLEMENTATIONS[name].sum_items(items_of(values), weights, shift)
    assert values_of(distinct) == list(sums)
    assert found.tolist() == [of_value[:2] for of_value in sums.values()]
    distinct, counts = IMPLEMENTATIONS[name].sum_items(items_of(values), None, shift)
    assert values_of(distinct) == list(sums)
    assert counts.tolist() == [[of_value[2]] for of_value in sums.values()]


@every
@pytest.mark.parametrize("haystack_size", [0, 1, 2, 500])
@pytest.mark.parametrize("num_needles", [0, 1, 700])
def test_needles_are_found_where_they_are_and_nowhere_else(name: str, haystack_size: int, num_needles: int) -> None:
    haystack = sorted(set(random_values(5, haystack_size)))
    needles = sorted(random_values(6, num_needles // 2) + (haystack * 2)[: num_needles - num_needles // 2])
    places = {value: place for place, value in enumerate(haystack)}
    found = IMPLEMENTATIONS[name].find_items(items_of(haystack), items_of(needles))
    assert found.dtype == np.int64
    assert found.tolist() == [places.get(value, -1) for value in needles]


@every
def test_items_out_of_order_are_refused(name: str) -> None:
    down, twice = items_of([1, WORD, WORD - 1]), items_of([0, WORD, WORD])
    with pytest.raises(ValueError, match="sorted"):
        IMPLEMENTATIONS[name].sum_items(down, None, 0)
    with pytest.raises(ValueError, match="sorted"):
        IMPLEMENTATIONS[name].sum_items(down, None, 100)
    for haystack, needles in ((down, twice), (twice, twice), (items_of([]), down), (down, items_of([]))):
        with pytest.raises(ValueError, match="ascend"):
            IMPLEMENTATIONS[name].find_items(haystack, needles)


@every
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    kernel = IMPLEMENTATIONS[name]
    items, weights = items_of([1, 2, 3]), np.ones((3, 1), dtype=np.int64)
    for bad in (items[0], items.reshape(2, 3), items[None]):
        with pytest.raises(ValueError):
            kernel.sort_items(bad)
        with pytest.raises(ValueError):
            kernel.sum_items(bad, None, 0)
        with pytest.raises(ValueError):
            kernel.find_items(bad, items)
        with pytest.raises(ValueError):
            kernel.find_items(items, bad)
    for bad in (weights[0], weights[:2], weights[:, 0]):
        with pytest.raises(ValueError):
            kernel.sort_items(items, bad)
        with pytest.raises(ValueError):
            kernel.sum_items(items, bad, 0)
    for shift in (-1, 128):
        with pytest.raises(ValueError):
            kernel.sum_items(items, None, shift)


WINDOWS: dict[str, Any] = {
    "token_ids": np.array([1, 2]), "token_map": np.array([0, 1, 3], dtype=np.int32), "vocab_size": 3, "pad_id": 0,
    "barrier_id": -1, "order_max": 2, "bits": 2, "out": poisoned(2, 2),
}  # fmt: skip
KEYS: dict[str, Any] = {
    "windows": items_of([3, 15]), "order": 2, "bits": 2, "multipliers": np.array([3, 5]),
    "out": np.empty(2, dtype=np.int64),
}  # fmt: skip


@every
@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": np.array([[1, 2]])}, {"token_map": np.zeros(4, dtype=np.int32)}, {"vocab_size": 0},
        {"vocab_size": 2}, {"pad_id": 4}, {"pad_id": -1}, {"order_max": 0}, {"order_max": 65}, {"bits": 0},
        {"bits": 64}, {"order_max": 3, "bits": 43}, {"order_max": 2**40}, {"out": poisoned(2, 3)},
        {"out": poisoned(3, 2)}, {"out": poisoned(2)},
    ],
    ids=str,
)  # fmt: skip
def test_windows_of_shapes_that_do_not_fit_are_refused(name: str, change: dict[str, Any]) -> None:
    assert IMPLEMENTATIONS[name].windows_of_tokens(**WINDOWS) == -1
    with pytest.raises(ValueError):
        IMPLEMENTATIONS[name].windows_of_tokens(**WINDOWS | change)


@every
@pytest.mark.parametrize(
    "change",
    [
        {"windows": items_of([3, 16])}, {"windows": items_of([1 << 64, 0])}, {"windows": items_of([2**128 - 1, 0])},
        {"windows": np.zeros(2, dtype=np.uint64)}, {"order": 0}, {"order": 65}, {"order": 3}, {"bits": 0}, {"bits": 64},
        {"multipliers": np.array([3])}, {"multipliers": np.array([[3, 5]])}, {"out": np.empty(3, dtype=np.int64)},
        {"out": np.empty((2, 1), dtype=np.int64)},
    ],
    ids=lambda change: str(list(change)),
)  # fmt: skip
def test_keys_of_windows_that_do_not_fit_are_refused(name: str, change: dict[str, Any]) -> None:
    IMPLEMENTATIONS[name].keys_of_windows(**KEYS)
    assert KEYS["out"].tolist() == [0 * 3 ^ 3 * 0 ^ 3 * 5, 3 * 3 ^ 3 * 5]
    with pytest.raises(ValueError):
        IMPLEMENTATIONS[name].keys_of_windows(**KEYS | change)


def test_arrays_that_would_have_to_be_copies_and_types_that_lose_numbers_are_refused() -> None:
    items = items_of([5, 3, 4])
    for bad in (
        np.repeat(items, 2, axis=0)[::2],
        items.astype(np.int64),
        items.astype(">u8"),
        np.asfortranarray(items),
    ):
        with pytest.raises(ValueError, match="items must be contiguous"):
            kernels.sort_items(bad)
    with pytest.raises(ValueError, match="weights must be contiguous"):
        kernels.sort_items(items, np.ones((3, 1)))
    with pytest.raises(TypeError):
        kernels.sum_items(items.astype(np.int64), None)
    with pytest.raises(TypeError):
        kernels.find_items(items.astype(np.float64), items)
    assert values_of(items) == [5, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_compiled_items_equal_the_references_at_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = rng.integers(0, 2**64, (30_000, 2), dtype=np.uint64) >> np.array([60 - 20 * seed, 50], dtype=np.uint64)
    weights = rng.integers(0, 100, (30_000, 2))
    sorted_by = {}
    for name, kernel in IMPLEMENTATIONS.items():
        own, with_them = items.copy(), weights.copy()
        kernel.sort_items(own, with_them)
        sorted_by[name] = own, with_them, *kernel.sum_items(own, with_them, 9), kernel.find_items(
            kernel.sum_items(own, None, 0)[0], own
        )  # fmt: skip
    for found in sorted_by.values():
        for array, expected in zip(found, sorted_by["reference"], strict=True):
            np.testing.assert_array_equal(array, expected)
