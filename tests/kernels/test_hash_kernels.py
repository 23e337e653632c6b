"""Keys and row ids of the compiled kernels and of the NumPy reference, against plain Python integers,
and each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tierstore import kernels
from tierstore.kernels import reference

IMPLEMENTATIONS: dict[str, Any] = {"reference": reference, "compiled": kernels}

KEY_MAX = 2**63 - 1
POISON = -0x5A5A5A5A5A5A5A5B
ORDERS = [(1,), (2,), (2, 3), (2, 3, 4), (1, 4), (3, 5, 6), tuple(range(2, 17))]
PRIMES = [16000057, 16000073, 16000079, 16000087, 16000117, 16000141, 16000151, 16000169]


def poisoned(*shape: int) -> np.ndarray:
    return np.full(shape, POISON, dtype=np.int64)


def int64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("end", [0, 1, 1000, KEY_MAX, 1 << 63])
@pytest.mark.parametrize("size", [0, 1, 1024, 20_000])
def test_the_first_id_outside_is_found_wherever_it_is(name: str, end: int, size: int) -> None:
    ids = np.random.default_rng(size).integers(-1, max(0, min(end, KEY_MAX)), size)
    find_out_of_range = IMPLEMENTATIONS[name].find_out_of_range
    assert find_out_of_range(ids, end) == -1
    bad = [-2, -KEY_MAX - 1, *([end, KEY_MAX] if end <= KEY_MAX else [])]
    for place in {0, size // 2, size - 1} & set(range(size)):
        for value in bad:
            damaged = ids.copy()
            damaged[place:] = value
            assert find_out_of_range(damaged, end) == place


class Batch:
    """Random arguments of `keys_of_tokens`, and what must come of them, token by token in Python integers."""

    def __init__(
        self, seed: int, shape: tuple[int, int], orders: tuple[int, ...], past: int, with_map: bool, with_barrier: bool
    ) -> None:
        rng = np.random.default_rng([seed, *shape, *orders, past, with_map, with_barrier])
        self.vocab_size, self.orders, self.pad_id = 50, orders, 7
        self.token_map = rng.integers(0, 30, self.vocab_size, dtype=np.int32) if with_map else None
        self.barrier_id = 9 if with_barrier else -1
        self.multipliers = rng.integers(1, KEY_MAX // 50, orders[-1])
        self.token_ids = rng.integers(0, self.vocab_size, shape)
        self.token_ids[rng.random(shape) < 0.2] = 9
        self.history = rng.integers(-1, self.vocab_size, (shape[0], past)) if past else None
        self.dead = rng.random(shape) < 0.2 if rng.random() < 0.7 else None

    def run(self, name: str, out: np.ndarray) -> int:
        return IMPLEMENTATIONS[name].keys_of_tokens(
            self.token_ids, self.history, self.dead, self.token_map, self.vocab_size, self.multipliers,
            int64(*self.orders), self.pad_id, self.barrier_id, out,
        )  # fmt: skip

    def expected(self) -> list[list[list[int]]]:
        num_sequences, num_tokens = self.token_ids.shape
        keys = []
        for row in range(num_sequences):
            past = [] if self.history is None else self.history[row].tolist()
            live = self.token_ids[row].tolist()
            if self.dead is not None:
                live = [-1 if gone else token for token, gone in zip(live, self.dead[row].tolist(), strict=True)]
            line = past + live
            keys.append([self._keys_at(line, len(past) + i) for i in range(num_tokens)])
        return keys

    def _keys_at(self, line: list[int], place: int) -> list[int]:
        of_order = []
        for order in self.orders:
            key, ended = 0, False
            for back in range(order):
                token = line[place - back] if place >= back else -1
                ended = ended or token == -1 or (back > 0 and token == self.barrier_id)
                mapped = token if self.token_map is None or ended else int(self.token_map[token])
                key ^= (self.pad_id if ended else mapped) * int(self.multipliers[back])
            of_order.append(key)
        return of_order


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("orders", ORDERS, ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1), (1, 2), (2, 3), (3, 17), (1, 200)], ids=str)
def test_keys_equal_plain_integers(name: str, orders: tuple[int, ...], shape: tuple[int, int]) -> None:
    for past in sorted({0, 1, 2, orders[-1] - 1}):
        for with_map in (False, True):
            for with_barrier in (False, True):
                if past < orders[-1]:
                    batch = Batch(len(orders), shape, orders, past, with_map, with_barrier)
                    out = poisoned(*shape, len(orders))
                    assert batch.run(name, out) == -1
                    assert out.tolist() == batch.expected()


@pytest.mark.parametrize("seed", range(20))
def test_compiled_keys_equal_the_references_over_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    orders = ORDERS[seed % len(ORDERS)]
    shape = int(rng.integers(1, 9)), int(rng.integers(1, 700))
    batch = Batch(seed, shape, orders, int(rng.integers(0, orders[-1])), seed % 2 == 0, seed % 3 == 0)
    found = {name: poisoned(*shape, len(orders)) for name in IMPLEMENTATIONS}
    for name, out in found.items():
        assert batch.run(name, out) == -1
        np.testing.assert_array_equal(out, found["reference"])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [50, -2, -(2**63), KEY_MAX])
@pytest.mark.parametrize("with_map", [False, True])
def test_the_first_id_outside_the_vocabulary_is_found_at_every_place(name: str, bad: int, with_map: bool) -> None:
    batch = Batch(1, (3, 4), (2, 3), 2, with_map, True)
    batch.dead = None
    joined = np.concatenate([batch.history, batch.token_ids], axis=1)
    for place in range(joined.size):
        damaged = joined.copy()
        damaged.reshape(-1)[[place, -1]] = bad
        batch.history, batch.token_ids = damaged[:, :2].copy(), damaged[:, 2:].copy()
        assert batch.run(name, poisoned(3, 4, 2)) == place


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_token_is_legal_in_the_history_and_outside_the_vocabulary_among_the_tokens(name: str) -> None:
    batch = Batch(2, (2, 3), (2, 3, 4), 3, True, False)
    batch.dead = None
    assert batch.history is not None
    batch.history[:] = -1
    assert batch.run(name, poisoned(2, 3, 3)) == -1
    batch.token_ids[1, 0] = -1
    assert batch.run(name, poisoned(2, 3, 3)) == 6 + 3


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_ids_of_dead_positions_are_not_looked_at(name: str) -> None:
    batch = Batch(3, (2, 9), (2, 3), 1, True, True)
    batch.dead = np.random.default_rng(3).random((2, 9)) < 0.5
    expected = batch.expected()
    for garbage in (-1, 9, 50, -(2**63), KEY_MAX):
        batch.token_ids[batch.dead] = garbage
        out = poisoned(2, 9, 2)
        assert batch.run(name, out) == -1
        assert out.tolist() == expected


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_products_up_to_the_largest_key_are_exact(name: str) -> None:
    out = poisoned(1, 2, 1)
    arguments = (None, None, None, KEY_MAX, int64(1, 0), int64(2), 0, -1)
    assert IMPLEMENTATIONS[name].keys_of_tokens(int64(KEY_MAX - 1, 0)[None], *arguments, out) == -1
    assert out.tolist() == [[[KEY_MAX - 1], [0]]]


def edge_moduli() -> list[int]:
    """Moduli of every width: powers of two, their neighbours, and a random one between."""
    rng = np.random.default_rng(0)
    near = {2**bits + step for bits in range(64) for step in (-1, 0, 1)}
    drawn = {int(rng.integers(2**bits, 2 ** (bits + 1) - 1, endpoint=True)) for bits in range(62)}
    return sorted(modulus for modulus in near | drawn | set(PRIMES) if 1 <= modulus <= KEY_MAX)


def edge_keys(modulus: int, rng: np.random.Generator) -> list[int]:
    """Keys about multiples of a modulus, where a reciprocal off by one shows, the edges of all keys, and no keys."""
    last = KEY_MAX // modulus
    multiples = [0, 1, 2, last // 2, last - 1, last, *rng.integers(0, last, 8, endpoint=True).tolist()]
    keys = {multiple * modulus + step for multiple in multiples for step in (-1, 0, 1)}
    keys |= {0, 1, 2**62, KEY_MAX - 1, KEY_MAX, *rng.integers(0, KEY_MAX, 8, endpoint=True).tolist()}
    return [*sorted(key for key in keys if 0 <= key <= KEY_MAX), -1, -2, -(2**63)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_row_ids_are_exact_for_moduli_and_keys_of_every_size(name: str) -> None:
    rng = np.random.default_rng(1)
    for modulus in edge_moduli():
        keys = edge_keys(modulus, rng)
        for offset in {0, min(5, KEY_MAX - modulus), KEY_MAX - modulus}:
            out = poisoned(len(keys), 1)
            IMPLEMENTATIONS[name].row_ids_of_keys(int64(*keys), None, int64(modulus), int64(offset), out)
            assert out[:, 0].tolist() == [-1 if key < 0 else key % modulus + offset for key in keys], modulus


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
@pytest.mark.parametrize(("num_orders", "rows_per_key"), [(1, 1), (1, 8), (2, 3), (3, 8)])
def test_row_ids_of_whole_tokens_and_of_pairs_agree(
    name: str, num_tokens: int, num_orders: int, rows_per_key: int
) -> None:
    rng = np.random.default_rng([num_tokens, num_orders, rows_per_key])
    moduli = rng.integers(1, 2**40, num_orders * rows_per_key)
    offsets = rng.integers(0, 2**40, num_orders * rows_per_key)
    keys = rng.integers(-1, KEY_MAX, num_tokens * num_orders)
    order_index = np.tile(np.arange(num_orders), num_tokens)
    out, shuffled_out = poisoned(len(keys), rows_per_key), poisoned(len(keys), rows_per_key)
    IMPLEMENTATIONS[name].row_ids_of_keys(keys, None, moduli, offsets, out)
    shuffle = rng.permutation(len(keys))
    IMPLEMENTATIONS[name].row_ids_of_keys(keys[shuffle], order_index[shuffle], moduli, offsets, shuffled_out)
    assert out.tolist() == [
        [
            -1 if key < 0 else key % int(moduli[place]) + int(offsets[place])
            for place in range(start, start + rows_per_key)
        ]
        for key, start in zip(keys.tolist(), (order_index * rows_per_key).tolist(), strict=True)
    ]
    np.testing.assert_array_equal(shuffled_out, out[shuffle])


class Rows:
    """Row ids of tokens, of orders whose keys 3 (large moduli) or 13 (small ones) heads fix."""

    def __init__(self, moduli: list[int], num_orders: int) -> None:
        self.moduli = int64(*moduli * num_orders)
        self.offsets = np.concatenate([[0], np.cumsum(self.moduli)[:-1]])
        inverses, product = [], 1
        for modulus in moduli:
            if product <= KEY_MAX:
                inverses.append(pow(product, -1, modulus))
            product *= modulus
        self.num_residues = np.full(num_orders, len(inverses))
        self.inverses = np.tile(int64(*inverses), (num_orders, 1))

    def of(self, keys: np.ndarray) -> np.ndarray:
        out = np.empty((keys.size, len(self.moduli) // len(self.num_residues)), dtype=np.int64)
        reference.row_ids_of_keys(keys.reshape(-1), None, self.moduli, self.offsets, out)
        return out.reshape(len(keys), len(self.moduli))

    def keys(self, name: str, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys, is_consistent = poisoned(len(row_ids), len(self.num_residues)), np.ones(len(row_ids), dtype=bool)
        IMPLEMENTATIONS[name].keys_of_row_ids(
            row_ids, self.moduli, self.offsets, self.num_residues, self.inverses, keys, is_consistent
        )
        return keys, is_consistent


SMALL_PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59]
NEAR_2_31 = [2**31 - 1, 2**31 - 19, 2**31 - 61, 2**31 - 69]
ROWS = {"large": Rows(PRIMES, 3), "small": Rows(SMALL_PRIMES, 2), "largest": Rows(NEAR_2_31, 1)}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 1000])
def test_row_ids_of_whole_tokens_give_the_keys_back(name: str, rows: str, num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    num_orders = len(ROWS[rows].num_residues)
    keys = rng.integers(0, KEY_MAX, (num_tokens, num_orders), endpoint=True)
    edges = int64(0, 1, KEY_MAX, KEY_MAX - 1, 2**62, -1)
    places = rng.random(keys.shape) < 0.3
    keys[places] = rng.choice(edges, int(places.sum()))
    found, is_consistent = ROWS[rows].keys(name, ROWS[rows].of(keys))
    np.testing.assert_array_equal(found, keys)
    assert is_consistent.all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", ROWS)
def test_row_ids_that_no_key_gives_are_of_no_token_and_leave_no_key(name: str, rows: str) -> None:
    rng = np.random.default_rng(4)
    keys = rng.integers(0, KEY_MAX, (400, len(ROWS[rows].num_residues)))
    ids = ROWS[rows].of(keys)
    for wrong in (-1, -2, -(2**63), KEY_MAX, 0, int(ROWS[rows].moduli.sum())):
        for head in range(ids.shape[1]):
            damaged = ids.copy()
            damaged[::3, head] = wrong
            changed = (damaged != ids).any(axis=1)
            found, is_consistent = ROWS[rows].keys(name, damaged)
            np.testing.assert_array_equal(is_consistent, ~changed)
            np.testing.assert_array_equal(found, np.where(changed[:, None], -1, keys))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_residues_of_a_number_past_the_largest_key_are_of_no_token(name: str) -> None:
    for number in (2**63, 2**63 + 1, 2**64, 2**64 + 5, PRIMES[0] * PRIMES[1] * PRIMES[2] - 1):
        ids = int64(*[number % modulus for modulus in PRIMES])[None]
        rows = Rows(PRIMES, 1)
        found, is_consistent = rows.keys(name, ids + rows.offsets)
        assert (found.tolist(), is_consistent.tolist()) == ([[-1]], [False]), number


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", ROWS)
def test_compiled_keys_of_random_row_ids_equal_the_references(rows: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = ROWS[rows].of(rng.integers(-1, 3, (500, len(ROWS[rows].num_residues))))
    places = rng.random(ids.shape) < 0.02
    ids[places] = rng.integers(-2, int(ROWS[rows].moduli.sum()) + 2, int(places.sum()))
    expected = ROWS[rows].keys("reference", ids)
    assert 0 < expected[1].sum() < 500
    for name in IMPLEMENTATIONS:
        for found, wanted in zip(ROWS[rows].keys(name, ids), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def misaligned(values: np.ndarray) -> np.ndarray:
    place = np.zeros(values.nbytes + 1, dtype=np.uint8)[1:].view(values.dtype).reshape(values.shape)
    place[...] = values
    assert not place.flags.aligned
    return place


def strided(values: np.ndarray) -> np.ndarray:
    wide = np.zeros((*values.shape[:-1], values.shape[-1] * 2), dtype=values.dtype)
    wide[..., ::2] = values
    return wide[..., ::2]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("lay", [misaligned, strided, lambda a: a.astype(">i8"), lambda a: a.astype(np.int32)])
def test_arguments_in_other_layouts_give_the_same(name: str, lay: Any) -> None:
    batch = Batch(5, (2, 6), (2, 3), 2, True, False)
    expected = batch.expected()
    batch.token_ids = lay(batch.token_ids)
    assert batch.history is not None
    batch.history = lay(batch.history)
    out = poisoned(2, 6, 2)
    assert batch.run(name, out) == -1
    assert out.tolist() == expected


BAD_TOKENS: list[dict[str, Any]] = [
    {"token_ids": np.zeros(3, dtype=np.int64)},
    {"history": np.zeros((2, 3), dtype=np.int64)},
    {"history": np.zeros((1, 1), dtype=np.int64)},
    {"history": np.zeros(2, dtype=np.int64)},
    {"dead": np.zeros((2, 2), dtype=bool)},
    {"dead": np.zeros((2, 3, 1), dtype=bool)},
    {"token_map": np.zeros(49, dtype=np.int32)},
    {"token_map": np.zeros((50, 1), dtype=np.int32)},
    {"vocab_size": 0, "token_map": np.zeros(0, dtype=np.int32)},
    {"multipliers": int64(1, 2)},
    {"multipliers": int64(1, 2, 3, 4)},
    {"orders": int64()},
    {"orders": int64(3, 2)},
    {"orders": int64(2, 2)},
    {"orders": int64(0, 3)},
    {"orders": int64(-1, 3)},
    {"orders": int64(2, 17), "multipliers": np.ones(17, dtype=np.int64)},
    {"out": poisoned(2, 3, 1)},
    {"out": poisoned(2, 2, 2)},
    {"out": poisoned(2, 6)},
]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("change", BAD_TOKENS, ids=[str(i) for i in range(len(BAD_TOKENS))])
def test_tokens_of_shapes_that_do_not_fit_are_refused(name: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "token_ids": np.zeros((2, 3), dtype=np.int64), "history": np.zeros((2, 2), dtype=np.int64),
        "dead": np.zeros((2, 3), dtype=bool), "token_map": np.zeros(50, dtype=np.int32), "vocab_size": 50,
        "multipliers": int64(1, 2, 3), "orders": int64(2, 3), "pad_id": 0, "barrier_id": -1, "out": poisoned(2, 3, 2),
    }  # fmt: skip
    assert IMPLEMENTATIONS[name].keys_of_tokens(**good) == -1
    with pytest.raises(ValueError):
        IMPLEMENTATIONS[name].keys_of_tokens(**good | change)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_address_maps_that_do_not_fit_are_refused(name: str) -> None:
    good: dict[str, Any] = {
        "keys": int64(1, 2), "order_index": int64(1, 0), "moduli": int64(3, 5, 7, 11), "offsets": int64(0, 3, 8, 15),
        "out": poisoned(2, 2),
    }  # fmt: skip
    IMPLEMENTATIONS[name].row_ids_of_keys(**good)
    for change in (
        {"keys": int64(1, 2, 3)}, {"keys": int64(1, 2)[None]}, {"order_index": int64(1)}, {"order_index": int64(0, 2)},
        {"order_index": int64(-1, 0)}, {"moduli": int64(3, 5, 7)}, {"moduli": int64()}, {"moduli": int64(3, 0, 7, 11)},
        {"moduli": int64(3, -5, 7, 11)}, {"offsets": int64(0, 3)}, {"offsets": int64(0, -1, 8, 15)},
        {"offsets": int64(0, KEY_MAX - 4, 8, 15)}, {"out": poisoned(3, 2)}, {"out": poisoned(2, 0)},
        {"out": poisoned(2, 3)}, {"out": poisoned(2)},
        {"keys": int64(1), "out": poisoned(1, 2), "order_index": None},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            IMPLEMENTATIONS[name].row_ids_of_keys(**good | change)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_heads_that_cannot_fix_a_key_are_refused(name: str) -> None:
    rows = ROWS["large"]
    good: dict[str, Any] = {
        "row_ids": rows.of(np.zeros((2, 3), dtype=np.int64)), "moduli": rows.moduli, "offsets": rows.offsets,
        "num_residues": rows.num_residues, "inverses": rows.inverses, "keys": poisoned(2, 3),
        "is_consistent": np.zeros(2, dtype=bool),
    }  # fmt: skip
    IMPLEMENTATIONS[name].keys_of_row_ids(**good)
    wide = rows.moduli.copy()
    wide[2] = 2**31
    for change in (
        {"row_ids": good["row_ids"][:, :-1]}, {"row_ids": good["row_ids"][0]}, {"moduli": wide},
        {"num_residues": int64(3, 3)}, {"num_residues": int64(3, 0, 3)}, {"num_residues": int64(3, 3, 4)},
        {"num_residues": int64(8, 8, 8), "inverses": np.zeros((3, 8), dtype=np.int64)},  # seven multiply past 2^63
        {"num_residues": int64(9, 9, 9), "inverses": np.zeros((3, 9), dtype=np.int64)},
        {"inverses": rows.inverses[:2]}, {"inverses": rows.inverses[0]}, {"inverses": -rows.inverses},
        {"inverses": np.where(np.arange(3) == 1, rows.moduli[1], rows.inverses)},
        {"keys": poisoned(3, 3)}, {"keys": poisoned(2, 2)}, {"is_consistent": np.zeros(3, dtype=bool)},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            IMPLEMENTATIONS[name].keys_of_row_ids(**good | change)


@pytest.mark.parametrize("changed", [misaligned, strided, lambda a: a.astype(np.int32), lambda a: a.astype(">i8")])
def test_an_output_that_would_have_to_be_a_copy_is_refused(changed: Any) -> None:
    out = changed(np.zeros((2, 6, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="out must be"):
        Batch(6, (2, 6), (2, 3), 2, True, False).run("compiled", out)
    with pytest.raises(ValueError, match="out must be"):
        IMPLEMENTATIONS["compiled"].row_ids_of_keys(np.arange(12), None, int64(3, 5), int64(0, 3), out.reshape(12, 2))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_read_only_output_is_refused(name: str) -> None:
    out = np.zeros((2, 6, 2), dtype=np.int64)
    out.setflags(write=False)
    with pytest.raises(ValueError):
        Batch(6, (2, 6), (2, 3), 2, True, False).run(name, out)


def test_numbers_that_would_lose_their_value_are_refused() -> None:
    for lossy in (np.float64, np.uint64):
        batch = Batch(7, (2, 6), (2, 3), 0, True, False)
        batch.token_ids = batch.token_ids.astype(lossy)
        with pytest.raises(TypeError):
            batch.run("compiled", poisoned(2, 6, 2))


class SumBatch:
    """Random arguments of `polynomial_keys_of_tokens`, and what must come of them, in Python integers."""

    def __init__(self, seed: int, shape: tuple[int, int], order_max: int, heads: int, past: int) -> None:
        rng = np.random.default_rng([seed, *shape, order_max, heads, past])
        self.vocab_size, self.barrier_id = 50, 9 if seed % 2 else -1
        self.moduli = rng.integers(1, 2**40, heads)
        self.weights = rng.integers(0, KEY_MAX // 50 // order_max, (heads, order_max))
        self.weights[0, order_max // 2 :] = 0
        self.token_ids = rng.integers(0, self.vocab_size, shape)
        self.token_ids[rng.random(shape) < 0.2] = 9
        self.history = rng.integers(-1, self.vocab_size, (shape[0], past)) if past else None
        self.dead = rng.random(shape) < 0.2 if seed % 3 else None

    def run(self, name: str, out: np.ndarray) -> int:
        return IMPLEMENTATIONS[name].polynomial_keys_of_tokens(
            self.token_ids, self.history, self.dead, self.vocab_size, self.weights, self.moduli, self.barrier_id, out
        )

    def expected(self, row: int, column: int) -> list[int]:
        past = [] if self.history is None else self.history[row].tolist()
        line = past + [
            -1 if self.dead is not None and gone else token
            for token, gone in zip(
                self.token_ids[row].tolist(),
                [False] * self.token_ids.shape[1] if self.dead is None else self.dead[row].tolist(),
                strict=True,
            )
        ]
        place, ids = len(past) + column, []
        for back in range(self.weights.shape[1]):
            if place < back or line[place - back] == -1 or (back and line[place - back] == self.barrier_id):
                break
            ids.append(line[place - back])
        return [
            sum(token * weight for token, weight in zip(ids, weights, strict=False)) % modulus
            for weights, modulus in zip(self.weights.tolist(), self.moduli.tolist(), strict=True)
        ]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", [((1, 1), 1, 1, 0), ((3, 20), 4, 12, 3), ((2, 7), 16, 5, 9), ((2, 0), 3, 2, 1)])
def test_sums_equal_plain_python(name: str, seed: int, sizes: tuple[tuple[int, int], int, int, int]) -> None:
    batch = SumBatch(seed, *sizes)
    rows, columns = batch.token_ids.shape
    out = poisoned(rows, columns, len(batch.moduli))
    assert batch.run(name, out) == -1
    assert out.tolist() == [[batch.expected(row, column) for column in range(columns)] for row in range(rows)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_id_outside_the_vocabulary_is_found_before_it_is_summed(name: str) -> None:
    batch = SumBatch(2, (3, 20), 4, 12, 3)
    out = poisoned(3, 20, 12)
    for place, (row, column) in [(46 + 3, (2, 0)), (46 + 3 + 11, (2, 11))]:
        batch.dead = None
        batch.token_ids[row, column] = 50
        assert batch.run(name, out) == place
        batch.token_ids[row, column] = -1
        assert batch.run(name, out) == place
        batch.dead = np.zeros((3, 20), dtype=bool)
        batch.dead[row, column] = True
        assert batch.run(name, out) == -1
        batch.token_ids[row, column] = 0
    assert batch.history is not None
    batch.history[1, 2] = 50
    assert batch.run(name, out) == 23 + 2


SUMS: dict[str, Any] = {
    "token_ids": np.zeros((2, 3), dtype=np.int64), "history": None, "dead": None, "vocab_size": 50,
    "weights": np.ones((2, 3), dtype=np.int64), "moduli": int64(5, 7), "barrier_id": -1,
    "out": np.zeros((2, 3, 2), dtype=np.int64),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 0},
        {"weights": np.ones((3, 3), dtype=np.int64)},
        {"weights": np.ones((2, 17), dtype=np.int64)},
        {"weights": np.ones((2, 0), dtype=np.int64)},
        {"weights": -np.ones((2, 3), dtype=np.int64)},
        {"weights": np.full((2, 3), KEY_MAX // 150 + 1)},
        {"weights": np.full((2, 3), KEY_MAX)},
        {"moduli": int64(5, 0)},
        {"moduli": int64()},
        {"history": np.zeros((2, 3), dtype=np.int64)},
        {"history": np.zeros((3, 1), dtype=np.int64)},
        {"dead": np.zeros((2, 2), dtype=bool)},
        {"out": np.zeros((2, 3, 3), dtype=np.int64)},
    ],
)
def test_sums_that_do_not_fit_are_refused(name: str, change: dict[str, Any]) -> None:
    assert IMPLEMENTATIONS[name].polynomial_keys_of_tokens(**SUMS) == -1
    with pytest.raises(ValueError, match=r"must|size"):
        IMPLEMENTATIONS[name].polynomial_keys_of_tokens(**SUMS | change)
