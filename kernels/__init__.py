"""What must be fast, behind one face: compiled (kernels/cpu, C++) where it was built, else the NumPy reference.

Imports nothing of tierstore's. `native` says which one serves. All functions release the interpreter lock when native,
may be called from any thread, and check the bounds of what they are given (`ValueError`).
"""

from __future__ import annotations

import errno
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import reference, reference_codec, reference_counts, reference_placed
from .reference import ORDER_MAX, PAGE_BAD_CHECKSUM, PAGE_GOOD, PAGE_OTHER_NUMBER, PAGE_OTHER_VERSION, TRAILER
from .reference_counts import REPORT
from .reference_placed import BUCKET_SLOTS, INDEX_BUCKET, INDEX_HEAD, RECORD_TRAILER

__all__ = [
    "BUCKET_SLOTS",
    "CLIENT_BLOCK_BYTES",
    "CONTROL_BYTES",
    "INDEX_BUCKET",
    "INDEX_HEAD",
    "MAILBOX_STARTS",
    "MAILBOX_STATUSES",
    "NUM_RING_REPORTS",
    "ORDER_MAX",
    "PAGE_BAD_CHECKSUM",
    "PAGE_GOOD",
    "PAGE_OTHER_NUMBER",
    "PAGE_OTHER_VERSION",
    "RECORD_TRAILER",
    "REPORT",
    "SOURCES",
    "TRAILER",
    "Engine",
    "EntryCache",
    "EpochPin",
    "KeyCounts",
    "MailboxServer",
    "ReportReader",
    "ReportWriter",
    "active_lookups",
    "active_pins",
    "check_pages",
    "collapse",
    "crc32c",
    "crc32c_backend",
    "decode_fp8_rows",
    "drop_bad_entries",
    "drop_released",
    "find_entries",
    "find_items",
    "find_out_of_range",
    "index_entries",
    "init_client_block",
    "invalidate_bad_records",
    "keys_of_row_ids",
    "keys_of_tokens",
    "keys_of_windows",
    "mailbox_bytes",
    "mailbox_entries_start",
    "mailbox_pairs_start",
    "map_shared",
    "native",
    "probe_process_madvise",
    "probe_uring",
    "protect",
    "publish_epoch",
    "reclaim_epochs_before",
    "reclaim_version",
    "row_ids_of_keys",
    "seal_pages",
    "seal_records",
    "simulate_cache",
    "sort_items",
    "stack_distances",
    "sum_items",
    "windows_of_tokens",
]

_serving: Any = reference
try:
    _serving = importlib.import_module("._cpu", __name__)
except ImportError as error:
    warnings.warn(
        f"tierstore runs without its compiled kernels ({error}): checks and builds are ten times slower or more; "
        f"install gcc or clang, then in the clone: pip install --force-reinstall .",
        RuntimeWarning,
        stacklevel=2,
    )

native: bool = _serving is not reference
_placed: Any = _serving if native else reference_placed
_codec: Any = _serving if native else reference_codec

# What answers a key, by the number that `Engine.locate` gives: Source of kernels/cpu/table.h; and, above it,
# a device's memory.
SOURCES = ("none", "resident", "static", "recency", "record", "pages", "hbm")


def probe_uring() -> int:
    """Returns 0 where this process may use io_uring as the native reader does, else the errno that says why not."""
    return _serving.probe_uring() if native else errno.ENOSYS


def probe_process_madvise() -> int:
    """Returns 0 where this process may call process_madvise on itself, else the errno that says why not."""
    return _serving.probe_process_madvise() if native else errno.ENOSYS


# Memory shared by processes, and the epochs in it (kernels/cpu/shared_module.cpp); None where nothing was compiled.
map_shared: Any = _serving.map_shared if native else None
collapse: Any = _serving.collapse if native else None
protect: Any = _serving.protect if native else None
EpochPin: Any = _serving.EpochPin if native else None
publish_epoch: Any = _serving.publish_epoch if native else None
reclaim_epochs_before: Any = _serving.reclaim_epochs_before if native else None
reclaim_version: Any = _serving.reclaim_version if native else None
active_lookups: Any = _serving.active_lookups if native else None
active_pins: Any = _serving.active_pins if native else None
CONTROL_BYTES: int = _serving.CONTROL_BYTES if native else 4096

