"""The compiled kernels (kernels/cpu). Use them as `tierstore.kernels`, which has every name of this module.

Rules for all: arrays are C-contiguous and of the type that is named. An input that is not contiguous, or of another
type that casts safely, is copied; an output never is. Functions check shapes and bounds before they write, and raise
`ValueError` or `TypeError`. They release the interpreter lock if they work for long, and any thread may call them;
classes say if not. Shapes: B sequences, T tokens a sequence, N tokens, O orders, H heads (rows a key), M keys, R rows.
"""

from collections.abc import Callable, Sequence
from typing import Final, TypedDict, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

_Bytes = npt.NDArray[np.uint8]
_Int64 = npt.NDArray[np.int64]
_UInt64 = npt.NDArray[np.uint64]
_UInt32 = npt.NDArray[np.uint32]
_UInt16 = npt.NDArray[np.uint16]
_Int32 = npt.NDArray[np.int32]
_Bool = npt.NDArray[np.bool_]
_Reports = npt.NDArray[np.void]  # of type kernels.REPORT
_FileHandle = tuple[int, int, int]  # descriptor, O_DIRECT descriptor or -1, bytes
_IndexArea = tuple[_Bytes, _Bytes]  # head [128], buckets [n, 64]

# --------------------------------------------------------------------------------------------------------------------
# Numbers and names that C++ defines.

ORDER_MAX: Final[int]
"""The longest n-gram."""
ORDERS_MAX: Final[int]
"""The most orders of a table."""
SOURCES: Final[tuple[str, ...]]
"""What answers a key, by the numbers of `Engine.locate` and of reports: none, resident, static, recency, record, pages,
hbm. No C++ code gives "hbm"."""

PAGE_GOOD: Final[int]
PAGE_OTHER_VERSION: Final[int]
PAGE_OTHER_NUMBER: Final[int]
PAGE_BAD_CHECKSUM: Final[int]
PAGE_TRAILER_BYTES: Final[int]

CACHE_WAYS: Final[int]
"""Entries of a set of the recency cache."""
CACHE_SET_BYTES: Final[int]
"""The head of a set: its keys, int64 [CACHE_WAYS], -1 if empty, then orders, counts and a version."""
CACHE_HISTORY_BYTES: Final[int]
"""A set's memory of keys that left it."""
BUCKET_SLOTS: Final[int]
"""Keys of an index bucket."""

CONTROL_BYTES: Final[int]
"""The block in which a daemon publishes epochs."""
CLIENT_BLOCK_BYTES: Final[int]
"""The block in which a client counts its lookups and reports."""
NUM_RING_REPORTS: Final[int]
"""Reports that a client's block holds."""

LATENCY_BOUNDS_NS: Final[tuple[int, ...]]
"""Upper ends of the buckets of latency; one more bucket counts what took longer."""
LATENCY_FRACTION: Final[float]
"""The fraction of lookups that are timed, chosen by chance."""

MAILBOX_STARTS: Final[dict[str, int]]
"""The byte of a mailbox's block at which each word, int64, and the keys begin (mailbox.h draws it)."""
MAILBOX_STATUSES: Final[tuple[str, ...]]
"""What the word `status` means: there, fault, damaged, closed."""

# --------------------------------------------------------------------------------------------------------------------
# Pages and checksums.

def crc32c_backend() -> str:
    """Returns what computes CRC32C here: "sse4.2", "armv8-crc" or "table"."""

def crc32c(data: Buffer | npt.NDArray[np.generic], seed: int = 0) -> int:
    """Returns the CRC32C (RFC 3720) of a contiguous buffer; crc32c(b, crc32c(a)) == crc32c(a + b)."""

def seal_pages(
    planes: Sequence[_Bytes], out: _Bytes, rows_per_page: int, page_start: int, version: int, seed: int
) -> None:
    """Interleaves planes into rows, and rows into sealed pages. Costs one copy and one checksum of `out`.

    Args:
        planes: uint8 [R, width_bytes] each, side by side in a row.
        out: uint8 [ceil(R / rows_per_page), page_bytes], overwritten whole: rows, zero padding, trailer.
        rows_per_page: Rows of a page; with the trailer they fit in it.
        page_start: The number of the first page.
        version: The format's.
        seed: Of the checksums.
    """

def check_pages(pages: _Bytes, page_numbers: _Int64, version: int, seed: int) -> _Bytes:
    """Checks that pages are whole and have their numbers.

    Args:
        pages: uint8 [n, page_bytes].
        page_numbers: int64 [n].
        version: The format's.
        seed: Of the checksums.

    Returns:
        uint8 [n]: PAGE_GOOD, PAGE_BAD_CHECKSUM, PAGE_OTHER_VERSION or PAGE_OTHER_NUMBER. A bad checksum comes before
        the other two, whose numbers nobody can trust then.
    """

BLOCK_BYTES: Final[int]
"""Bytes of a block: what a table in place has a checksum of."""

def block_checksums(data: _Bytes, block_start: int, seed: int) -> _UInt32:
    """Returns the checksums of neighbouring blocks: CRC32C, seeded with the table's seed and the block's number.

    Args:
        data: uint8 [n]; its last block may be short.
        block_start: The number of the first block.
        seed: The table's.

    Returns:
        uint32 [ceil(n / BLOCK_BYTES)].
    """

# --------------------------------------------------------------------------------------------------------------------
# The mixed hash.

def keys_of_tokens(
    token_ids: _Int64,
    history: _Int64 | None,
    dead: _Bool | None,
    token_map: _Int32 | None,
    vocab_size: int,
    multipliers: _Int64,
    orders: _Int64,
    pad_id: int,
    barrier_id: int,
    out: _Int64,
) -> int:
    """Writes the mixed hashes of the n-grams that end at each token. One pass, about 4 ns a token of V4.1.

    `HashSpec.keys` says where look-back ends.

    Args:
        token_ids: int64 [B, T].
        history: int64 [B, P], the tokens before, -1 for none; P is below the largest order.
        dead: bool [B, T], positions that are no text. Their ids are not looked at.
        token_map: int32 [vocab_size]; None: ids hash as they are.
        vocab_size: Ids are below it.
        multipliers: int64 [largest order], the token itself first.
        orders: int64 [O], n-gram lengths, ascending, 1 to ORDER_MAX.
        pad_id: The (mapped) id for positions behind the end of look-back.
        barrier_id: The token id that ends look-back behind it; -1: none.
        out: int64 [B, T, O], overwritten whole.

    Returns:
        -1; or the flat position in [B, P + T] of the first id outside the vocabulary, and `out` is undefined.
    """

def polynomial_keys_of_tokens(
    token_ids: _Int64,
    history: _Int64 | None,
    dead: _Bool | None,
    vocab_size: int,
    weights: _Int64,
    moduli: _Int64,
    barrier_id: int,
    out: _Int64,
) -> int:
    """Writes, for each head, the remainder of a weighted sum of the ids that end at each token. About 1 ns a head.

    For hashes whose heads share no key: the remainder is the head's key. Look-back ends as for `keys_of_tokens`, with a
    pad id of 0, which adds nothing.

    Args:
        token_ids: int64 [B, T].
        history: int64 [B, P], the tokens before, -1 for none; P is below the largest order.
        dead: bool [B, T], positions that are no text. Their ids are not looked at.
        vocab_size: Ids are below it.
        weights: int64 [H, largest order], 0 or more, the token itself first, 0 beyond a head's order. `vocab_size`
            times the sum of a head's weights is below 2^63.
        moduli: int64 [H], 1 or more.
        barrier_id: The token id that ends look-back behind it; -1: none.
        out: int64 [B, T, H], overwritten whole.

    Returns:
        As `keys_of_tokens`.
    """

