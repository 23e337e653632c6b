"""`tierstore bench overlap --against OTHER`: the model of `bench overlap` on two builds of tierstore, in turn.

Input: the other build; what `bench overlap` takes. Output: of each case the ratio of rates to the other build. Both
run this build's model, on one store and the same text, with a tenth of the tables in DRAM. Errors: as of `against`;
`ConfigError` without torch, or if the builds' rows differ.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tierstore.extras import missing
from tierstore.units import format_bytes

from .. import page_cache, real_text, stores
from ..overlap.command import DRAM_FRACTION, ENGRAM_LAYERS, PREFILLED, SHAPES, SIZE_BYTES, WARM_TOKENS
from ..pairs import Options, Result
from .builds import OTHER, THIS, Build, in_turn
from .ratios import compare

SIDE = Path(__file__).with_name("overlapping_side.py")
MODEL = Path(__file__).parents[1] / "overlap" / "model.py"
STEPS, PROMPTS = 60, 7  # of which a process takes the median


def run(folder: Path, options: Options, other: Path) -> Result:
    """Measures decode and prefill on the CPU. Needs the tables' size on disk (2 GiB). Blocks, minutes."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise missing("bench overlap", "torch", error) from error
    from ..overlap.sides import CHUNK_TOKENS, CONTEXT_TOKENS, HISTORY, PROMPT_TOKENS, SEQUENCES
    from ..overlap.tables import make_tables, place

    training, held_out = real_text.load_split()
    tables = make_tables(folder, options.size_bytes or SIZE_BYTES, ENGRAM_LAYERS, training.token_map)
    dram_bytes = options.dram_bytes or int(tables.num_bytes * DRAM_FRACTION)
    title = f"overlap, tables of {format_bytes(tables.num_bytes)}, {format_bytes(dram_bytes)} of DRAM"
    result = Result(f"{title}, this build beside {other}, {options.pairs} pairs of processes")
    try:
        place(tables, training, dram_bytes, None, SEQUENCES)
        with tempfile.TemporaryDirectory(dir=folder, prefix="tierstore-bench-") as name:
            work = Path(name).absolute()
            shutil.copy(MODEL, work / "overlap_model.py")
            np.save(work / "warm.npy", np.concatenate(training.documents)[-WARM_TOKENS:])
            np.save(work / "text.npy", np.concatenate(held_out.documents))
            builds = {THIS: Build.this(work), OTHER: Build.at(other, work)}
            ask: dict[str, Any] = {
                "bench": "overlap",
                "store": str(tables.path.absolute()),
                "dram_bytes": dram_bytes,
                "warm": str(work / "warm.npy"),
                "text": str(work / "text.npy"),
                "shapes": SHAPES,
                "prefilled": PREFILLED,
                "sequences": options.tokens or SEQUENCES,
                "context": CONTEXT_TOKENS,
                "prompt": PROMPT_TOKENS,
                "chunk": CHUNK_TOKENS,
                "history": HISTORY,
                "steps": STEPS,
                "prompts": PROMPTS,
            }

            def one(side: str) -> dict[str, Any]:
                page_cache.drop(tables.files)
                return builds[side].measure(ask, SIDE)

            compare(result, in_turn({side: partial(one, side) for side in builds}, options.pairs, tables.path))
    finally:
        stores.unplace(tables.path)
    result.facts["text"] = f"planned from {training.source}, run on {held_out.source}"
    return result
