"""Opens a store for training: checks, the lock of the one writer, what the chosen commit says, and the memory.

Input: a built store, an optimizer, a budget. Output: a `Training`. Errors: `ConfigError` (another process trains the
store; an optimizer that the commit was not made with; a codec that cannot be trained), `BudgetError`, and what opening
a store raises.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..formats.catalog import CatalogImage, read_catalog
from ..store.embedded import check_available
from ..store.options import check_options, check_threads
from ..tiers.nvme import default_threads
from ..units import parse_bytes
from .base import base_bytes_of, check_trainable, open_base
from .commits import Commit, TrainingRecords, change_training, create_training, go_back, read_training
from .health import Health
from .opened import OpenedTraining, layout_of, open_files, plan_memory
from .optimizers import Optimizer, from_dict
from .owned import Owned
from .training import Training
from .writer_lock import WriterLock


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
    check_options(io, None, None)
    num_threads = check_threads(threads) or default_threads()
    budget_bytes = parse_bytes(dram, "dram")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer: {optimizer!r} is no optimizer; give tierstore.RowWiseAdagrad(lr=0.01), for one")
    store = Path(path).absolute()
    image = read_catalog(store, may_be_initial=True)
    for table in image.tables.values():
        check_trainable(table.spec)
    owned = Owned()
    try:
        lock = WriterLock(store)
        owned.add(lock.close)
        lock.take()
        records = read_training(store)
        chosen, commit = _chosen(store, image, records, optimizer, at)
        files = open_files(store, image, chosen, commit, io, budget_bytes, owned)
        base_bytes = base_bytes_of(image, budget_bytes)
        plan = plan_memory(files, image, budget_bytes, base_bytes)
        check_available(plan.num_bytes)
        base = open_base(image, {name: of.layout for name, of in files.items()}, chosen, base_bytes, io, owned)
        health = Health(f"the training of {path}")
        opened = OpenedTraining(image, base, files, plan, chosen, num_threads, health)
        owned.add(opened.stop)
        opened.start(_noted(store, image, records, chosen, at).last_run, commit)
        return Training(opened, owned, health, commit)
    except BaseException:
        owned.close()
        raise


def _chosen(
    store: Path, image: CatalogImage, records: TrainingRecords | None, optimizer: Optimizer | None, at: int | None
) -> tuple[Optimizer, Commit | None]:
    """Returns the optimizer to train with, and the commit to go on from. Changes nothing."""
    if records is None:
        if at:
            raise ConfigError(f"at: {store} has no commit {at}; it was never trained")
        if optimizer is None:
            raise ConfigError(
                f"{store} was never trained: give an optimizer, such as tierstore.RowWiseAdagrad(lr=0.01)"
            )
        return optimizer, None
    if records.training.get("build") != image.base_identity:
        raise ConfigError(
            f"{store} was built anew since its training began: its commits are of other rows; build into a new folder"
        )
    number = records.current if at is None else at
    commit = records.commit(number) if number else None
    # All commits that stay have records of one layout: others may be pinned.
    kept = commit or next((records.commits[each] for each in sorted(records.pins)), None)
    made_with = from_dict(dict(records.training["optimizer"] if kept is None else kept.optimizer["optimizer"]))
    if optimizer is None:
        return made_with, commit
    if kept is not None and _rule_of(optimizer) != _rule_of(made_with):
        unpin = f"start anew: 'tierstore commits {store} --unpin {kept.number}'"
        anew = "start anew with at=0, which drops all commits" if commit else unpin
        raise ConfigError(
            f"optimizer: {optimizer!r}, but commit {kept.number} of {store} was made with {made_with!r}; give that "
            f"(only lr may be another), or {anew}"
        )
    return optimizer, commit


def _rule_of(optimizer: Optimizer) -> dict[str, Any]:
    """Returns all of it but the rate, which may change at any commit."""
    return {name: value for name, value in optimizer.to_dict().items() if name != "lr"}


def _noted(
    store: Path, image: CatalogImage, records: TrainingRecords | None, optimizer: Optimizer, at: int | None
) -> TrainingRecords:
    """Notes in the catalog what was chosen; later commits are dropped. Only once nothing can refuse it any more."""
    layouts = {name: layout_of(table, optimizer).to_dict() for name, table in image.tables.items()}
    training = {"build": image.base_identity, "optimizer": optimizer.to_dict(), "layouts": layouts}
    if records is None:
        return create_training(store, training)
    if at is not None:
        records = go_back(store, at)
    noted = from_dict(dict(records.training["optimizer"]))
    if records.training.get("layouts") != layouts or _rule_of(noted) != _rule_of(optimizer):
        if records.current is None:
            records = go_back(store, 0)  # commits of the other layout that were pinned once
        change_training(store, training)
    return records