def find_out_of_range(ids: _Int64, end: int) -> int:
    """Returns the flat position of the first id that is neither -1 nor 0 to end - 1; -1: all are valid.

    One pass, about 0.3 ns an id; end: at most 2^63.
    """

def row_ids_of_keys(keys: _Int64, order_index: _Int64 | None, moduli: _Int64, offsets: _Int64, out: _Int64) -> None:
    """Writes the rows of each key, `key % modulus + offset` for each head of its order. About 1 ns a row.

    Args:
        keys: int64 [M]; a key below 0 gives row ids of -1.
        order_index: int64 [M]; None: keys are of whole tokens, and so of orders 0, 1, ..., O - 1, 0, 1, ...
        moduli: int64 [O * H], orders outermost, 1 or more.
        offsets: int64 [O * H]; modulus + offset is below 2^63.
        out: int64 [M, H], overwritten whole.
    """

def keys_of_row_ids(
    row_ids: _Int64,
    moduli: _Int64,
    offsets: _Int64,
    num_residues: _Int64,
    inverses: _Int64,
    keys: _Int64,
    is_consistent: _Bool,
) -> None:
    """Writes the keys that give the row ids of each token (Chinese remainder theorem). About 3 ns a row.

    Args:
        row_ids: int64 [N, O * H].
        moduli: int64 [O * H].
        offsets: int64 [O * H].
        num_residues: int64 [O], how many first heads of each order determine the key.
        inverses: int64 [O, F], of the product of the moduli before, modulo this one; the first of each order is unused.
        keys: int64 [N, O], overwritten whole. All -1 if the token is not consistent.
        is_consistent: bool [N], overwritten whole: whether every head of every order agrees with keys of 0 to
            2^63 - 1, or -1 for an order whose ids are all -1.
    """

# --------------------------------------------------------------------------------------------------------------------
# Rows of fp8.

def decode_fp8_rows(rows: _Bytes, dim: int, scale: float | None, out: npt.NDArray[np.uint16], threads: int = 1) -> None:
    """Decodes e4m3 values into bfloat16: fp8 * scale in float32, rounded once, half to even. About 0.3 ns a value.

    Args:
        rows: uint8 [R, row_bytes], row_bytes at least `dim`.
        dim: Values a row.
        scale: Of all values; None: 2^(byte - 127) of the e8m0 bytes that follow a row's values, one for 32 of them;
            `dim` is a multiple of 32 then.
        out: uint16 [R, dim], the values' bits, overwritten whole.
        threads: That share 2^18 values or more, the caller's included; 64 at most. They are the process's own, and
            decode for one caller at a time; another one decodes alone.
    """

# --------------------------------------------------------------------------------------------------------------------
# Rows of quantized values with scales of their own. FORMAT.md says what each type is.

def decode_block_rows(
    rows: _Bytes,
    dim: int,
    values: str,
    scale: str,
    block: int,
    factor: float,
    divides: bool,
    out: npt.NDArray[np.uint16],
    threads: int = 1,
    plain: bool = False,
) -> None:
    """Decodes into bfloat16: value * scale in float32, rounded once, half to even. 0.1 to 0.3 ns a value with AVX2.

    Args:
        rows: uint8 [R, row_bytes], row_bytes at least what `dim` values and their scales take.
        dim: Values a row, whole blocks of them.
        values: "fp8_e4m3", "fp4_e2m1", "int8", "uint8b128", "uint4b8", "nf4"; or "gguf_q8_0", "gguf_q4_0",
            "gguf_q4_k", "gguf_iq4_nl", whose blocks hold scales.
        scale: "e8m0", "e4m3", "bf16", "fp16" or "fp32", of the scales that follow a row's values; "" of gguf.
        block: Values that share a scale; of gguf the values of a block.
        factor: Of all scales, as float32, not used of gguf.
        divides: Scales are divided by `factor`, and not multiplied.
        out: uint16 [R, dim], the values' bits, overwritten whole.
        threads: At most so many share the rows if they are 2^18 values or more, the caller's included.
        plain: Without instructions that not every processor has: for tests.
    """

# --------------------------------------------------------------------------------------------------------------------
# Placed entries (entry_index.h). FORMAT.md draws buckets and records.

def index_entries(keys: _Int64, record_numbers: _UInt32, buckets: _Bytes) -> bool:
    """Writes the index of one order's placed entries.

    Args:
        keys: int64 [n], all different, 0 or more.
        record_numbers: uint32 [n].
        buckets: uint8 [num_buckets, 64], overwritten whole. For speed, at least one for 3.5 keys.

    Returns:
        Whether there was room for every key; if not, `buckets` is undefined.
    """

def find_entries(buckets: _Bytes, keys: _Int64) -> _Int64:
    """Returns the record numbers, int64 [n], that an index has for keys, int64 [n]; -1 for none."""

def seal_records(records: _Bytes, keys: _Int64, order_index: _UInt32, entry_bytes: int, seed: int) -> None:
    """Writes padding, keys and checksums of records, uint8 [n, record_bytes], that hold their entries.

    Args:
        records: record_bytes is entry_bytes up to a multiple of 8, and 16.
        keys: int64 [n].
        order_index: uint32 [n].
        entry_bytes: Of an entry.
        seed: Of the checksums.
    """

def invalidate_bad_records(records: _Bytes, entry_bytes: int, seed: int) -> int:
    """Checks records, uint8 [n, record_bytes], and gives damaged ones the key -1. Returns how many."""

def drop_bad_entries(
    buckets: _Bytes, order_index: int, records: _Bytes, num_placed: int, entry_bytes: int, loaded_start: int = 0
) -> int:
    """Takes keys out of an index whose loaded record is another's, or whose record number is too large.

    Args:
        buckets: uint8 [num_buckets, 64].
        order_index: The order that the index is of.
        records: uint8 [loaded, record_bytes], those from number loaded_start on.
        num_placed: Records of the file.
        entry_bytes: Of an entry.
        loaded_start: Records before it are good, and are not looked at.

    Returns:
        How many keys it took out.
    """

# --------------------------------------------------------------------------------------------------------------------
# Profiles and predictions. Items are 128-bit numbers, rows of uint64 [N, 2], the high word first (items.h).

def simulate_cache(order_index: _Bytes, keys: _Int64, batch_ends: _Int64, num_sets: int) -> _Bool:
    """Simulates the recency cache of one table, empty at first, by the code that serves (entry_cache.h).

    All of a batch are probed, then its distinct misses are put in, by (order, key). 256 bytes a set, about 60 ns an
    access.

    Args:
        order_index: uint8 [A], below ORDERS_MAX.
        keys: int64 [A]; -1: nothing is looked up, which is not a hit.
        batch_ends: int64 [batches], ascending, the last being A.
        num_sets: Of the cache.

    Returns:
        bool [A], which accesses hit.

    Raises:
        MemoryError: There is no memory for such a cache.
    """