# The lookup path of a store (kernels/cpu/engine.h), None where it was not compiled; `tierstore.tiers.native` is its
#   user. `Engine.submit` and `submit_pairs` return a Ticket if something was missing. Its job held the output arrays
#   before its first read began, and lets go of them when nothing is written any more, in whatever thread that is.
#   wait(seconds): False if the time ran out, else the outcome; handles signals. cancel(): nothing is written to the
#   outputs once it has returned. A ticket that is dropped cancels, unless detach() came before.
#   drop_released(): drops the arrays that jobs have let go; all calls of a ticket do it too.
Engine: Any = _serving.Engine if native else None
EntryCache: Any = _serving.EntryCache if native else None
drop_released: Any = _serving.drop_released if native else None

# Mailboxes of an engine, by which GPU kernels ask for what they missed (kernels/cpu/mailbox.h draws the block), None
# where nothing was compiled. One thread polls all mailboxes of a server; there is none before the first and after the
# last. Its requests count as lookups of single pairs do, each as a batch.
#   MailboxServer(engine): of a native `Engine`, which it keeps alive.
# add(index, block, pairs_max) -> id: clears the words of a block, uint8 [mailbox_bytes(pairs_max, entry_bytes) at
# least] at a multiple of 64 bytes, that nobody may use yet, and serves it from now on: whoever asks writes num_misses,
# keys, pairs, and last a number into `requested` other than before (not 0 at first); then waits until `answered` is
# that number, and looks at `status`, a place in MAILBOX_STATUSES. What is asked for may be nonsense. The block is kept
# alive. `ValueError`: the block is
#   too small or not aligned, no such table, or its rows are not there; `RuntimeError`: engine or server is closed.
# move_to(engine, seconds) -> bool: serves what was asked for, then by another engine of the same tables; a request is
# served by
#   one of the two. Waits for that; False where the time ran out.
# remove(id, seconds) -> bool: serves it no more; waits for a request under way. False where the time ran out: the block
# may
#   still be written, and is kept; ask again.
#   fault(id): of status "fault", a tuple for `NativeEngine.check`, else None. The first is kept until it is taken.
#   served(id) -> int: requests answered. Both raise `ValueError` where there is no such mailbox.
#   close(seconds) -> bool: removes all, for ever. It comes before the engine's own `close`; mailboxes of a closed
#   engine get the status "closed". Waits at most 300 s when the object goes.
#   before_fork(), after_fork(child): the child's server is closed, and touches no block.
# MAILBOX_STARTS: the byte at which each word, and the keys, begin; pairs and entries: mailbox_pairs_start(pairs_max),
# mailbox_entries_start(pairs_max).
MailboxServer: Any = _serving.MailboxServer if native else None
mailbox_bytes: Any = _serving.mailbox_bytes if native else None
mailbox_pairs_start: Any = _serving.mailbox_pairs_start if native else None
mailbox_entries_start: Any = _serving.mailbox_entries_start if native else None
MAILBOX_STARTS: dict[str, int] = _serving.MAILBOX_STARTS if native else {}
MAILBOX_STATUSES = ("there", "fault", "damaged", "closed")

# The ring by which attached clients report (kernels/cpu/reports.h draws it), None where it was not compiled: NumPy has
# no atomics. A block is uint8 [CLIENT_BLOCK_BYTES] at a multiple of 64 bytes, `ValueError` where it is not, that no
# process can truncate; any contents do, and cost the daemon bounded work.
#   ReportWriter(block).add(reports): writes REPORT [n], or drops what there is no room for; any threads; never waits.
#   ReportReader(block).take(out) -> int: copies the next reports into out, REPORT [n]; one reader a block, never waits.
#   A report that is reserved and not yet written gets the time between two calls. `lost`: positions that held none, as
#   far as the reader saw; `dropped`: reports that found no room, as far as the client says.
CLIENT_BLOCK_BYTES = 4096 + 16 * 8192
NUM_RING_REPORTS = 8192
ReportWriter: Any = _serving.ReportWriter if native else None
ReportReader: Any = _serving.ReportReader if native else None

