"""Opens a store for training: checks, the lock of the one writer, what the chosen commit says, and the memory.

Input: a built store, an optimizer, a budget. Output: a `Training`. Errors: `ConfigError` (another process trains the
store; an optimizer that the commit was not made with; a codec that cannot be trained), `BudgetError`, and what opening
a store raises.
"""

from __future__ import annotations

import os

from .optimizers import Optimizer
from .training import Training


def open_training(
    path: str | os.PathLike[str],
    optimizer: Optimizer | None = None,
    dram: int | str = "1GiB",
    at: int | None = None,
    io: str = "auto",
    threads: int | None = None,
) -> Training:
    """Opens a built store for training, at its newest commit; also `tierstore.open_training`.

    The store's own rows never change, and readers of the store are not disturbed. One process at a time trains a store.

    Args:
        path: The store's folder.
        optimizer: Updates the rows: `SGD`, `RowWiseAdagrad`, `LazyAdam` or `DenseAdam`. None: the one that the commit
            was made with. Another learning rate than the commit's is taken; another rule or state is refused.
        dram: Bytes of memory that it may take, all included ("16GiB"): cached records, indexes, staging. From "4MiB"
            up.
        at: The commit to go on from, by its number; later ones are dropped. 0: the store as it was built, all commits
            dropped. None: the newest.
        io: How rows are read, as of `tierstore.open`.
        threads: That gather and update the rows of one table, the caller's included; None: as many as this process
            may use cores, at most 16. The bits do not depend on it.

    Blocks while the indexes of the commit's runs are read, about a microsecond for each row that was ever touched.

    Raises:
        ConfigError: Another process trains this store, the optimizer does not fit the commit, `at` is no commit that is
            kept, an option.
        BudgetError: dram is too small, or more than the machine has.
        StoreNotReadyError, FormatError: As `tierstore.open`.
    """
    raise NotImplementedError