def stack_distances(items: _Int64) -> _Int64:
    """Returns how many distinct other items came since the last access to the same one; -1 for the first.

    A cache of c entries that evicts the least recently used one hits an access if its distance is 0 to c - 1 (Mattson
    1970). O(A log A) (Bennett and Kruskal 1975), about 50 ns an access at ten million.

    Args:
        items: int64 [A], each below A.
    """

def windows_of_tokens(
    token_ids: _Int64,
    token_map: _Int32 | None,
    vocab_size: int,
    pad_id: int,
    barrier_id: int,
    order_max: int,
    bits: int,
    out: _UInt64,
) -> int:
    """Packs the last `order_max` ids that end at each token of one document into an item. About 5 ns a token.

    The newest id is in the most significant place. The n-gram of a lower order n is the item shifted right by
    bits * (order_max - n).

    Args:
        token_ids: int64 [T].
        token_map, vocab_size, pad_id, barrier_id: See `keys_of_tokens`.
        order_max: Ids of an item; order_max * bits is at most 128.
        bits: Of an id, 1 to 63; mapped ids and the pad id fit.
        out: uint64 [T, 2], overwritten whole.

    Returns:
        -1; or the position of the first id outside the vocabulary, and `out` is undefined.
    """

def keys_of_windows(windows: _UInt64, order: int, bits: int, multipliers: _Int64, out: _Int64) -> None:
    """Writes the mixed hash of each n-gram, as `keys_of_tokens` gives it. About 6 ns each.

    Args:
        windows: uint64 [M, 2], shifted to `order` ids of `bits` bits.
        order: Ids of an n-gram.
        bits: Of an id.
        multipliers: int64 [order or more], the newest id's first.
        out: int64 [M], overwritten whole.
    """

def sort_items(items: _UInt64, weights: _Int64 | None = None) -> None:
    """Sorts items in place, ascending; equal items keep their order. A radix sort, about 45 ns an item of text.

    Args:
        items: uint64 [N, 2]. Takes another 16 bytes an item meanwhile; with weights 48, and 8 a weight.
        weights: int64 [N, W], whose rows move with their items; 105 ns an item then.
    """

def sum_items(items: _UInt64, weights: _Int64 | None, shift: int) -> tuple[_UInt64, _Int64]:
    """Returns the distinct values of items >> shift, uint64 [M, 2], and the sums of their weights, int64 [M, W].

    Args:
        items: uint64 [N, 2], sorted.
        weights: int64 [N, W]; None: each item counts once, in one column. Sums wrap around.
        shift: 0 to 127 bits, so that windows give n-grams of a lower order.
    """

def find_items(haystack: _UInt64, needles: _UInt64) -> _Int64:
    """Returns the index of each needle in the haystack, int64 [M], or -1. One pass over both, about 5 ns an item.

    Args:
        haystack: uint64 [N, 2], strictly ascending.
        needles: uint64 [M, 2], ascending.
    """

# --------------------------------------------------------------------------------------------------------------------
# Messages (messages_module.cpp).

def fresh_bytes(num_bytes: int) -> tuple[bytes, _Bytes]:
    """Returns bytes whose content is not set, and an array [num_bytes] over their memory, which keeps them alive.

    Write all of the array before anybody reads, hashes or compares the bytes, and never afterwards. An empty one is the
    interpreter's own.
    """

# --------------------------------------------------------------------------------------------------------------------
# Memory that processes share, and the epochs in it (epochs.h).

def map_shared(fd: int, num_bytes: int, *, writable: bool) -> _Bytes:
    """Maps a descriptor, shared, at a multiple of a huge page. The mapping lasts as long as the array or a view of it.

    Args:
        fd: May be closed afterwards.
        num_bytes: Whole pages of 4,096.
        writable: Whether the array is.

    Raises:
        OSError: The system refused.
    """

def collapse(array: _Bytes, byte_start: int, num_bytes: int) -> int:
    """Asks the kernel for huge pages under a part of a mapping. Blocks while it copies. Returns 0 or an errno."""

def protect(array: _Bytes) -> None:
    """Makes a mapping read-only for good. Raises `OSError`: the system refused."""

def init_client_block(block: _Bytes) -> None:
    """Empties a client's block, uint8 [CLIENT_BLOCK_BYTES] at a multiple of 64 bytes. Nobody may use it meanwhile."""

def publish_epoch(control: _Bytes, version: int, epoch: int) -> None:
    """Makes `epoch` the newest of a version, 1 to 65,535: lookups that begin from now on see it."""

def reclaim_epochs_before(control: _Bytes, version: int, epoch: int) -> None:
    """Ends a version's epochs before `epoch`. Slots that only they name may be reused once this has returned.

    Lookups that are still in one notice, and read from disk. A GPU cannot: see `active_pins` first.
    """

def reclaim_version(control: _Bytes, version: int) -> None:
    """Ends all epochs of a version."""

def active_lookups(block: _Bytes) -> tuple[int, int]:
    """Returns how many lookups of a client are in even and in odd epochs, as its block says. It may say anything."""

def active_pins(block: _Bytes) -> tuple[int, int]:
    """Returns how many even and odd epochs a client pins for a GPU, as its block says. It may say anything."""

class EpochPin:
    """Pins epochs of one version for a GPU's kernels, counted in the client's block. One thread at a time.

    Dropped, it unpins all, except in a forked child: the counts are the parent's.
    """

    def __init__(self, control: _Bytes, version: int, block: _Bytes) -> None: ...
    def newest(self) -> int | None:
        """Returns the newest epoch; None: the version is not served any more."""

    def pin(self) -> int | None:
        """Pins the newest epoch and returns it; None: the version is not served any more."""

    def unpin(self, epoch: int) -> None:
        """Undoes one `pin` of an epoch. Raises `ValueError`: it is not pinned."""

class ReportWriter:
    """Writes reports into the ring of a client's block (reports.h). Thread-safe; never waits."""

    def __init__(self, block: _Bytes) -> None: ...
    def add(self, reports: _Reports) -> None:
        """Writes REPORT [n]; what finds no room is dropped and counted."""

class ReportReader:
    """Reads the reports of a client's block, which may hold anything. One reader a block; never waits."""

    def __init__(self, block: _Bytes) -> None: ...
    def take(self, out: _Reports) -> int:
        """Moves the next reports into `out`, REPORT [n]; returns how many. A call is bounded work.

        A report that is reserved and not yet written gets the time until the next call.
        """

    @property
    def lost(self) -> int:
        """Positions of the ring that held no report."""

    @property
    def dropped(self) -> int:
        """Reports that found no room, as the client counts them."""

class KeyCounts:
    """Counts of reported keys: four keys a set of 64 bytes, none above its true count (key_counts.h). Thread-safe."""

    def __init__(self, memory: _Bytes) -> None:
        """Empties memory, uint8 [64 * sets] at a multiple of 64 bytes, and counts in it."""

    def add(self, reports: _Reports) -> int:
        """Counts REPORT [n] by their weights, 2 ** (source_and_weight >> 3). Returns how many had a key."""

    @overload
    def counts(self, table: int, order_index: int, keys: _Int64) -> _UInt32: ...
    @overload
    def counts(self, table: int, order_index: _Bytes, keys: _Int64) -> _UInt32:
        """Returns the counts, uint32 [n], of keys, int64 [n]; order_index: one for all, or uint8 [n]."""

    def above(
        self, table: int, count_min: int, set_start: int = 0, set_end: int = ...
    ) -> tuple[_Bytes, _Int64, _UInt32]:
        """Returns the keys of a table, in sets set_start to set_end - 1, that were counted count_min times or more.

        Returns:
            order_index uint8 [m], keys int64 [m], counts uint32 [m], in no order. A few sets at a time take little
            memory.
        """

    def age(self) -> None:
        """Halves all counts."""

    @property
    def num_used(self) -> int:
        """Keys that have a count."""

    @property
    def num_sets(self) -> int:
        """Sets, of four keys each."""

