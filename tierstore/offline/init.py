"""init: a store from scratch, whose rows are drawn when training first touches them.

Input: table specs and an initializer. Output: a folder with a catalog, and nothing else. Errors: before anything is
made, a path that is another's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..causes import named
from ..codec import parse_codec
from ..errors import ConfigError
from ..formats.catalog import CATALOG_FILE, create_catalog, mark_ready
from ..formats.initial import Initializer, InitialLayout, lay_out_initial
from ..formats.page import page_seed
from ..spec import TableSpec
from .build import check_foreign, check_place
from .store_lock import locked_store

CODECS = ("fp32", "fp16", "bf16", "fp8_e4m3_e8m0x32")  # of rows that training can make of any values


def init_store(
    store_path: str | os.PathLike[str],
    specs: Sequence[TableSpec],
    *,
    seed: int,
    deviation: float,
    origin: dict[str, Any],
    attachments: dict[str, bytes] | None = None,
    allow_network_fs: bool = False,
    slice: tuple[int, int] | None = None,
) -> tuple[InitialLayout, ...]:
    """Makes a store whose rows are drawn from a normal distribution around 0. Blocks shortly.

    Args:
        store_path: A new or empty folder.
        specs: The tables; the first is number 0 of the seed, the next number 1, and so on.
        seed: Of all values.
        deviation: The standard deviation of all values.
        origin: Who the model is; its "digest" goes into the checksums of training records.
        attachments: The adapter's own records.
        slice: (I, N), only slice I of N of every table; rows have the values that they have in the whole store.
        allow_network_fs: Make it on a network file system that only this host uses.

    Raises:
        ConfigError: The path holds something or cannot be written; or a table's codec cannot be trained; or
            there is no such slice.
    """
    path = Path(store_path)
    tables = {}
    if slice is not None:
        specs = [spec.cut_slice(*slice) for spec in specs]
        origin = origin | {"slice": f"{slice[0]}/{slice[1]}"}
    for number, spec in enumerate(specs):
        if parse_codec(spec.codec).values not in ("fp32", "fp16", "bf16") and spec.codec not in CODECS:
            raise ConfigError(f"table {spec.name}: codec {spec.codec!r}, a table from scratch has {', '.join(CODECS)}")
        if spec.name in tables:
            raise ConfigError(f"two tables are called {spec.name}; a store needs different names")
        tables[spec.name] = lay_out_initial(
            spec, page_seed(spec, str(origin["digest"])), Initializer(seed, number, float(deviation))
        )
    if not tables:
        raise ConfigError(f"{path}: a store needs a table at least; config.json names none")
    try:
        check_place(path, allow_network_fs)
        with locked_store(path) as made:
            if (path / CATALOG_FILE).exists():
                raise ConfigError(f"{path} holds a store already; give another path")
            check_foreign(path)
            made.clear()
            create_catalog(path, tables, origin, attachments or {})
            mark_ready(path)
    except OSError as error:
        raise named(error, path, error.filename, writing=True) from error
    return tuple(tables.values())
