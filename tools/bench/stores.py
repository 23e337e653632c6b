"""Tables to measure on: synthetic stores in V4.1's shape, of any size, made once and used again.

Input: a number of rows. Output: a built store, the pages that keys need, and what its rows must be. No checkpoint is
written: the table is given to `tierstore.offline.build` as a source whose plane is one block of random rows, named over
and over (row r is row r % BLOCK_ROWS of the block), so that a build costs what sealing and writing pages cost. Pages
differ all the same, by their numbers and checksums. Errors: those of a build.

Shapes: N tokens, O = 3 orders, H = 8 heads, R = 264 bytes a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_adapter import HashSpec
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog, set_epoch
from tierstore.formats.checkpoint import Plane, StoredTensor, TableSource
from tierstore.layout import TableLayout
from tierstore.offline.build import build_store
from tierstore.offline.place import prune_placements
from tierstore.spec import KEY_MAX, TableSpec
from tierstore.units import format_bytes

from ..cli import Progress

LAYER, TABLE = 1, "layers.1"
ORDERS, HEADS, ROW_BYTES, DIM = (2, 3, 4), 8, 264, 256
ROWS_PER_TOKEN, ENTRY_BYTES = len(ORDERS) * HEADS, HEADS * ROW_BYTES
CODEC = "fp8_e4m3_e8m0x32"
BLOCK_ROWS = (64 << 20) // ROW_BYTES
BLOCK_FILE = "block.bin"
FOLDER = "tierstore-bench"  # under --folder
V41_COMPRESSED_VOCAB, V41_VOCAB, PAD_ID = 99_092, 129_280, 2


@dataclass(frozen=True)
class MadeStore:
    """A store with one table, the block that its rows repeat, and its shards' files in order."""

    path: Path
    layout: TableLayout
    block: np.ndarray
    files: list[Path]

    @property
    def spec(self) -> TableSpec:
        """The table's spec."""
        return self.layout.spec

    def ranges(self, keys: np.ndarray) -> np.ndarray:
        """Returns the pages that keys [N, O] need, each once, ascending, as int64 [P, 3] of (file,
        byte offset, bytes)."""
        row_ids = self.spec.row_ids(keys).reshape(-1)
        pages = np.unique(row_ids[row_ids >= 0] // self.layout.rows_per_page)
        shard, page = np.divmod(pages, self.layout.pages_per_shard)
        page_bytes = np.full_like(page, self.layout.page_bytes)
        return np.stack([shard, page * self.layout.page_bytes, page_bytes], axis=1)

    def check(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Raises `ConfigError` where rows [N, O * H, R] are not those of keys [N, O]:
        a fast wrong answer is no figure."""
        row_ids = self.spec.row_ids(keys)
        expected = self.block[row_ids % BLOCK_ROWS]
        expected[row_ids < 0] = 0
        if not np.array_equal(rows, expected):
            raise ConfigError(
                f"{self.path}: a lookup gave other rows than were built; run tierstore verify {self.path}"
            )


def v41_hash(rows_per_head: int, token_map: np.ndarray | None = None, layers: tuple[int, ...] = (LAYER,)) -> HashSpec:
    """Returns V4.1's hash for `layers`, with heads of about `rows_per_head` rows instead of 16 million."""
    vocab_size = V41_VOCAB if token_map is None else len(token_map)
    compressed = V41_COMPRESSED_VOCAB if token_map is None else len(np.unique(token_map))
    text = {
        "engram_layer_ids": list(layers),
        "engram_vocab_size": rows_per_head,
        "engram_max_ngram_size": ORDERS[-1],
        "engram_n_heads": HEADS,
        "engram_head_dim": DIM,
        "engram_compressed_vocab_size": compressed,
        "engram_pad_token_id": PAD_ID,
        "vocab_size": vocab_size,
    }
    return HashSpec.from_config({"text_config": text}, token_map, "deepseek_v41")


def rows_per_head(table_bytes: int) -> int:
    """Returns how many rows a head has in a table of about `table_bytes`."""
    return max(16, table_bytes // (ROWS_PER_TOKEN * ROW_BYTES))


def make_store(
    folder: Path,
    num_rows: int,
    token_map: np.ndarray | None = None,
    seed: int = 0,
    part: tuple[int, int] | None = None,
) -> MadeStore:
    """Makes, or finds, the store of a table of about `num_rows` rows under `folder`. Blocks: some 300 MiB a second.

    token_map: of the text that is to be profiled; the store then carries its hash. seed: of the block's rows, one in a
    folder: another version of the same table lies in another folder. part: (I, N), slice I of N of it. What an
    interrupted run began is resumed.
    Raises what `build_store` raises (`BudgetError` where the disk has no room).
    """
    heads = v41_hash(max(16, num_rows // ROWS_PER_TOKEN), token_map)
    moduli, offsets = heads.moduli(LAYER), heads.offsets(LAYER)
    identity = json.dumps([moduli, ROW_BYTES, BLOCK_ROWS])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    fingerprint = digest if token_map is None else heads.fingerprint(LAYER)
    spec = TableSpec(TABLE, heads.num_rows(LAYER), ROW_BYTES, ORDERS, HEADS, moduli, offsets, CODEC, DIM, fingerprint)
    path = (
        folder / FOLDER / (f"rows-{spec.num_rows}" if token_map is None else f"rows-{spec.num_rows}-{fingerprint[:8]}")
    )
    if part is not None:
        path = path.with_name(f"{path.name}-{part[0]}of{part[1]}")
    block_file = folder / FOLDER / BLOCK_FILE
    _make_block(block_file, seed)
    with Progress(f"making a table of {format_bytes(spec.table_bytes)}") as progress:
        origin = {"digest": digest, "seed": seed, "made_by": "tierstore bench", "files": []}
        attachments = {} if token_map is None else heads.attachments()
        sources = [block_source(spec, block_file)]
        build_store(path, sources, origin=origin, attachments=attachments, on_progress=progress, slice=part)
    return find_store(path)


def find_store(path: Path) -> MadeStore:
    """Returns a store that was made; raises what reading its catalog raises."""
    image = read_catalog(path)
    files = [path / record.file for _, record in sorted(image.shards[TABLE].items())]
    block = np.memmap(path.parent / BLOCK_FILE, dtype=np.uint8, mode="r", shape=(BLOCK_ROWS, ROW_BYTES))
    return MadeStore(path, image.tables[TABLE], block, files)


@contextlib.contextmanager
def temporary_store(folder: Path, num_rows: int, token_map: np.ndarray | None = None) -> Iterator[MadeStore]:
    """Makes a store, as `make_store` does, in a folder of its own under `folder`, and removes it in the end."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="tierstore-bench-") as name:
        yield make_store(Path(name), num_rows, token_map)


def unplace(path: Path) -> None:
    """Removes a store's placements, so that the next run begins without one."""
    set_epoch(path, None)
    prune_placements(path, 0)


def clean(folder: Path) -> None:
    """Removes every table that benchmarks made under `folder`."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def fresh_keys(generator: np.random.Generator, num_tokens: int) -> np.ndarray:
    """Returns keys, int64 [N, O], drawn from all keys there are: none comes twice, in this run or another."""
    return generator.integers(0, KEY_MAX, (num_tokens, len(ORDERS)), dtype=np.int64, endpoint=True)


def rows_buffer(num_tokens: int) -> np.ndarray:
    """Returns a buffer for the rows of `num_tokens` tokens, uint8 [N, O * H, R], its memory already there."""
    return np.ones((num_tokens, ROWS_PER_TOKEN, ROW_BYTES), dtype=np.uint8)


def key_pairs(keys: np.ndarray) -> np.ndarray:
    """Returns keys [N, O] as int64 [N * O, 2] of (order index, key), the order of their entries in a rows buffer."""
    order_index = np.tile(np.arange(keys.shape[1]), len(keys))
    return np.stack([order_index, keys.reshape(-1)], axis=1)


def _make_block(file: Path, seed: int) -> None:
    """Writes the block, uint8 [BLOCK_ROWS, R], where its file is missing or short."""
    if not file.exists() or file.stat().st_size != BLOCK_ROWS * ROW_BYTES:
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = np.random.default_rng(seed).integers(0, 256, (BLOCK_ROWS, ROW_BYTES), dtype=np.uint8)
        rows.tofile(file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)


def block_source(spec: TableSpec, block_file: Path) -> TableSource:
    """Returns a table whose row r is row r % BLOCK_ROWS of the block in `block_file`, uint8 [BLOCK_ROWS, R]."""
    tensors = []
    for index, start in enumerate(range(0, spec.num_rows, BLOCK_ROWS)):
        rows = min(BLOCK_ROWS, spec.num_rows - start)
        tensors.append(StoredTensor(f"block.{index}", block_file, "U8", (rows, ROW_BYTES), 0, rows * ROW_BYTES))
    return TableSource(spec, (Plane(ROW_BYTES, tuple(tensors)),))