# --------------------------------------------------------------------------------------------------------------------
# The lookup path of a store (engine.h). `tierstore.tiers.native` is its user.

def probe_uring() -> int:
    """Returns 0 if this process may use io_uring as `Engine` does, else the errno that says why not."""

def probe_process_madvise() -> int:
    """Returns 0 if this process may call process_madvise on itself, else the errno that says why not."""

def drop_released() -> None:
    """Drops the arrays that finished jobs have let go. Every call of a ticket does it too."""

class EntryCache:
    """A recency cache in memory that engines share (entry_cache.h draws it). Thread-safe."""

    def __init__(self, memory: _Bytes, *, num_sets: int, entry_bytes: int, is_new: bool) -> None:
        """Uses memory, uint8 at a multiple of 64 bytes, which it keeps alive; is_new: empties it.

        Memory that is not writable is another process's: engines read it, and the calls below raise `ValueError`.
        """

    def count_accesses(self, count: int) -> None:
        """Moves the clock by which counts age."""

    def touch(self, orders: _Bytes, keys: _Int64) -> None:
        """Counts uses that readers of other processes reported. orders: uint8 [n], with the tag; keys: int64 [n]."""

    def drop_tag(self, tag: int) -> None:
        """Takes out all entries of a tag, 0 to 15."""

class StaticRecord:
    """Where a table's placed entries are, in memory and in the placement's file. It keeps the arrays alive."""

    def __init__(
        self,
        *,
        areas: Sequence[_IndexArea],
        records: _Bytes,
        num_placed: int,
        byte_start: int,
        file: _FileHandle | None,
        in_file: _IndexArea | None = None,
        loaded_start: int = 0,
    ) -> None:
        """Describes a static set.

        Args:
            areas: Heads and indexes of even and of odd epochs.
            records: uint8 [loaded, record_bytes], those in memory.
            num_placed: Records of the table in the file.
            byte_start: Of the first of them.
            file: The placement's; None: all is in memory.
            in_file: The index of the file's records; None: record numbers in memory and in the file are the same.
            loaded_start: The number of the first record in memory.
        """

    @property
    def areas(self) -> list[_IndexArea]: ...
    @property
    def records(self) -> _Bytes: ...

class PlaneRecord:
    """Where a part of every row of a table in place lies, before an engine opens it."""

    @staticmethod
    def blocks(
        *, width_bytes: int, files: Sequence[_FileHandle], stretches: _Int64, checksums: _UInt32, seed: int
    ) -> PlaneRecord:
        """Describes a plane in blocks of files.

        Args:
            width_bytes: Of each row.
            files: Open; -1, -1, 0 for those that no stretch lies in.
            stretches: int64 [n, 4]: row_start, byte_start, block_start, file; ascending.
            checksums: uint32 [blocks], of all blocks of the table.
            seed: Of these.
        """

    @staticmethod
    def pages(
        *,
        width_bytes: int,
        files: Sequence[_FileHandle],
        page_bytes: int,
        rows_per_page: int,
        pages_per_shard: int,
        page_version: int,
        seed: int,
        resident: _Bytes | None = None,
    ) -> PlaneRecord:
        """Describes a plane in pages, as a table of its own would have them.

        Args:
            width_bytes: Of each row.
            files: Its shards, open.
            page_bytes: Of a page, with its trailer.
            rows_per_page: Rows of a page.
            pages_per_shard: Pages of every shard but the last.
            page_version: Of the pages' format.
            seed: Of the checksums.
            resident: uint8 [R, width_bytes], all rows; None: they are read.
        """

VERSION_SHIFT: Final[int]
VERSION_READ: Final[int]
VERSION_FILES_MAX: Final[int]

def clear_index(buckets: _Bytes) -> None:
    """Empties an index, uint8 [n, 64] at a multiple of 64 bytes."""

def put_rows(row_ids: _Int64, place_start: int, buckets: _Bytes) -> bool:
    """Enters rows of a version into an index of rows. About 30 ns a row, most of it waits for memory.

    Args:
        row_ids: int64 [n], 0 or more. Those that the index has get the new places.
        place_start: Of the first row; the others follow.
        buckets: uint8 [m, 64] at a multiple of 64 bytes, which `clear_index` emptied. For speed, m is at least one for
            3.5 different rows.

    Returns:
        Whether there was room for every row; if not, a part of them is in.
    """

class OverlayRecord:
    """Rows that versions have of a table: an index of their ids, and open files. It keeps the index alive."""

    def __init__(
        self,
        *,
        buckets: _Bytes,
        files: Sequence[tuple[_FileHandle, int, int, int]],
        page_bytes: int,
        rows_per_page: int,
        page_version: int,
    ) -> None:
        """Describes them.

        Args:
            buckets: uint8 [n, 64] at a multiple of 64 bytes, as `put_rows` fills it; places count the rows of all
                files, the oldest first.
            files: Of each version, oldest first: its descriptors, the byte of its first page, rows, and the seed of its
                pages' checksums. Pages are numbered from 0 in each. In faults, such a page's number has VERSION_READ
                set, and its file's index above VERSION_SHIFT bits.
            page_bytes: Of a page, with its trailer.
            rows_per_page: Rows of a page.
            page_version: Of the pages' format.
        """

class TableRecord:
    """A table before an engine opens it: address map, pages, open files, memory. Every number is checked."""

    def __init__(
        self,
        *,
        num_orders: int,
        rows_per_key: int,
        row_bytes: int,
        num_rows: int,
        is_plain: bool,
        moduli: Sequence[int],
        offsets: Sequence[int],
        page_bytes: int,
        rows_per_page: int,
        num_pages: int,
        pages_per_shard: int,
        page_version: int,
        seed: int,
        shards: Sequence[_FileHandle],
        memory: _Bytes | EntryCache,
        statics: StaticRecord | None = None,
        tag: int = 0,
        residues: tuple[_Int64, _Int64] | None = None,
        planes: Sequence[PlaneRecord] | None = None,
        overlay: OverlayRecord | None = None,
    ) -> None:
        """Describes a table.

        Args:
            num_orders: 1 to ORDERS_MAX.
            rows_per_key: Heads of an order.
            row_bytes: Of a row.
            num_rows: Of the table.
            is_plain: Whether keys are row ids.
            moduli: [num_orders * rows_per_key], orders outermost.
            offsets: As moduli.
            page_bytes: Of a page, with its trailer.
            rows_per_page: Rows of a page.
            num_pages: Pages of all shards.
            pages_per_shard: Pages of every shard but the last.
            page_version: Of the pages' format.
            seed: Of the checksums.
            shards: Their descriptors, which stay open until the engine is closed.
            memory: The table's recency cache; or all its rows, uint8 [num_rows * row_bytes or more], which are looked
                at after `Engine.set_resident`.
            statics: Its placed entries; only with a recency cache.
            tag: Of its entries in the cache, 0 to 15: two versions of a table may share one.
            residues: (num_residues, inverses) of `keys_of_row_ids`; None if row ids do not give keys.
            planes: Of a table in place, side by side in a row; none if it is resident. Its pages are ranges of rows
                then, and it has no shards. None: rows lie in `shards`.
            overlay: Rows that are read in place of the table's own; None: there are not any.
        """

