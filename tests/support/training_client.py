"""A process that trains a store to step 30, from its newest commit on, and may be killed at any moment.

Arguments: the store, and a file for the values of all rows at the end. Every step's rows and gradients depend on its
number alone; a commit is asked for at every third, and not waited for.
"""

import sys
from pathlib import Path

import numpy as np

import tierstore

NUM_STEPS = 30
COMMIT_EACH = 3


def main(store: str, out: str) -> None:
    with tierstore.open_training(store, tierstore.LazyAdam(lr=0.01), dram="4MiB", threads=1) as training:
        commits = training.commits
        step = commits[-1].step if commits else 0
        print("step", step, flush=True)
        while step < NUM_STEPS:
            step += 1
            rng = np.random.default_rng(step)
            for table in training.tables.values():
                row_ids = rng.integers(-1, table.spec.num_rows, 400)
                values = table.gather(row_ids)
                gradients = rng.standard_normal(values.shape, dtype=np.float32) + values
                table.apply(row_ids, gradients, lr=1 / (step + 3))
            if step % COMMIT_EACH == 0:
                training.commit(step, b"%d" % step)
        training.commit(step).wait()
        tables = training.tables
        rows = {name: table.gather(np.arange(table.spec.num_rows)) for name, table in tables.items()}
    Path(out).write_bytes(b"".join(values.tobytes() for values in rows.values()))
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
