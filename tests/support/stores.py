"""Small checkpoints and stores for tests, with the rows that a lookup must give.

The oracle here is plain: rows are concatenated planes, row ids are `key % modulus + offset` in Python integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

from tierstore.decisions.budget import divide_dram
from tierstore.formats.catalog import CatalogImage
from tierstore.formats.checkpoint import Checkpoint, Plane, TableSource
from tierstore.formats.in_place import InPlaceLayout, lay_out_in_place
from tierstore.formats.stored_tensor import StoredTensor
from tierstore.offline.build import BuildReport, build_store
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen
from tierstore.spec import TableSpec
from tierstore.store.embedded import Embedded, open_placement
from tierstore.store.store import Store
from tierstore.tiers.nvme import choose_io
from tierstore.units import parse_bytes

PRIMES = [p for p in range(331, 2000) if all(p % d for d in range(2, 45))]


@dataclass(frozen=True)
class Model:
    """A checkpoint with tables, and every table's rows, uint8 [num_rows, row_bytes]."""

    folder: Path
    checkpoint: Checkpoint
    sources: tuple[TableSource, ...]
    rows: dict[str, np.ndarray]

    def build(self, store: Path, **options: object) -> BuildReport:
        arguments: dict = {"origin": self.checkpoint.to_dict(), "attachments": {"note": b"kept"}} | options
        return build_store(store, self.sources, **arguments)

    @property
    def path(self) -> Path:
        """The checkpoint's, as `tierstore.offline.repair.RowSource` has it; so have the next two."""
        return self.folder

    def to_dict(self) -> dict:
        return self.checkpoint.to_dict()

    def sources_of(self, _: CatalogImage) -> tuple[TableSource, ...]:
        return self.sources

    def expected(self, name: str, keys: np.ndarray) -> np.ndarray:
        """The rows of keys [N, O], computed key by key in Python integers."""
        spec = next(source.spec for source in self.sources if source.spec.name == name)
        rows = self.rows[name]
        out = np.zeros((len(keys), spec.num_heads, spec.row_bytes), dtype=np.uint8)
        for n, token_keys in enumerate(keys.tolist()):
            for o, key in enumerate(token_keys):
                for h in range(spec.rows_per_key):
                    head = o * spec.rows_per_key + h
                    if key >= 0:
                        out[n, head] = rows[key % spec.moduli[head] + spec.offsets[head]]
        return out

    def row_ids(self, name: str, keys: np.ndarray) -> np.ndarray:
        """Row ids [N, O * H] of keys [N, O], in Python integers."""
        spec = next(source.spec for source in self.sources if source.spec.name == name)
        ids = [
            [
                -1 if k < 0 else k % spec.moduli[h] + spec.offsets[h]
                for h in range(spec.num_heads)
                for k in [token[h // spec.rows_per_key]]
            ]
            for token in keys.tolist()
        ]
        return np.array(ids, dtype=np.int64).reshape(-1, spec.num_heads)


def make_model(
    folder: Path, seed: int = 0, layers: tuple[int, ...] = (1, 14), heads: int = 8, plain: bool = True
) -> Model:
    """Writes a checkpoint with one 40-byte-row table a layer (orders 2, 3, 4) and, if asked, a plain one of 33 rows."""
    rng = np.random.default_rng(seed)
    tensors, shapes, rows = {}, [], {}
    for index, layer in enumerate(layers):
        moduli = PRIMES[index * 3 * heads :][: 3 * heads]
        offsets = [sum(moduli[:i]) for i in range(len(moduli))]
        values = rng.integers(0, 256, (sum(moduli) + 5, 32), dtype=np.uint8)
        scales = rng.integers(0, 256, (sum(moduli) + 5, 8), dtype=np.uint8)
        tensors |= {f"layers.{layer}.weight": values, f"layers.{layer}.scale": scales}
        rows[f"layers.{layer}"] = np.concatenate([values, scales], axis=1)
        shapes.append((layer, tuple(moduli), tuple(offsets)))
    tensors["plain"] = rng.integers(0, 256, (33, 24), dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    sources = []
    for layer, moduli, offsets in shapes:
        num_rows = len(rows[f"layers.{layer}"])
        spec = TableSpec(f"layers.{layer}", num_rows, 40, (2, 3, 4), heads, moduli, offsets, "raw", 32, f"{layer:064x}")
        planes = [
            Plane(32, (checkpoint.tensors[f"layers.{layer}.weight"],)),
            Plane(8, (checkpoint.tensors[f"layers.{layer}.scale"],)),
        ]
        sources.append(TableSource(spec, tuple(planes)))
    if plain:
        rows["plain"] = tensors["plain"]
        sources.append(
            TableSource(TableSpec.plain("plain", 33, 24, "raw", 24), (Plane(24, (checkpoint.tensors["plain"],)),))
        )
    return Model(folder, checkpoint, tuple(sources), rows)


def layout_in_place(name: str, num_rows: int, widths: tuple[int, ...]) -> InPlaceLayout:
    """A plain table in place whose planes lie one behind the other in a file that nobody opens."""
    file, tensors, at = Path("/nowhere"), [], 0
    for number, width in enumerate(widths):
        tensors.append(StoredTensor(f"plane {number}", file, "U8", (num_rows, width), at, num_rows * width))
        at += num_rows * width
    planes = tuple(Plane(width, (tensor,)) for width, tensor in zip(widths, tensors, strict=True))
    spec = TableSpec.plain(name, num_rows, sum(widths), "raw", 1)
    return lay_out_in_place(0, TableSource(spec, planes), 0, 1 << 20, {file: 0})


def place_some(store: Path, static_fraction: float = 0.5, part: float = 0.5) -> dict[str, Chosen]:
    """Places a part of the keys that tests draw with seeds 0 to 6, in tables of three orders;
    returns what was placed."""
    rng = np.random.default_rng(99)
    drawn = np.concatenate([random_keys(np.random.default_rng(seed), 700)[:120] for seed in range(7)])
    chosen = {}
    for name in ("layers.1", "layers.14"):
        pairs = [(order, key) for order in range(3) for key in np.unique(drawn[:, order]) if key >= 0]
        picked = [pairs[i] for i in rng.permutation(len(pairs))[: int(len(pairs) * part)]]
        picked += [pair for pair in ((0, 0), (2, 0), (1, 2**63 - 1), (0, 7)) if pair not in picked]
        order_index, keys = zip(*picked, strict=True)
        chosen[name] = Chosen(np.array(order_index, dtype=np.uint8), np.array(keys, dtype=np.int64), static_fraction)
    place_entries(store, chosen)
    return chosen


def open_behind_hbm(path: Path, hbm_entries: int, dram: str = "400KiB", io: str = "auto") -> Store:
    """Opens a placed store as beside a GPU that holds the first hbm_entries placed entries of each table,
    but without one."""
    choice = choose_io(io)
    image, placed = open_placement(path, None, direct=choice.mode == "uring")
    assert placed is not None
    in_hbm = dict.fromkeys(placed.placement.tables, hbm_entries)
    plan = divide_dram(image.tables, parse_bytes(dram, "dram"), placed.placement, in_hbm, touched=image.touched)
    return Store(Embedded(image, plan, choice, placed, None))


def random_keys(rng: np.random.Generator, num_tokens: int, orders: int = 3, distinct: int | None = None) -> np.ndarray:
    """Keys [N, O] over the whole range, with key 0, the largest key, sentinels and (if `distinct`) many repeats."""
    if distinct:
        pool = rng.integers(0, 2**63 - 1, (distinct, orders), dtype=np.int64)
        keys = pool[rng.integers(0, distinct, num_tokens)]
    else:
        keys = rng.integers(0, 2**63 - 1, (num_tokens, orders), dtype=np.int64)
    special = rng.random((num_tokens, orders))
    keys[special < 0.02] = 0
    keys[(special >= 0.02) & (special < 0.04)] = 2**63 - 1
    keys[(special >= 0.04) & (special < 0.1)] = -1
    return keys