class HugePages:
    """Brings a block of memory onto huge pages while it is in use, by one thread, a tenth of a core at most.

    It keeps the block alive until it is gone. Thread-safe. In a forked child it does nothing.
    """

    def __init__(self, block: _Bytes, first_look_s: float) -> None:
        """Starts nothing yet.

        Args:
            block: Contiguous, writable.
            first_look_s: After the start; each later pause is twice as long, up to five minutes.
        """

    def start(self) -> bool:
        """Starts the thread. False: the system gives none, and nothing is collapsed."""

    def stop(self) -> None:
        """Ends the thread. Blocks for what the kernel is at, some milliseconds at most."""

    def last(self) -> tuple[int, int]:
        """Returns what the last look found: bytes in memory, and those of them on huge pages. Zeros before the first.

        Of a mapping that reaches beyond the block, all counts, up to the block's size.
        """

    def look(self) -> tuple[int, int]:
        """Looks now, and returns that. Costs some milliseconds for each GiB on small pages."""

    def collapsed_bytes(self) -> int:
        """Returns the bytes that were brought onto huge pages here."""

class Ticket:
    """A lookup that a worker thread finishes. Dropped, it is cancelled, unless it was detached. Thread-safe.

    Its job owned the output arrays before its first read began, and drops them when nothing is written any more.
    """

    def done(self) -> bool:
        """Returns whether it has ended, well or not."""

    def wait(self, seconds: float) -> bool:
        """Waits; Python handles signals meanwhile. Returns False if the time ran out first. Raises its fault."""

    def cancel(self) -> None:
        """Ends it: nothing is written to the output arrays once this has returned."""

    def detach(self) -> None:
        """Lets it go on when the ticket is dropped."""

class _Counters(TypedDict):
    batches: int
    zero_miss_batches: int
    sentinels: int
    rows: int
    rows_missed: int
    pages_read: int
    entries_read: int
    bytes_read: int
    row_bytes_read: int
    latency: tuple[list[int], int]  # by LATENCY_BOUNDS_NS, and the sum in ns
    tables: list[tuple[list[int], list[int], list[int]]]  # by order: hits, those in the static set, misses

class Engine:
    """The lookup path over the tables of a store. Thread-safe.

    Lookups raise what `make_fault` returned, for a fault or a closed engine; and `ValueError` for arrays of another
    form than theirs. After an exception nothing is written to any array. Python handles signals in long lookups.
    """

    def __init__(
        self,
        tables: Sequence[TableRecord],
        *,
        mode: str,
        use_process_madvise: bool,
        num_readers: int,
        num_threads: int,
        part_bytes: int,
        depth: int,
        assembly_bytes: int,
        pread_threads: int,
        jobs_max: int,
        wait_s: float,
        shared: tuple[_Bytes, int, _Bytes, bool] | None,
        make_fault: Callable[[str, int, int, int], BaseException],
        served_by: tuple[str, float] = ...,
    ) -> None:
        """Opens tables.

        Args:
            tables: In the order of their indexes.
            mode: "uring", "mmap", "pread" or "served".
            use_process_madvise: Whether "mmap" asks for read-ahead in batches.
            num_readers: Page readers: lookups that read at once.
            num_threads: That copy what memory holds of one large lookup, the caller's included, from 1 on.
            part_bytes: Of output: what each of these copies at a time; a lookup of four such parts is large.
            depth: Pages in flight of a page reader, 1 to 4,096.
            assembly_bytes: Of a page reader's buffer in which entries are put together; an entry fits.
            pread_threads: Of "pread", and of what the other modes cannot read.
            jobs_max: Tickets under way; beyond it, `submit` waits.
            wait_s: The longest wait for the disk, or for a page reader.
            shared: A daemon's: control block, number of the version, the client's block, whether to report in it.
            make_fault: (kind, table, page, detail) -> the exception to raise. The engine keeps it alive.

        Raises:
            ValueError: The numbers do not fit.
            RuntimeError: The system gives no page reader.
        """

    def try_lookup(self, index: int, keys: object, out: object, /) -> bool:
        """Looks up as `lookup` does, by the shortest way.

        Returns:
            True: done. False: `out` is undefined; the arrays are not of `lookup`'s form, or the engine is closed.
        """

    def lookup(
        self, index: int, keys: _Int64, out: _Bytes, sources: _Bytes | None = None, seconds: float | None = None
    ) -> bool:
        """Looks up the rows of keys on the caller's thread. Blocks on the disk.

        Args:
            index: The table.
            keys: int64 [N, O], -1 for zero rows.
            out: uint8 [N, O * H, row_bytes].
            sources: uint8 [N, O]; gets the number in SOURCES of what answered each key.
            seconds: The longest wait.

        Returns:
            Whether the rows were there in time; if not, the lookup was given up.
        """

    def submit(self, requests: Sequence[tuple[int, _Int64, _Bytes]], /) -> Ticket | None:
        """Starts lookups of several tables: (index, keys, out), as of `lookup`. None: memory held all, it is done.

        Waits if jobs_max tickets are under way.
        """

    def submit_pairs(self, index: int, keys: _Int64, pairs: _Int32, out: _Bytes, /) -> Ticket | None:
        """As `submit`, of single pairs: keys, int64 [M], key i of order pairs[i] % O, into uint8 [M, entry_bytes]."""

    def rows(
        self,
        index: int,
        row_ids: _Int64,
        out: _Bytes,
        wanted: tuple[int, int] | None = None,
        seconds: float | None = None,
    ) -> bool:
        """Looks up rows by their ids on the caller's thread. Blocks on the disk.

        Args:
            index: The table.
            row_ids: int64 [R] or [N, K], -1 for a zero row. Tokens of [N, O * H] whose ids all are those of keys go
                through the caches by these; other ids are read one by one.
            out: uint8, the shape of row_ids and [row_bytes], any strides.
            wanted: (start, end): ids outside of it give zero rows, whatever they are. None: every id is wanted.
            seconds: The longest wait.

        Returns:
            Whether the rows were there in time; if not, the lookup was given up.

        Raises:
            ValueError: A wanted id is not one of the table's.
        """

    def submit_rows(
        self, index: int, row_ids: _Int64, out: _Bytes, wanted: tuple[int, int] | None = None
    ) -> Ticket | None:
        """Starts what `rows` does. Returns as `submit` does."""

    def locate(self, index: int, keys: _Int64, sources: _Bytes, /) -> None:
        """Writes what would answer keys, int64 [N, O], as numbers in SOURCES, uint8 [N, O]. Counts nothing."""

    def set_resident(self, index: int, bad_pages: Sequence[int], /) -> None:
        """Declares that a resident table's memory holds its rows, but for those of bad pages. Comes before lookups."""

    def shortfalls(self) -> list[tuple[str, int, int]]:
        """Returns (what, how many there are, how many were wanted) for what the system did not give."""

    def counters(self) -> _Counters:
        """Returns what was counted since the engine was made."""

    def registered_readers(self) -> int:
        """Returns how many page readers have files and memory registered with the kernel, which makes reads cheaper."""
    def page_readers(self) -> tuple[int, int]:
        """Returns how many page readers there are, and how many of them are free."""

    def inject(self, what: str, first: int = 0, count: int = 1) -> None:
        """Makes reads fail on purpose, for tests (faults.h): none, failing, short, corrupt or slow."""

    def injected_reads(self) -> int:
        """Returns how many reads `inject` has looked at."""

    def close(self, seconds: float) -> bool:
        """Waits for all lookups to end; returns whether they did. Files and memory may go only then."""

    def before_fork(self) -> None:
        """Takes the locks that a fork must not copy in use. Raises `MemoryError`, with nothing taken."""

    def after_fork(self, child: bool, /) -> None:
        """Releases them. Attached to a daemon, a child's engine is closed."""

