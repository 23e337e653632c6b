"""`tierstore bench overlap`: what a model loses when a tenth of its tables is cached and the rest lies on NVMe.

Input: two tables in V4.1's shape, real text, small transformers with two Engram layers. Output: tokens a second of
decode and prefill, beside the same model whose tables lie whole on its device; and the share of a lookup's time that is
hidden behind the model's own work. Logits of all sides are compared bit for bit before anything is timed. Errors:
`ConfigError` without torch.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tierstore.extras import missing
from tierstore.units import format_bytes

from .. import real_text, stores
from ..pairs import Options, Result

SIZE_BYTES = 2 << 30  # of both tables: 3.9 GiB as bfloat16, which a machine of 16 GiB holds beside the rest
DRAM_FRACTION = 1 / 10  # of the tables is the store's budget
ENGRAM_LAYERS = (1, 4)  # of 12 blocks; V4.1 has them at 1 and 14 of 43
# Blocks, hidden size, attention heads: GPT-2's two smallest, and one whose blocks have a quarter of the small one's
# weights: a lookup costs each the same, and finds less and less to hide behind.
SHAPES = {"medium model": (24, 1024, 16), "small model": (12, 768, 12), "tiny model": (6, 512, 8)}
PREFILLED = "small model"
WARM_TOKENS = 1 << 14  # looked up before anything is timed: they fill the recency cache


def run(folder: Path, options: Options) -> Result:
    """Measures decode and prefill. Needs the tables' size on disk (2 GiB) and four times as much memory.
    Blocks, minutes."""
    try:
        import torch
    except ImportError as error:
        raise missing("bench overlap", "torch", error) from error
    from .model import Model, Shape
    from .sides import SEQUENCES, Sides, hbm_for
    from .tables import make_tables, place

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Processors without bfloat16 units, as this project's own, take ten times as long with it.
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    training, held_out = real_text.load_split()
    tables = make_tables(folder, options.size_bytes or SIZE_BYTES, ENGRAM_LAYERS, training.token_map)
    dram_bytes = options.dram_bytes or int(tables.num_bytes * DRAM_FRACTION)
    title = (
        f"overlap, tables of {format_bytes(tables.num_bytes)}, {format_bytes(dram_bytes)} of DRAM, model on {device}"
    )
    result = Result(title)
    try:
        promised = place(tables, training, dram_bytes, hbm_for(device, dram_bytes), SEQUENCES)
        with torch.inference_mode(), ExitStack() as stack:
            sides = Sides(tables, dram_bytes, device, options, result, stack)
            sides.warm_up(np.concatenate(training.documents)[-WARM_TOKENS:])
            text = np.concatenate(held_out.documents)
            for name, shape in SHAPES.items():
                model = Model(Shape(*shape), tables.spec, dtype, device)
                result.facts[f"{name}: weights"] = f"{model.num_weights:,}, {dtype}"
                sides.decode(name, model, text)
                if name == PREFILLED:
                    sides.prefill(name, model, text)
    finally:
        stores.unplace(tables.path)
    result.facts["text"] = f"planned from {training.source}, run on {held_out.source}"
    result.facts["share of keys that hit, as planned"] = round(promised["all"], 3)
    result.facts["torch's threads"] = torch.get_num_threads()
    return result
