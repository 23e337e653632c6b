"""tierstore: a tiered memory store for embedding tables.

    store = tierstore.open("model.tier", dram="8GiB")
    rows = store["layers.1"].lookup(keys)        # int64 [N, orders] -> uint8 [N, orders * rows_per_key, row_bytes]

Hot rows live in HBM and DRAM, the long tail in checked pages on NVMe. Importing this loads neither torch nor triton.
"""

from __future__ import annotations

# Before all else: Ctrl-C while the command imports.
from .process import interrupts as _interrupts  # noqa: F401  # isort: skip

import importlib
from typing import TYPE_CHECKING, Any

from .connecting import connect
from .errors import (
    BudgetError,
    ConfigError,
    CorruptPageError,
    DaemonError,
    FingerprintMismatchError,
    FormatError,
    RankError,
    StoreNotReadyError,
    TierStoreError,
)
from .spec import TableSpec
from .store.embedded import open_store as open
from .store.store import Store
from .store.table import Table
from .store.ticket import Ticket
from .version import VERSION as __version__

if TYPE_CHECKING:
    from .offline.build import build_store
    from .offline.place import place
    from .offline.plan import Plan, plan
    from .offline.profile import Profile, merge_profiles, open_profile, profile
    from .offline.repair import verify
    from .training.opening import open_training
    from .training.optimizers import SGD, DenseAdam, LazyAdam, RowWiseAdagrad
    from .training.reslice import reslice
    from .training.training import Training

__all__ = [
    "SGD",
    "BudgetError",
    "ConfigError",
    "CorruptPageError",
    "DaemonError",
    "DenseAdam",
    "FingerprintMismatchError",
    "FormatError",
    "LazyAdam",
    "Plan",
    "Profile",
    "RankError",
    "RowWiseAdagrad",
    "Store",
    "StoreNotReadyError",
    "Table",
    "TableSpec",
    "Ticket",
    "TierStoreError",
    "Training",
    "__version__",
    "build_store",
    "connect",
    "merge_profiles",
    "open",
    "open_profile",
    "open_training",
    "place",
    "plan",
    "profile",
    "reslice",
    "verify",
]

# The jobs behind the commands, and training, are imported when they are first used: lookups do without.
_JOBS = {
    "DenseAdam": "training.optimizers",
    "LazyAdam": "training.optimizers",
    "Plan": "offline.plan",
    "Profile": "offline.profile",
    "RowWiseAdagrad": "training.optimizers",
    "SGD": "training.optimizers",
    "Training": "training.training",
    "build_store": "offline.build",
    "merge_profiles": "offline.profile",
    "open_profile": "offline.profile",
    "open_training": "training.opening",
    "place": "offline.place",
    "plan": "offline.plan",
    "profile": "offline.profile",
    "reslice": "training.reslice",
    "verify": "offline.repair",
}


def __getattr__(name: str) -> Any:
    if name not in _JOBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    job = getattr(importlib.import_module(f".{_JOBS[name]}", __name__), name)
    globals()[name] = job
    return job


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