# Counts of reported keys in memory, uint8 [64 * sets] at a multiple of 64 bytes, that is emptied
# (kernels/cpu/key_counts.h: four keys a set, none counted more often than it was reported). Any threads.
#   add(reports) -> int: counts REPORT [n] by their weights, 2 ** (source_and_weight >> 3); returns how many had a key.
#   counts(table, order_index, keys) -> uint32 [n]; order_index: one for all, or uint8 [n]; keys: int64 [n].
#   above(table, minimum, first_set=0, end_set=all) -> order_index uint8 [m], keys int64 [m], counts uint32 [m], in no
#   order: all in these sets that were counted at least `minimum` times. A few sets at a time take little memory.
#   age(): halves all counts. num_used, num_sets: keys that have a count; four times as many as sets could have one.
KeyCounts: Any = _serving.KeyCounts if native else reference_counts.KeyCounts


def init_client_block(block: np.ndarray) -> None:
    """Makes a block, uint8 [CLIENT_BLOCK_BYTES] at a multiple of 64 bytes, one without reports.
    Nobody may use it meanwhile."""
    _serving.init_client_block(block)


def crc32c_backend() -> str:
    """Returns what computes CRC32C here: "sse4.2", "armv8-crc", "table" (compiled), or "numpy"."""
    return _serving.crc32c_backend() if native else "numpy"


def crc32c(data: Any, seed: int = 0) -> int:
    """Returns the CRC32C (RFC 3720) of a contiguous buffer; `seed` continues: crc32c(b, crc32c(a)) == crc32c(a + b)."""
    return _serving.crc32c(data, seed)


def seal_pages(
    planes: Sequence[np.ndarray], out: np.ndarray, rows_per_page: int, page_start: int, version: int, seed: int
) -> None:
    """Interleaves planes into rows and rows into sealed pages. Costs one copy and one checksum of `out`.

    planes: uint8 [rows, width_bytes] each, side by side in a row; out: uint8 [ceil(rows / rows_per_page), page_bytes],
    overwritten whole: rows, zero padding, trailer. Pages are numbered from `page_start` on.
    """
    _serving.seal_pages(
        [np.ascontiguousarray(plane) for plane in planes], out, rows_per_page, page_start, version, seed
    )


def check_pages(pages: np.ndarray, page_numbers: np.ndarray, version: int, seed: int) -> np.ndarray:
    """Checks that pages, uint8 [n, page_bytes] contiguous, are whole and bear page_numbers, int64 [n].

    Returns uint8 [n]: PAGE_GOOD, PAGE_BAD_CHECKSUM, PAGE_OTHER_VERSION or PAGE_OTHER_NUMBER. A wrong checksum is
    reported before the other two, whose numbers cannot be trusted then.
    """
    return _serving.check_pages(pages, page_numbers, version, seed)


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
    """Writes the mixed hashes of the n-grams that end at each token; one pass, about 4 ns a token of V4.1.

    token_ids: int64 [B, T]; history: int64 [B, P], the tokens before, -1 where there is none, P below the largest
    order; dead: bool [B, T], positions that are no text; token_map: int32 [vocab_size], None where ids hash as they
    are; multipliers: int64 [largest order], the token itself first; orders: int64 [O], n-gram lengths, ascending, 1 to
    ORDER_MAX; pad_id: the (mapped) id that stands where look-back has ended; barrier_id: the token id that ends
    look-back behind it, -1 for none; out: int64 [B, T, O], overwritten whole.

    Returns -1, or, with `out` not whole, the place in [B, P + T], flat, of the first id outside the vocabulary. Ids of
    dead positions are not looked at. `ValueError` for shapes that do not fit.
    See `HashSpec.keys` for where look-back ends.
    """
    return _serving.keys_of_tokens(
        token_ids, history, dead, token_map, vocab_size, multipliers, orders, pad_id, barrier_id, out
    )


def find_out_of_range(ids: np.ndarray, end: int) -> int:
    """Returns the place, flat, of the first of ids, int64, that is neither -1 nor 0 to end - 1; -1 if there is none.

    end: at most 2^63. One pass, about 0.3 ns an id.
    """
    return _serving.find_out_of_range(ids, end)