# --------------------------------------------------------------------------------------------------------------------
# Mailboxes: GPU kernels list what they missed in page-locked host memory, and a thread here brings the entries.

def mailbox_bytes(pairs_max: int, entry_bytes: int, rows_per_key: int = 0) -> int:
    """Returns the bytes of a mailbox's block for at most pairs_max misses a request; rows_per_key: of one by row id."""

def mailbox_row_ids_start(pairs_max: int, entry_bytes: int) -> int:
    """Returns the byte of a block by row id at which row ids, int64 [pairs_max, H], begin."""

def mailbox_pairs_start(pairs_max: int) -> int:
    """Returns the byte of a block at which the pairs, int32 [pairs_max], begin."""

def mailbox_entries_start(pairs_max: int) -> int:
    """Returns the byte of a block at which the entries, uint8 [pairs_max, entry_bytes], begin."""

class MailboxServer:
    """Serves the mailboxes of an engine, which it keeps alive, by one thread that polls them. Thread-safe.

    A device writes num_misses, keys, pairs, and last a new number, not 0, into `requested`. Then it waits until
    `answered` is that number, and looks at `status`. A request may be nonsense: it gets a status, and harms nothing.
    Each request counts as one batch of lookups. Close the server before its engine.
    """

    def __init__(self, engine: Engine) -> None: ...
    def add(self, index: int, block: _Bytes, pairs_max: int, by_row_id: bool = False) -> int:
        """Clears the words of a block that nobody uses yet, and serves it from now on. It stays alive.

        Args:
            index: The table.
            block: uint8 [mailbox_bytes(pairs_max, entry_bytes) or more], at a multiple of 64 bytes.
            pairs_max: Misses of a request.
            by_row_id: Whether a key may be -2: the pair's row ids, -1 for zero rows, are in the block then.

        Returns:
            The mailbox's id.

        Raises:
            ValueError: The block is too small or not aligned, there is no such table, or its rows are not there.
            RuntimeError: Engine or server is closed, or the system gives no thread.
        """

    def move_to(self, engine: Engine, seconds: float) -> bool:
        """Serves what is requested already, then by another engine of the same tables.

        Returns whether that is done, and the old engine is used no more; False: the time ran out, call again.
        """

    def remove(self, id: int, seconds: float) -> bool:
        """Ends the service of a mailbox. False: the time ran out, the block may still be written; call again."""

    def fault(self, id: int) -> BaseException | None:
        """Returns the first fault since the last call, as the engine's make_fault names it; None: there was none.

        Raises `ValueError`: no such mailbox.
        """

    def served(self, id: int) -> int:
        """Returns how many requests were answered. Raises `ValueError`: no such mailbox."""

    def time(self, id: int) -> None:
        """Counts latencies of a mailbox's requests from now on. Raises `ValueError`: no such mailbox."""

    def close(self, seconds: float) -> bool:
        """Removes all mailboxes, for good. Returns as `remove` does."""

    def before_fork(self) -> None:
        """Takes the lock that a fork must not copy in use."""

    def after_fork(self, child: bool) -> None:
        """Releases it. In a child, the server is closed, and touches no block."""

# --------------------------------------------------------------------------------------------------------------------
# Where the newest training record of a row lies (row_places.h).

class RowPlaces:
    """An index: row id -> (run, place), about 18 bytes a row, without a jump of memory as it grows.

    Threads share it; each call is one step to others. Row ids are 0 or more and below `num_rows`.
    """

    def __init__(self, num_rows: int) -> None:
        """num_rows: of the table, at most 2^48. Takes no memory to speak of before the first row."""

    def put(self, row_ids: _Int64, run: int, place_start: int) -> None:
        """Notes that the newest record of row_ids[i], int64 [n], is place_start + i of `run`, 0 to 65534.

        Costs some 250 ns a row while it grows. Raises `MemoryError`, and then has noted some.
        """

    def find(self, row_ids: _Int64, runs: _UInt16, places: _UInt32) -> int:
        """Writes the runs, uint16 [n], and places, uint32 [n], of row_ids, int64 [n]; returns how many were found.

        A row that has no record gets run 65535 and place 2^32 - 1.
        """

    def move(self, row_ids: _Int64, runs: _UInt16, places: _UInt32, run: int, place_start: int) -> int:
        """Does what `put` does for the rows that still lie at runs[i], places[i]; returns how many. Takes no memory."""

    def live(self, run: int) -> int:
        """Returns how many rows have their newest record in a run."""

    @property
    def num_found(self) -> int:
        """Rows that have a record."""

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it takes."""

    def num_bytes_with(self, num_more: int) -> int:
        """Returns the most bytes that it will take once so many rows are added, at the moment of growth included."""

class RunRecords:
    """Open runs, and reads of their records (run_reader.h). Threads share it."""

    def __init__(self, record_bytes: int, seed: int, depth: int, read_bytes: int, num_calls: int, mode: str) -> None:
        """Takes depth * read_bytes of memory for each of num_calls.

        Args:
            record_bytes: Of a record without its seal, a multiple of 8.
            seed: Of the checksums.
            depth: Reads under way for one call.
            read_bytes: The largest read, whole units of 4096, at least record_bytes + 4096.
            num_calls: That read at the same time; others wait.
            mode: "uring" or "pread".
        """

    def add(self, ordinal: int, number: int, fd: int, direct_fd: int, byte_start: int, num_records: int) -> None:
        """Takes an open run. Its descriptors are copied; the copies are closed once nobody reads from it any more.

        ordinal: below 65535, and free. direct_fd: -1 for none. Raises `OSError` if too many files are open.
        """

    def remove(self, ordinal: int) -> None:
        """Forgets a run; calls under way go on with it."""

    def read(
        self, row_ids: _Int64, runs: _UInt16, places: _UInt32, out: _Bytes
    ) -> tuple[str, int, int, int, int] | None:
        """Reads records of row_ids, int64 [n], at runs, uint16 [n], and places, uint32 [n], to out, uint8
        [n, record_bytes], whose rows may lie apart. Blocks on the disk; handles signals every 50 ms or so.

        Returns:
            None; or what went wrong first: a kind ("no run", "disk", "damaged", "other row", "timeout"), ordinal,
            place, row id, and a number: of "disk" an errno, below 0 if the file ends early; of "timeout" seconds.
        """

    def inject(self, what: str, first: int = 0, count: int = 1) -> None:
        """Makes reads fail on purpose, for tests (faults.h): none, failing, short, corrupt or slow."""

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that reads take."""

    @property
    def counts(self) -> tuple[int, int]:
        """Reads so far, and their bytes."""

