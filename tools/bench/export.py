"""`tierstore bench export`: how near an export comes to merely copying the checkpoint.

Input: a size. Output: pairs of copies (cp, then a sync of every file) and exports of the same checkpoint: as it was
built, from the page cache and from the disk, and with the rows of a commit in it. An export also digests every file.
Errors: those of a build and an export.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

import tierstore
from engram_adapter import build_checkpoint, export_checkpoint
from tierstore.units import format_bytes

from ..synth import write_checkpoint
from .build import check_room, copy, set_cache
from .pairs import SUBJECT, Options, Result

SIZE_BYTES = 2 << 30
COPY = "cp and sync"
LEAST = 0.5
TOUCHED_FRACTIONS = (0.01, 0.25)  # of all rows, in the commit: a short fine-tuning, and 16 M tokens of V4.1
STEP_ROWS = 1 << 15
DRAM = "256MiB"


def run(folder: Path, options: Options) -> Result:
    """Measures pairs in a temporary folder under `folder`, over 2 GiB unless another size is given.

    Needs twice the size, and half of it again for records and their sorting. Raises `BudgetError` where the disk has
    less.
    """
    size_bytes = options.size_bytes or SIZE_BYTES
    check_room(folder, 2 * size_bytes)
    result = Result(f"export of {format_bytes(size_bytes)} of tables")
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-export-") as name:
        root = Path(name)
        write_checkpoint(root / "model", "deepseek_v41", table_bytes=size_bytes, file_bytes=max(size_bytes // 4, 1))
        build_checkpoint(root / "model", root / "store")
        files = sorted((root / "model").glob("*.safetensors"))
        num_mib = sum(file.stat().st_size for file in files) / 2**20
        for state in ("warm", "cold"):
            _pair(result, f"as built, {state} files", root, files, num_mib, state, options.pairs)
        for fraction in TOUCHED_FRACTIONS:
            _commit(root / "store", fraction)
            _pair(result, f"a commit of {100 * fraction:g} % of the rows", root, files, num_mib, "warm", options.pairs)
    return result


def _pair(result: Result, case: str, root: Path, files: list[Path], num_mib: float, state: str, rounds: int) -> None:
    def copied() -> float:
        set_cache(files, state)
        return copy(files, root / "copy")

    def exported() -> float:
        set_cache(files, state)
        started = time.monotonic()
        export_checkpoint(root / "store", root / "out", source=root / "model", dram=DRAM)
        seconds = time.monotonic() - started
        shutil.rmtree(root / "out")
        return seconds

    sides = {SUBJECT: exported, COPY: copied}
    result.compare(case, "MiB", num_mib, sides, rounds, {COPY: LEAST}, warm_up_rounds=0)


def _commit(store: Path, fraction: float) -> None:
    """Trains a fraction of the rows of every table, drawn at random, and commits; from the rows as they were built."""
    rng = np.random.default_rng(0)
    with tierstore.open_training(store, tierstore.RowWiseAdagrad(lr=0.01), dram=DRAM, at=0) as training:
        for table in training.tables.values():
            row_ids = rng.permutation(table.spec.num_rows)[: max(1, int(fraction * table.spec.num_rows))]
            for start in range(0, len(row_ids), STEP_ROWS):
                part = row_ids[start : start + STEP_ROWS]
                table.apply(part, rng.standard_normal((len(part), table.spec.dim), dtype=np.float32))
        training.commit(1).wait()