def row_ids_of_keys(
    keys: np.ndarray, order_index: np.ndarray | None, moduli: np.ndarray, offsets: np.ndarray, out: np.ndarray
) -> None:
    """Writes the rows of each key, `key % modulus + offset` for each head of its order; about 1 ns a row.

    keys: int64 [M]; a key below 0 gives row ids of -1; order_index: int64 [M], or None where keys are of whole tokens,
    and so of orders 0, 1, ..., O - 1, 0, 1, ...; moduli, offsets: int64 [O * H], orders outermost; out: int64 [M, H],
    overwritten whole. `ValueError` for shapes that do not fit, order indices that there are not, moduli below 1,
    row ids past 2^63 - 1.
    """
    _serving.row_ids_of_keys(keys, order_index, moduli, offsets, out)


def keys_of_row_ids(
    row_ids: np.ndarray,
    moduli: np.ndarray,
    offsets: np.ndarray,
    num_residues: np.ndarray,
    inverses: np.ndarray,
    keys: np.ndarray,
    is_consistent: np.ndarray,
) -> None:
    """Writes the keys that give the row ids of each token, and whether there are such keys; about 3 ns a row.

    row_ids: int64 [N, O * H]; moduli, offsets: int64 [O * H]; num_residues: int64 [O], how many first heads of each
    order fix the key (Chinese remainder theorem); inverses: int64 [O, F], of the product of the moduli before, modulo
    this one, the first of each order not looked at; keys: int64 [N, O] and is_consistent: bool [N], overwritten whole.
    A token is consistent if every head of every order agrees with its keys, 0 to 2^63 - 1, or -1 for an order whose ids
    are all
    -1; otherwise its keys are
    -1. `ValueError` for shapes that do not fit, and moduli with which the arithmetic would leave 63 bits.
    """
    _serving.keys_of_row_ids(row_ids, moduli, offsets, num_residues, inverses, keys, is_consistent)


def index_entries(keys: np.ndarray, places: np.ndarray, buckets: np.ndarray) -> bool:
    """Writes the index of placed entries of one order: keys, int64 [n], all different, places, uint32 [n].

    buckets: uint8 [num_buckets, 64], overwritten whole (FORMAT.md draws a bucket); there must be room for every key,
    with speed in mind at least a bucket for 3.5 of them. Returns False, with `buckets` undefined, where there is not.
    """
    return _placed.index_entries(keys, places, buckets)


