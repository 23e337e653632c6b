"""Every kernel in NumPy: the oracle that the compiled ones are tested against.

Same functions, arguments and results as `kernels.__init__` documents. Slow by design of being plain:
about 90 MB/s checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .records import TRAILER
from .reference_cache import simulate_cache as simulate_cache
from .reference_cache import stack_distances as stack_distances
from .reference_items import find_items as find_items
from .reference_items import keys_of_windows as keys_of_windows
from .reference_items import sort_items as sort_items
from .reference_items import sum_items as sum_items
from .reference_items import windows_of_tokens as windows_of_tokens
from .reference_polynomial import polynomial_keys_of_tokens as polynomial_keys_of_tokens

PAGE_GOOD, PAGE_OTHER_VERSION, PAGE_OTHER_NUMBER, PAGE_BAD_CHECKSUM = range(4)

BLOCK_BYTES = 4096  # what a table in place has a checksum of
ORDER_MAX = 16  # the longest n-gram

_KEY_MAX = 2**63 - 1
_POLYNOMIAL = 0x82F63B78  # CRC32C, Castagnoli, reflected: RFC 3720, appendix B.4


def _byte_table() -> np.ndarray:
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


_TABLE = _byte_table()


def _crc32c_of_columns(columns: np.ndarray, seed: int) -> np.ndarray:
    """CRC32C of n messages at once: columns is uint8 [message_bytes, n], one byte of every message a row."""
    state = np.full(columns.shape[1], ~np.uint32(seed), dtype=np.uint32)
    for column in columns:
        state = (state >> np.uint32(8)) ^ _TABLE[(state ^ column) & np.uint32(0xFF)]
    return ~state


def crc32c(data: Any, seed: int = 0) -> int:
    message = np.frombuffer(memoryview(data).cast("B"), dtype=np.uint8)
    return int(_crc32c_of_columns(message[:, None], seed)[0])


def _checksums(pages: np.ndarray, seed: int) -> np.ndarray:
    return _crc32c_of_columns(np.ascontiguousarray(pages[:, :-4].T), seed)


def _require_bytes(arrays: Sequence[np.ndarray], what: str) -> None:
    """The compiled kernels take uint8 only; another type would be cut or cast to bytes that nobody meant."""
    for array in arrays:
        if array.dtype != np.uint8:
            raise TypeError(f"{what} are {array.dtype}, must be uint8")


def seal_pages(
    planes: Sequence[np.ndarray], out: np.ndarray, rows_per_page: int, page_start: int, version: int, seed: int
) -> None:
    _require_bytes([*planes, out], "planes and out")
    if not planes or any(plane.ndim != 2 for plane in planes) or out.ndim != 2:
        raise ValueError("there must be planes, [rows, width] each, and out must be [pages, page_bytes]")
    num_rows = len(planes[0])
    row_bytes = sum(plane.shape[1] for plane in planes)
    num_pages, page_bytes = out.shape
    if any(len(plane) != num_rows for plane in planes) or page_start < 0 or rows_per_page < 1:
        raise ValueError("planes must be [rows, width], of equally many rows")
    if row_bytes * rows_per_page + TRAILER.itemsize > page_bytes or num_pages != -(-num_rows // rows_per_page):
        raise ValueError("rows_per_page rows and the trailer must fit in a page, and out must have a page for the rows")
    rows = np.zeros((num_pages * rows_per_page, row_bytes), dtype=np.uint8)
    rows[:num_rows] = np.concatenate(planes, axis=1)
    out[:] = 0
    out[:, : rows_per_page * row_bytes] = rows.reshape(num_pages, rows_per_page * row_bytes)
    trailer = out[:, -TRAILER.itemsize :].view(TRAILER)[:, 0]
    trailer["page_number"] = np.arange(page_start, page_start + num_pages)
    trailer["version"] = version
    trailer["checksum"] = _checksums(out, seed)


def check_pages(pages: np.ndarray, page_numbers: np.ndarray, version: int, seed: int) -> np.ndarray:
    _require_bytes([pages], "pages")
    if page_numbers.dtype.kind not in "iu":
        raise TypeError(f"page_numbers are {page_numbers.dtype}, must be int64")
    if pages.ndim != 2 or pages.shape[1] <= TRAILER.itemsize or page_numbers.shape != pages.shape[:1]:
        raise ValueError(
            f"pages of shape {pages.shape} and page_numbers of shape {page_numbers.shape}: pages must be [n, "
            f"page_bytes] with room for a trailer, and page_numbers [n]"
        )
    trailer = np.ascontiguousarray(pages[:, -TRAILER.itemsize :]).view(TRAILER)[:, 0]
    status = np.full(len(pages), PAGE_GOOD, dtype=np.uint8)
    status[trailer["page_number"] != page_numbers.astype(np.uint64)] = PAGE_OTHER_NUMBER
    status[trailer["version"] != version] = PAGE_OTHER_VERSION
    status[trailer["checksum"] != _checksums(pages, seed)] = PAGE_BAD_CHECKSUM
    return status


def block_checksums(data: np.ndarray, block_start: int, seed: int) -> np.ndarray:
    _require_bytes([data], "data")
    blocks = range(0, len(data), BLOCK_BYTES)
    numbers = range(block_start, block_start + len(blocks))
    seeds = [crc32c(number.to_bytes(8, "little"), seed) for number in numbers]
    sums = [crc32c(data[at : at + BLOCK_BYTES], own) for at, own in zip(blocks, seeds, strict=True)]
    return np.array(sums, dtype=np.uint32)


def keys_of_tokens(
    token_ids: np.ndarray,
    history: np.ndarray | None,
    dead: np.ndarray | None,
    token_map: np.ndarray | None,
    vocab_size: int,
    multipliers: np.ndarray,
    orders: np.ndarray,
    pad_id: int,
    barrier_id: int,
    out: np.ndarray,
) -> int:
    past = np.empty((len(token_ids), 0), dtype=np.int64) if history is None else history
    no_text = np.zeros(token_ids.shape, dtype=bool) if dead is None else dead
    if orders.ndim != 1 or not orders.size or (np.diff(orders, prepend=0) < 1).any():
        raise ValueError("orders must ascend from 1 on, at least one of them")
    if orders[-1] > ORDER_MAX or multipliers.shape != (orders[-1],):
        raise ValueError(f"orders must be 1 to {ORDER_MAX}, with a multiplier a position")
    if token_ids.ndim != 2 or past.ndim != 2 or len(past) != len(token_ids) or past.shape[1] >= orders[-1]:
        raise ValueError("token_ids must be [sequences, tokens], history [sequences, fewer than the largest order]")
    if no_text.shape != token_ids.shape or out.shape != (*token_ids.shape, len(orders)):
        raise ValueError("dead must be [sequences, tokens], out [sequences, tokens, orders]")
    if vocab_size < 1 or (token_map is not None and token_map.shape != (vocab_size,)):
        raise ValueError("vocab_size must be positive, token_map [vocab_size]")
    ids = np.concatenate([past, token_ids], axis=1)
    ended = np.concatenate([past == -1, no_text], axis=1)
    outside = ~ended & ((ids < 0) | (ids >= vocab_size))
    if outside.any():
        return int(np.flatnonzero(outside)[0])
    behind = ended | (ids == barrier_id)
    ids = np.where(ended, 0, ids)
    mapped = ids if token_map is None else token_map[ids].astype(np.int64)
    num_tokens = token_ids.shape[1]
    stop = _shifted(ended, 0, num_tokens, fill=True)  # look-back has ended at or before the predecessor at hand
    mixed = np.zeros(token_ids.shape, dtype=np.int64)
    for back in range(orders[-1]):
        if back > 0:
            stop |= _shifted(behind, back, num_tokens, fill=True)
        mixed ^= np.where(stop, pad_id, _shifted(mapped, back, num_tokens, fill=0)) * multipliers[back]
        out[:, :, orders == back + 1] = mixed[:, :, None]
    return -1


def _shifted(values: np.ndarray, back: int, num_tokens: int, fill: int) -> np.ndarray:
    """Returns, for each of the last num_tokens columns, the value `back` columns before; `fill` before the first."""
    first = values.shape[1] - num_tokens - back
    missing = min(max(0, -first), num_tokens)
    head = np.full((len(values), missing), fill, dtype=values.dtype)
    return np.concatenate([head, values[:, max(first, 0) : max(first, 0) + num_tokens - missing]], axis=1)


def find_out_of_range(ids: np.ndarray, end: int) -> int:
    flat = ids.reshape(-1)
    outside = flat < -1
    if end <= _KEY_MAX:
        outside |= flat >= end
    places = np.flatnonzero(outside)
    return int(places[0]) if len(places) else -1


def row_ids_of_keys(
    keys: np.ndarray, order_index: np.ndarray | None, moduli: np.ndarray, offsets: np.ndarray, out: np.ndarray
) -> None:
    if keys.ndim != 1 or out.ndim != 2 or len(out) != len(keys) or not out.shape[1] or len(moduli) % out.shape[1]:
        raise ValueError("keys must be [keys], out [keys, rows per key]")
    num_orders = len(moduli) // out.shape[1]
    moduli, offsets = _address_map(moduli, offsets, num_orders)
    if order_index is None:
        if len(keys) % num_orders:
            raise ValueError(f"{len(keys)} keys are not of whole tokens of {num_orders} orders")
        out[:] = (keys.reshape(-1, num_orders, 1) % moduli + offsets).reshape(out.shape)
    else:
        if order_index.shape != keys.shape or ((order_index < 0) | (order_index >= num_orders)).any():
            raise ValueError("order_index must be [keys], 0 to orders - 1")
        out[:] = keys[:, None] % moduli[order_index] + offsets[order_index]
    out[keys < 0] = -1


def _address_map(moduli: np.ndarray, offsets: np.ndarray, num_orders: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns moduli and offsets as [O, H]."""
    rows_per_key = moduli.size // max(num_orders, 1)
    if not rows_per_key or moduli.shape != (num_orders * rows_per_key,) or offsets.shape != moduli.shape:
        raise ValueError("moduli and offsets must be [orders * rows per key]")
    if (moduli < 1).any() or (offsets < 0).any() or (offsets > _KEY_MAX - moduli).any():
        raise ValueError("moduli must be positive, offsets not below 0, and their sums below 2^63")
    return moduli.reshape(num_orders, rows_per_key), offsets.reshape(num_orders, rows_per_key)