# Training: rows that change. A record is a row's `dim` float32 values, then the optimizer's state. All of it gives the
# same bits on every processor and with any number of threads; `plain` (for tests) does without what only some have.

_Float32 = npt.NDArray[np.float32]
_Float64 = npt.NDArray[np.float64]

class Optimizer:
    """The rule that changes records: kernels/cpu/optimizer.h has the formulas. Never changes."""

    def __init__(
        self,
        rule: str,
        lr: float = 0.0,
        eps: float = 0.0,
        beta1: float = 0.0,
        beta2: float = 0.0,
        decay: float = 1.0,
        initial: float = 0.0,
    ) -> None:
        """Takes what `to_dict` of tierstore.training.optimizers gives; its numbers are checked there."""

    def state_floats(self, dim: int) -> int:
        """Returns how many float32s of state follow the values of a row."""

    def initial_state(self, dim: int) -> _Float32:
        """Returns the state of a row that no step has touched, float32 [state_floats(dim)]."""

class StepHistory:
    """The steps of a table: how many there were, and of "dense_adam" what each multiplied with, 8 bytes a step.

    One thread at a time changes it; functions that are given one read the steps up to the last.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Begins before step 1."""

    def append(self, lr: float) -> None:
        """Begins the next step, whose rate is `lr`."""

    def restart(self, last: int, rates: _Float64 | None = None) -> None:
        """Starts over, as after `last` steps.

        Args:
            last: Steps so far.
            rates: float64 [last], of all steps; "dense_adam" needs them, others do without.
        """

    @property
    def last(self) -> int:
        """The number of the last step, 0 before the first."""

    @property
    def num_bytes(self) -> int:
        """What the history takes."""

def update_rows(
    history: StepHistory, dim: int, records: _Float32, sums: _Float32, scale: float = 1.0, plain: bool = False
) -> None:
    """Makes the history's last step for each record. Sums are not checked.

    Args:
        history: Has one step at least.
        dim: Values of a row.
        records: float32 [R, F], changed in place; F is at least `dim` and the rule's state.
        sums: float32 [R, dim], the gradient of each row.
        scale: Of all gradients.
    """

def catch_up_rows(history: StepHistory, dim: int, records: _Float32, threads: int = 1, plain: bool = False) -> None:
    """Brings records of "dense_adam" to the history's last step, without a gradient; other rules change nothing.

    Args:
        records: float32 [R, F], changed in place. A step of 128 values that still move takes about 0.1 us.
    """

def distinct_rows(
    row_ids: _Int64, num_rows: int, groups: _Int32 | None = None
) -> tuple[_Int64, _UInt32, _UInt32, _UInt32]:
    """Finds the distinct rows of a batch. About 10 ns a reference.

    Args:
        row_ids: int64 [N], -1 for no row.
        num_rows: Of the table.
        groups: int32 [N], at least 0, in any order.

    Returns:
        row_ids int64 [D] in the order of first reference; starts uint32 [D + 1]; places uint32: the references of row
        i are places[starts[i]:starts[i + 1]], by group, in a group as they came; and, uint32 [D + 1], how many rows
        before each have several references.
    """

def sum_gradients(
    row_ids: _Int64,
    gradients: _Float32,
    num_rows: int,
    groups: _Int32 | None = None,
    scale: float = 1.0,
    plain: bool = False,
) -> tuple[_Int64, _Float32, int]:
    """Sums the gradients of each distinct row: in a group in order, then the groups in order, in float32.

    Args:
        row_ids: int64 [N], -1 for no row.
        gradients: float32 [N, dim].
        num_rows: Of the table.
        groups: int32 [N], at least 0; None: one group, which gives the bits of torch's dense backward.
        scale: Of each sum.

    Returns:
        row_ids int64 [D], sums float32 [D, dim], and the place among them of the first that is not finite, or -1.
    """

def apply_gradients(
    history: StepHistory,
    row_ids: _Int64,
    gradients: _Float32,
    records: _Float32,
    groups: _Int32 | None = None,
    scale: float = 1.0,
    scratch_floats: int = 16777216,
    threads: int = 1,
    plain: bool = False,
) -> int:
    """Makes the history's last step for the rows of a table that lies whole in memory, by row id.

    Args:
        row_ids: int64 [N], -1 for no row.
        gradients: float32 [N, dim].
        records: float32 [num_rows, F], changed in place.
        scratch_floats: The most that sums may take; with less, sums are made twice.

    Returns:
        -1, or the row id of a sum that is not finite; then no record is changed.
    """

def quantize_rows(
    values: _Float32,
    codec: str,
    factor: float,
    old: _Bytes | None,
    out: _Bytes,
    threads: int = 1,
    plain: bool = False,
) -> tuple[int, int]:
    """Rounds rows into a codec's bytes, half to even. What `old` holds already, bit for bit, keeps its bytes and scale.

    Args:
        values: float32 [R, dim].
        codec: "fp32", "fp16", "bf16", "fp8_e4m3" or "fp8_e4m3_e8m0x32".
        factor: Of "fp8_e4m3", not 0; else not used.
        old: uint8 [R, row_bytes], the rows before, or None.
        out: uint8 [R, row_bytes], overwritten whole.
        threads: That share many rows, the caller's included.

    Returns:
        How many changed values were beyond the codec's largest, which they became, and how many were not a number.
    """

def dequantize_rows(
    rows: _Bytes, dim: int, codec: str, factor: float, out: _Float32, threads: int = 1, plain: bool = False
) -> None:
    """Writes the exact float32 values of rows, [R, dim]; codecs as for `quantize_rows`. fp8 and fp16 have one NaN."""

def philox4x32(counters: _UInt32, key: _UInt32) -> _UInt32:
    """Returns Philox4x32-10 of counters, uint32 [N, 4], under a key, uint32 [2]: uint32 [N, 4]."""

def initial_rows(
    row_ids: _Int64,
    kind: str,
    first: float,
    second: float,
    seed: int,
    table: int,
    out: _Float32,
    threads: int = 1,
    plain: bool = False,
) -> None:
    """Draws the initial values of rows: the same for a seed, table, row id and column, whoever asks when.

    Args:
        row_ids: int64 [R].
        kind: "uniform", from `first` up to `second`; or "normal", of mean `first` and standard deviation `second`.
        seed: Below 2^64.
        table: Below 2^32; keeps the tables of one seed apart.
        out: float32 [R, dim], overwritten whole.
    """

def gradient_norms(rows: _Int64, sums: _Float32, block_starts: _Int64, out: _Float64) -> None:
    """Writes the L2 norm of each block of a table's gradient, in float64 and a fixed order. About 0.2 us a row.

    The squares of a row are summed in 16 parts, the rows of a block in the order of their ids: the bits depend neither
    on the order of a batch nor on the processor. NaN and infinity go through.

    Args:
        rows: int64 [D], distinct row ids in any order; those before the first start count to the first block.
        sums: float32 [D, dim], their gradients.
        block_starts: int64 [blocks], ascending: the first row of each block.
        out: float64 [blocks], overwritten whole.
    """

def place_entries(entries: _Bytes, places: _Int64, out: _Bytes, byte_start: int = 0) -> None:
    """Copies entries to tokens: out[n, byte_start : byte_start + width] = entries[places[n]]. As fast as memory.

    Args:
        entries: uint8 [M, width].
        places: int64 [N]; -1 gives zeros. One that is outside raises `ValueError`; out is then undefined.
        out: uint8 [N, at least byte_start + width], contiguous.
    """

