"""A process that trains under a DRAM budget and prints the most memory that it took for that, in bytes.

Arguments: the store, the budget. Touches every row several times, so that records are spilled, indexes grow, and
commits are written meanwhile.
"""

import sys
from pathlib import Path

import numpy as np

import tierstore


def resident_bytes(line: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(row.split()[1] for row in text.splitlines() if row.startswith(line)))


def main(store: str, dram: str) -> None:
    optimizer = tierstore.LazyAdam(lr=0.01)
    with tierstore.open_training(store, optimizer, dram="64MiB", threads=1) as training:  # loads what is loaded once
        names = list(training.tables)
    rng = np.random.default_rng(0)
    gradients = np.ones((2000, 128), dtype=np.float32)
    out = np.zeros((2000, 128), dtype=np.float32)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    with tierstore.open_training(store, dram=dram, threads=1) as training:
        for step in range(12):
            for name in names:
                row_ids = rng.integers(0, training[name].spec.num_rows, 2000)
                training.prefetch({name: rng.integers(0, training[name].spec.num_rows, 2000)})
                training[name].gather(row_ids, out)
                training[name].apply(row_ids, gradients)
            if step % 5 == 4:
                training.commit(step)
        stats = training.stats()
        assert stats["rows_spilled"] > 0
        used = sum(stats["memory"][part] for part in ("base_bytes", "cache_bytes", "index_bytes"))
        assert used <= stats["memory"]["budget_bytes"], stats["memory"]
    print(resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
