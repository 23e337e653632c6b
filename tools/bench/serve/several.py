"""One store over two daemons that hold a slice each, beside one daemon with the whole table; all by gRPC.

Input: a folder, in which the table and its slices are made once. Output: ratios of interleaved rounds: rates of batches
latencies of one token, processor time of all processes together, and bytes on the wire with a static set of the
client's own that answers half of the accesses. Rows are checked before anything is timed. Errors: those of a build.

    python -m tierstore.tools.bench.serve.several --folder /mnt/nvme
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import psutil

import tierstore
from tierstore.offline.build import build_store
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen

from .. import stores
from ..pairs import interleave
from ..stores import MadeStore
from .remote import serving_store

SIZE_BYTES = 256 << 20
TOKENS, BATCHES, ONES, ROUNDS = 2048, 4, 100, 9
HOT_KEYS = 4096  # of each order; half of the accesses are to them
NUM_SLICES = 2
ONE, SEVERAL, OWN_SET = "one daemon", "two daemons", "two daemons and a set"
Clock = Callable[[], float]


def measure(
    folder: Path, *, tokens: int = TOKENS, rounds: int = ROUNDS, size_bytes: int = SIZE_BYTES
) -> dict[str, float]:
    """Returns medians over rounds of ratios to one daemon with the whole table. Blocks, half a minute.

    "rate", "rate_of_set": of batches. "one_token": of latencies. "processor", "processor_of_set": of seconds of
    processor time of all processes for the same batches. "wire_of_set": of bytes of rows, to those without a set.
    """
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES)
    hot = stores.fresh_keys(np.random.default_rng(7), HOT_KEYS)
    slices = [_make_slice(made, index, hot) for index in range(NUM_SLICES)]
    with contextlib.ExitStack() as stack:
        dram_bytes = made.spec.table_bytes * 5 // 4 + (64 << 20)
        one = stack.enter_context(serving_store(made.path, dram_bytes))
        urls = [stack.enter_context(serving_store(path, dram_bytes // NUM_SLICES)) for path in slices]
        connected = {ONE: tierstore.connect(one), SEVERAL: tierstore.connect(urls)}
        connected[OWN_SET] = tierstore.connect(urls, dram=4 * HOT_KEYS * (stores.ENTRY_BYTES + 64))
        for store in connected.values():
            stack.enter_context(store)
        keys = _half_hot(hot, 16 * tokens)
        for store in connected.values():
            made.check(keys[:tokens], store[stores.TABLE].lookup(keys[:tokens]))
        return _compared(connected, keys, tokens, rounds)


def _compared(connected: dict[str, tierstore.Store], keys: np.ndarray, tokens: int, rounds: int) -> dict[str, float]:
    out = stores.rows_buffer(tokens)
    figures: dict[str, dict[str, list[float]]] = {
        "seconds": interleave(_sides(connected, keys, out, tokens, BATCHES, time.perf_counter), rounds, 1),
        "processor": interleave(_sides(connected, keys, out, tokens, BATCHES, _processor_seconds), rounds, 1),
        "one_token": interleave(_sides(connected, keys, out, 1, ONES, time.perf_counter), rounds, 1),
    }
    wire = {name: _bytes_of(store, keys[:tokens], out) for name, store in connected.items()}
    return {
        "rate": _ratio(figures["seconds"], ONE, SEVERAL),
        "rate_of_set": _ratio(figures["seconds"], ONE, OWN_SET),
        "processor": _ratio(figures["processor"], SEVERAL, ONE),
        "processor_of_set": _ratio(figures["processor"], OWN_SET, ONE),
        "one_token": _ratio(figures["one_token"], SEVERAL, ONE),
        "wire_of_set": wire[OWN_SET] / wire[SEVERAL],
        "one_token_us": statistics.median(figures["one_token"][ONE]) * 1e6,
        "one_daemon_mb_per_s": tokens * stores.ROWS_PER_TOKEN * stores.ROW_BYTES / 1e6
        / statistics.median(figures["seconds"][ONE]),
    }  # fmt: skip


def _ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def _sides(
    connected: dict[str, tierstore.Store], keys: np.ndarray, out: np.ndarray, tokens: int, times: int, clock: Clock
) -> dict[str, Callable[[], float]]:
    """Returns what times a round of each side, by a clock; each returns seconds a lookup."""

    def side(store: tierstore.Store) -> Callable[[], float]:
        table, starts = store[stores.TABLE], range(0, (len(keys) // tokens) * tokens, tokens)

        def run() -> float:
            started = clock()
            for number in range(times):
                start = starts[number % len(starts)]
                table.lookup(keys[start : start + tokens], out[:tokens])
            return (clock() - started) / times

        return run

    return {name: side(store) for name, store in connected.items()}


def _processor_seconds() -> float:
    """Returns seconds of processor time of this process and its servers so far."""
    return sum(sum(each.cpu_times()[:2]) for each in [psutil.Process(), *psutil.Process().children()])


def _bytes_of(store: tierstore.Store, keys: np.ndarray, out: np.ndarray) -> int:
    before = store.stats()["bytes_read"]
    store[stores.TABLE].lookup(keys, out)
    return int(store.stats()["bytes_read"] - before)


def _half_hot(hot: np.ndarray, num_tokens: int) -> np.ndarray:
    """Returns keys [N, O] of which half are hot ones."""
    generator = np.random.default_rng(3)
    keys = stores.fresh_keys(generator, num_tokens)
    drawn = np.stack([column[generator.integers(0, len(hot), num_tokens)] for column in hot.T], axis=1)
    return np.where(generator.random(keys.shape) < 0.5, drawn, keys)


def _make_slice(made: MadeStore, index: int, hot: np.ndarray) -> Path:
    """Makes, or finds, a slice's store beside the whole one, with the hot keys placed; returns its path."""
    path = made.path.with_name(f"{made.path.name}-slice-{index}")
    source = stores.block_source(made.spec, made.path.parent / stores.BLOCK_FILE)
    origin = {"digest": made.spec.fingerprint, "made_by": "tierstore bench", "files": []}
    build_store(path, [source], origin=origin, attachments={}, slice=(index, NUM_SLICES))
    spec = made.spec.cut_slice(index, NUM_SLICES)
    columns = spec.columns(made.spec.orders)
    order_index = np.tile(np.arange(len(columns), dtype=np.uint8), len(hot))
    stores.unplace(path)
    place_entries(path, {stores.TABLE: Chosen(order_index, hot[:, columns].reshape(-1), 0.5)})
    return path


@click.command("several")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Where the stores are made.")
@click.option("--tokens", type=click.IntRange(min=2), default=TOKENS, show_default=True, help="Of a batch.")
@click.option("--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True)
def main(folder: Path, tokens: int, rounds: int) -> None:
    """Measure one store over two daemons beside one daemon with the whole table."""
    click.echo(json.dumps(measure(folder, tokens=tokens, rounds=rounds), indent=2))


if __name__ == "__main__":
    main()
