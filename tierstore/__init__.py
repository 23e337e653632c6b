"""tierstore: a tiered memory store for embedding tables.

    store = tierstore.open("model.tier", dram="8GiB")
    rows = store["layers.1"].lookup(keys)        # int64 [N, orders] -> uint8 [N, orders * rows_per_key, row_bytes]

Hot rows live in DRAM, the long tail in checked pages on NVMe. Importing this loads neither torch nor triton.
"""

from __future__ import annotations

# Before all else: Ctrl-C while the command imports.
from .process import interrupts as _interrupts  # noqa: F401  # isort: skip

from .connecting import connect
from .errors import (
    BudgetError,
    ConfigError,
    CorruptPageError,
    DaemonError,
    FingerprintMismatchError,
    FormatError,
    StoreNotReadyError,
    TierStoreError,
)
from .offline.repair import verify
from .spec import TableSpec
from .store.embedded import open_store as open
from .store.store import Store, Ticket
from .store.table import Table
from .version import VERSION as __version__

__all__ = [
    "BudgetError",
    "ConfigError",
    "CorruptPageError",
    "DaemonError",
    "FingerprintMismatchError",
    "FormatError",
    "Store",
    "StoreNotReadyError",
    "Table",
    "TableSpec",
    "Ticket",
    "TierStoreError",
    "__version__",
    "connect",
    "open",
    "verify",
]