def keys_of_row_ids(
    row_ids: np.ndarray,
    moduli: np.ndarray,
    offsets: np.ndarray,
    num_residues: np.ndarray,
    inverses: np.ndarray,
    keys: np.ndarray,
    is_consistent: np.ndarray,
) -> None:
    num_orders = len(num_residues)
    rows_per_key = _address_map(moduli, offsets, num_orders)[0].shape[1]
    if num_residues.ndim != 1 or inverses.ndim != 2 or len(inverses) != num_orders:
        raise ValueError("num_residues must be [orders], inverses [orders, heads]")
    if (num_residues < 1).any() or (num_residues > min(rows_per_key, inverses.shape[1])).any():
        raise ValueError("num_residues must be 1 to the heads that there are")
    if row_ids.ndim != 2 or row_ids.shape[1] != len(moduli):
        raise ValueError("row_ids must be [tokens, heads]")
    if keys.shape != (len(row_ids), num_orders) or is_consistent.shape != (len(row_ids),):
        raise ValueError("keys must be [tokens, orders], is_consistent [tokens]")
    for order in range(num_orders):
        heads = slice(order * rows_per_key, order * rows_per_key + int(num_residues[order]))
        residues = row_ids[:, heads] - offsets[heads]
        keys[:, order] = _key_of_residues(residues, moduli[heads].tolist(), inverses[order].tolist())
        keys[(row_ids[:, order * rows_per_key : (order + 1) * rows_per_key] == -1).all(axis=1), order] = -1
    given = np.empty((keys.size, rows_per_key), dtype=np.int64)
    row_ids_of_keys(keys.reshape(-1), None, moduli, offsets, given)
    is_consistent[:] = (given.reshape(row_ids.shape) == row_ids).all(axis=1)
    keys[~is_consistent] = -1


def _key_of_residues(residues: np.ndarray, moduli: list[int], inverses: list[int]) -> np.ndarray:
    """The Chinese remainder theorem, one head after the other; a key past 2^63 - 1 comes out as -2.

    Worked example: moduli 3, 5 and residues 2, 1: the key is 2 as far as the first head goes; (1 - 2) * 3^-1 mod 5 =
    -1 * 2 mod 5 = 3 more times 3 make it right for the second too: 2 + 3 * 3 = 11. Residues outside their modulus give
    some key that the caller's check of every head refuses.
    """
    key, product = residues[:, 0] % moduli[0], 1
    fits = np.ones(len(key), dtype=bool)
    for head in range(1, len(moduli)):
        product *= moduli[head - 1]
        modulus, inverse = moduli[head], inverses[head]
        if modulus >= 2**31 or not 0 <= inverse < modulus or product > _KEY_MAX:
            raise ValueError(
                "moduli that fix a key must be below 2^31, inverses below them, all products but the last below 2^63"
            )
        digit = (residues[:, head] % modulus - key % modulus) % modulus * inverse % modulus
        fits &= digit <= (_KEY_MAX - key) // product
        key = key + np.where(fits, digit, 0) * product
    return np.where(fits, key, -2)