def find_entries(buckets: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns the places, int64 [n], that an index has for keys, int64 [n]; -1 where it has none."""
    return _placed.find_entries(buckets, keys)


def seal_records(records: np.ndarray, keys: np.ndarray, order_index: np.ndarray, entry_bytes: int, seed: int) -> None:
    """Writes padding, keys and checksums of records, uint8 [n, record_bytes], that hold their entries.

    keys: int64 [n]; order_index: uint32 [n]; record_bytes is entry_bytes up to a multiple of 8, and 16.
    """
    _placed.seal_records(records, keys, order_index, entry_bytes, seed)


def invalidate_bad_records(records: np.ndarray, entry_bytes: int, seed: int) -> int:
    """Checks records, uint8 [n, record_bytes], and gives those that are not whole the key -1; returns how many."""
    return _placed.invalidate_bad_records(records, entry_bytes, seed)


def drop_bad_entries(
    buckets: np.ndarray, order_index: int, records: np.ndarray, num_placed: int, entry_bytes: int, loaded_start: int = 0
) -> int:
    """Takes out of an index the keys whose loaded record is another's, or whose place is none; returns how many.

    records: uint8 [loaded, record_bytes], those of places loaded_start on; num_placed: records in the file. Places
    below loaded_start are good, and not looked at.
    """
    return _placed.drop_bad_entries(buckets, order_index, records, num_placed, entry_bytes, loaded_start)


def decode_fp8_rows(rows: np.ndarray, dim: int, scale: float | None, out: np.ndarray) -> None:
    """Decodes e4m3 values, `dim` a row, into bfloat16: fp8 * scale in float32, rounded once, half to even;
    0.5 ns a value.

    rows: uint8 [N, R]; scale: of all values; None: 2^(byte - 127) of the e8m0 bytes that follow a row's values, one for
    32 of them, and `dim` a multiple of 32; out: uint16 [N, dim], the values' bits, overwritten whole. `ValueError` for
    shapes that do not fit.
    """
    _codec.decode_fp8_rows(rows, dim, scale, out)


def simulate_cache(order_index: np.ndarray, keys: np.ndarray, batch_ends: np.ndarray, num_sets: int) -> np.ndarray:
    """Returns which lookups the recency cache of one table would have answered, had it had `num_sets` sets,
    empty at first.

    order_index: uint8 [A], below 16; keys: int64 [A], -1 where nothing is looked up, which is no hit; batch_ends: int64
    [B], ascending, the last being A: the batches, as they were looked up one after the other. Returns bool [A]. It is
    what a store's cache does (kernels/cpu/entry_cache.h): all of a batch are probed, then its distinct misses are put
    in, in the order of (order, key). Compiled it runs that very code, without entries: 256 bytes a set, about 60 ns an
    access. `ValueError` for shapes and numbers that do not fit, `MemoryError` where a cache does not.
    """
    return _serving.simulate_cache(order_index, keys, batch_ends, num_sets)


def stack_distances(items: np.ndarray) -> np.ndarray:
    """Returns how many distinct other items came since the last access to the same one,
    -1 for the first (Mattson 1970).

    items: int64 [A], dense: below A. Returns int64 [A]. A cache of c entries that keeps what was used last hits an
    access if and only if its distance is 0 to c - 1. O(A log A) (Bennett and Kruskal 1975), about 50 ns an access at
    ten million. `ValueError` for items that are not dense.
    """
    return _serving.stack_distances(items)


def windows_of_tokens(
    token_ids: np.ndarray,
    token_map: np.ndarray | None,
    vocab_size: int,
    pad_id: int,
    barrier_id: int,
    order_max: int,
    bits: int,
    out: np.ndarray,
) -> int:
    """Writes the n-gram of `order_max` ids that ends at each token of one document, as a 128-bit item;
    about 4 ns a token.

    token_ids: int64 [T]; token_map, vocab_size, pad_id, barrier_id: as for `keys_of_tokens`, look-back ending likewise;
    out: uint64 [T, 2], overwritten whole: the high word, then the low word of sum(id[i] << bits * (order_max - 1 - i)),
    the newest id being id[0]. The n-gram of a lower order n is this, shifted right by bits * (order_max - n).

    Returns -1, or, with `out` not whole, the place of the first id outside the vocabulary. `ValueError` for shapes that
    do not fit, order_max * bits above 128, and ids or a pad id that do not fit `bits`.
    """
    return _serving.windows_of_tokens(token_ids, token_map, vocab_size, pad_id, barrier_id, order_max, bits, out)


def keys_of_windows(windows: np.ndarray, order: int, bits: int, multipliers: np.ndarray, out: np.ndarray) -> None:
    """Writes the mixed hash of each n-gram: what `keys_of_tokens` gives where its last token stands; about 6 ns each.

    windows: uint64 [M, 2], shifted to `order` ids of `bits` bits; multipliers: int64, at least [order], the newest id's
    first; out: int64 [M], overwritten whole. `ValueError` for shapes that do not fit and windows of more bits.
    """
    _serving.keys_of_windows(windows, order, bits, multipliers, out)


def sort_items(items: np.ndarray, weights: np.ndarray | None = None) -> None:
    """Sorts items, uint64 [N, 2], in place, ascending, the high word first; equal items keep their order.

    weights: int64 [N, W], whose rows move with their items, in place. A radix sort: about 45 ns an item of text, with
    weights 105; takes another 16 bytes an item meanwhile, with weights 48 and 8 a weight.
    """
    if weights is None:
        _serving.sort_items(items)
    else:
        _serving.sort_items(items, weights)


def sum_items(items: np.ndarray, weights: np.ndarray | None, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct values of items >> shift, uint64 [M, 2], and the sums of their weights, int64 [M, W].

    items: uint64 [N, 2], sorted; weights: int64 [N, W], or None where each item counts once, in one column; shift: 0 to
    127 bits, so that windows give n-grams of a lower order. Sums wrap around.
    `ValueError` for items that are not sorted.
    """
    return _serving.sum_items(items, weights, shift)


def find_items(haystack: np.ndarray, needles: np.ndarray) -> np.ndarray:
    """Returns the place of each needle in the haystack, int64 [M], or -1; one pass over both, about 5 ns an item.

    haystack: uint64 [N, 2], strictly ascending; needles: uint64 [M, 2], ascending. `ValueError` where they are not.
    """
    return _serving.find_items(haystack, needles)
