"""Measures the plug-in's own time a step on the real SGLang: `python sglang_measure.py [--json FILE] [--folder DIR]`.

Two tables, on one layer each without the engine around it: (1) started and taken rows against `Table.rows` of the same
ids, all rows in memory; (2) an extend batch that is staged with a tenth of the rows in memory, while other work runs
that outlasts the reads: how long the layer then waits, against the time that the reads take by themselves.
Output: the figures, as a table and as JSON. DIR: where the store lies, by default the folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sglang_lab as lab  # before anything loads SGLang

TOKENS = (1, 64, 2048)
ROUNDS = {1: 3000, 64: 1500, 2048: 60}
STAGED_STEPS = 30
TARGET_RATIO, TARGET_EXTRA_US, TARGET_WAIT = 1.3, 50.0, 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--folder", help="where the store lies")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tierstore-sglang-", dir=options.folder) as name:
        folder = Path(name)
        lab.announce_entry_point(folder)
        _, store = lab.built(folder, "deepseek_v41", rows_per_head=40_000, layers=(1,), dim=256)
        with lab.environment(TIERSTORE_STORE=str(store)):
            from sglang.srt.plugins import load_plugins

            load_plugins()
        figures = {"own_time": own_time(str(store)), "staged": staged(str(store))}
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def own_time(store: str) -> list[dict[str, Any]]:
    """Started and taken rows against `Table.rows`, turn by turn, all rows in memory."""
    embed = layer(store, "1GiB")
    table, steps, results = embed.tiered.table, embed._now, []
    for tokens in TOKENS:
        ids = row_ids(table.spec, tokens, 1)[0]
        given, out = torch.from_numpy(ids), np.empty((*ids.shape, table.spec.row_bytes), dtype=np.uint8)

        def start_and_take(given: torch.Tensor = given) -> None:
            steps.start(given)
            steps.finish()

        assert np.array_equal(table.rows(ids, out), taken(steps, given))
        times = in_turns({"rows": lambda ids=ids, out=out: table.rows(ids, out), "plug_in": start_and_take,
                          "layer": lambda given=given: embed(given)}, ROUNDS[tokens])  # fmt: skip
        limit = TARGET_RATIO * times["rows"] + TARGET_EXTRA_US
        results.append(
            {
                "tokens": tokens,
                "table_rows_us": round(times["rows"], 1),
                "plug_in_us": round(times["plug_in"], 1),
                "with_dequantizing_on_the_cpu_us": round(times["layer"], 1),
                "target_us": round(limit, 1),
                "reached": times["plug_in"] <= limit,
            }
        )
    return results


def staged(store: str) -> dict[str, Any]:
    """Waits of a layer whose rows were staged, a tenth of them in memory, against the time of the reads themselves."""
    spec = layer(store, "1GiB").tiered.table.spec
    budget = spec.num_rows * spec.row_bytes // 10 + (16 << 20)  # staging and index beside a tenth of the rows
    embed = layer(store, str(budget))
    table, tokens = embed.tiered.table, 512
    # As many n-grams as the table has room for, drawn alike: a tenth of the memory gives a tenth of the hits.
    batches = row_ids(spec, tokens, 5 * STAGED_STEPS, spec.num_rows // spec.num_heads)
    for ids in batches[2 * STAGED_STEPS :]:
        table.rows(ids)  # what the recency cache would hold
    hits = embed.tiered.store.stats()["hits"]
    alone = [seconds(lambda ids=ids: table.rows(ids)) for ids in batches[:STAGED_STEPS]]
    read_s, device = statistics.median(alone), torch.device("cpu")
    waits, starts = [], []
    for ids in batches[STAGED_STEPS : 2 * STAGED_STEPS]:
        begun = time.perf_counter()
        step = embed.stage(torch.from_numpy(ids), device)
        starts.append(time.perf_counter() - begun)
        work_for(2 * read_s)
        before = sum(each.counters.wait_ns for each in embed._ahead)
        embed.dequant_staged(step, None, None, torch.Size(ids.shape))
        waits.append((sum(each.counters.wait_ns for each in embed._ahead) - before) / 1e9)
    hits = {tier: count - hits[tier] for tier, count in embed.tiered.store.stats()["hits"].items()}
    return {
        "tokens": tokens,
        "dram_bytes": budget,
        "table_bytes": spec.num_rows * spec.row_bytes,
        "share_in_dram": round(hits["dram"] / sum(hits.values()), 3),
        "read_alone_ms": round(read_s * 1e3, 2),
        "stage_ms": round(statistics.median(starts) * 1e3, 2),
        "other_work_ms": round(2 * read_s * 1e3, 2),
        "wait_ms": round(statistics.median(waits) * 1e3, 3),
        "wait_ms_largest": round(max(waits) * 1e3, 3),
        "share_of_read_time": round(sum(waits) / (read_s * STAGED_STEPS), 4),
        "target_share": TARGET_WAIT,
        "reached": sum(waits) <= TARGET_WAIT * read_s * STAGED_STEPS,
    }


def layer(store: str, dram: str) -> Any:
    """The replaced embedding of a store's only table, as the engine's layer builds it."""
    from sglang.srt.layers import engram

    import tierstore

    with tierstore.open(store, dram="16MiB") as opened:
        spec = opened["layers.1"].spec
    with lab.published(), lab.environment(TIERSTORE_STORE=store, TIERSTORE_DRAM=dram):
        return engram.EngramEmbedding(spec.num_rows, spec.dim, 1, (*spec.offsets, spec.num_rows))


def row_ids(spec: Any, tokens: int, batches: int, num_keys: int = 1 << 20) -> list[np.ndarray]:
    """Row ids of tokens as the hash gives them, of `num_keys` keys an order: int64 [tokens, columns] a batch."""
    rng = np.random.default_rng(tokens)
    keys = rng.integers(0, 1 << 62, (num_keys, len(spec.orders)))
    drawn = rng.integers(0, num_keys, (batches, tokens, len(spec.orders)))
    return [spec.row_ids(np.take_along_axis(keys, batch, axis=0)) for batch in drawn]


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median microseconds of each side, run turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + rounds // 10):
        for name, side in sides.items():
            spent = seconds(side)
            if number >= rounds // 10:
                times[name].append(spent * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}


def taken(steps: Any, ids: torch.Tensor) -> np.ndarray:
    steps.start(ids)
    return steps.finish().numpy()


def seconds(act: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def work_for(duration_s: float) -> None:
    """Computes on this thread, as layers before this one do."""
    end, values = time.perf_counter() + duration_s, np.ones((64, 64), dtype=np.float32)
    while time.perf_counter() < end:
        values @ values  # releases the interpreter's lock


if __name__ == "__main__":
    sys.exit(main())