def gradient_squares(rows: _Int64, sums: _Float32, out: _Float64) -> None:
    """Writes the sum of squares of each row, [D], in the order of row ids; arguments as `gradient_norms`.

    Added up one by one from 0, the squares of a block's rows are the square of its norm.
    """

class OwnedRows:
    """The distinct rows of a batch, by the owner of each, and the sums of their gradients: what ranks exchange.

    Rows of an owner are in the order in which the batch first refers to them. Sums are by owner, then by group, then by
    first reference: one for each group and row that meet. About 20 ns a reference.
    """

    def __init__(self, row_ids: _Int64, starts: _Int64, groups: _Int32 | None = None) -> None:
        """Finds them; raises `ValueError` for ids outside the table, and groups that descend.

        Args:
            row_ids: int64 [R], -1 for no row.
            starts: int64 [W + 1], ascending from 0: owner w has rows starts[w] up to starts[w + 1].
            groups: int32 [R], ascending from 0 or more; None: one group.
        """

    @property
    def row_ids(self) -> _Int64:
        """Int64 [D]. A copy."""

    @property
    def counts(self) -> _Int64:
        """How many of them each owner has, int64 [W]."""

    @property
    def places(self) -> _Int64:
        """Which of them each reference is to, int64 [R]; D for no row."""

    @property
    def sum_counts(self) -> _Int64:
        """How many sums each owner gets of each group, int64 [W, G]. With one group, sums are the rows'."""

    @property
    def rows_of_sums(self) -> _UInt32:
        """Which of its owner's rows each sum is of, uint32 [sums]; empty with one group."""

    def expand(self, values: _Bytes, out: _Bytes, threads: int = 1) -> None:
        """Copies distinct rows, uint8 [D, row_bytes], to all references, [R, row_bytes]; zeros to references -1."""

    def sum(self, gradients: _Float32, out: _Float32, scale: float = 1.0, threads: int = 1) -> None:
        """Writes the sums of gradients [R, dim], each in the order of the batch, times `scale`: out [sums, dim]."""

# --------------------------------------------------------------------------------------------------------------------
# Training records in DRAM (row_cache.h).

class RowUpdate:
    """The gradients of one step, their distinct rows, and scratch, which is kept from step to step. One thread."""

    def __init__(self, scratch_bytes: int) -> None:
        """scratch_bytes: for sums of gradients; what does not fit is summed twice."""

    def begin(
        self, row_ids: _Int64, gradients: npt.NDArray[np.float32], groups: _Int32 | None, num_rows: int
    ) -> tuple[int, bool]:
        """Takes row_ids, int64 [R], -1 for none, gradients, float32 [R, dim], and groups, int32 [R], or None for one.

        Holds gradients and groups until `end`. Returns the place of the first reference that is wrong, -1 if all are
        right; and whether its group is what is wrong.
        """

    def find_not_finite(self) -> int:
        """Returns the number of the first distinct row whose sum is not finite, -1 if all are."""

    def end(self) -> None:
        """Lets go of the arrays."""

    @property
    def row_ids(self) -> _Int64:
        """A copy of the distinct rows, int64 [D], in the order in which the step first refers to them."""

    def __len__(self) -> int: ...

class RowPins:
    """Rows that stay in a `RowCache` until `release`, or the end of this. One thread at a time."""

    def release(self) -> None:
        """Lets all of them go. It may be called again."""

    def __len__(self) -> int: ...

def row_cache_bytes(num_rows: int, dim: int, record_bytes: int, num_slots: int, num_aside: int) -> int:
    """Returns the bytes of the block that a `RowCache` of these numbers needs."""

class RowCache:
    """Training records of one table, by row id, with write-back. Thread-safe; one thread updates, and one drains."""

    def __init__(
        self,
        block: _Bytes,
        num_rows: int,
        dim: int,
        record_bytes: int,
        num_slots: int,
        num_aside: int,
        optimizer: Optimizer,
    ) -> None:
        """Lives in `block`, uint8 [row_cache_bytes], zero and aligned to 64 bytes.

        num_slots: records that it holds; at least num_rows: each row has its own slot, and there is no index.
        num_aside: records that a commit froze and that change before they are drained.
        """

    def gather(self, row_ids: _Int64, out: npt.NDArray[np.float32], threads: int = 1) -> _UInt32:
        """Copies values to out, float32 [R, dim]; -1: zeros. Returns which references miss, ascending: those stay."""

    def bring_up_to_date(self, records: _Bytes, threads: int = 1) -> None:
        """Of "dense_adam", replays the steps that records, uint8 [R, record_bytes], have missed."""

    def find(self, row_ids: _Int64, pins: RowPins | None = None) -> _UInt32:
        """Returns the indexes of rows that are not here, -1 apart. pins: takes those that are."""

    def pins(self) -> RowPins:
        """Returns pins of this cache, without rows."""

    def put(self, row_ids: _Int64, records: _Bytes, pins: RowPins | None = None) -> int:
        """Takes over records, uint8 [R, record_bytes], of different rows, as clean, until no slot is free.

        Returns how many, from the first on, are here now. Rows that were here stay as they are. pins: takes them.
        """

    def update(self, update: RowUpdate, start: int, end: int, lr: float, threads: int = 1) -> tuple[str, int]:
        """Takes a step on distinct rows start to end; it is complete with the last row. The whole call or nothing.

        Returns:
            ("done", rows); or, and nothing has changed: ("missing", how many rows are not here), ("no_room_aside", how
            many frozen records must be put aside: drain, and try again), ("not_finite", the number of the distinct row,
            if all rows were given; a step in parts asks `find_not_finite` first).
        """

    def drain(self, out: _Bytes, row_ids: _Int64, write: int) -> int:
        """Copies the oldest dirty records to out, uint8 [n, record_bytes or more], and their row ids, int64 [n].

        After `freeze`, only what was dirty then. write: a number for `written`. Returns how many.
        """

    def written(self, row_ids: _Int64, write: int) -> None:
        """Notes that drained records can be read elsewhere: their slots are clean, unless they were changed since."""

    def freeze(self) -> None:
        """Has `drain` give what is dirty now, as it is now, until `thaw`."""

    def thaw(self) -> None:
        """Ends `freeze`."""

    def shrink(self, num_slots: int) -> int:
        """Gives slots up; returns how many are left: more than asked for if dirty or pinned rows are in the way."""

    def clear(self) -> None:
        """Forgets all rows and pins, whatever state they are in."""

    @property
    def num_steps(self) -> int:
        """Steps that were completed."""

    def set_steps(self, num_steps: int, rates: npt.NDArray[np.float64]) -> None:
        """Starts after so many steps. rates: of all of them, for "dense_adam"; else empty."""

    def rates(self) -> npt.NDArray[np.float64]:
        """Returns the rates of all steps, of "dense_adam"; else an empty array."""

    def counters(self) -> dict[str, int]:
        """Returns totals: "hits" and "misses" in references, "evicted", "put_aside"; and numbers of now: "num_rows",
        "num_dirty", "num_writing", "num_pinned", "num_free" (slots that `put` may fill), "num_takeable" (records that
        `drain` still has, at most), "num_slots"."""
