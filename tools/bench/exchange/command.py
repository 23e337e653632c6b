"""`tierstore bench exchange`: training and lock-step lookups of two ranks, one store over two daemons,
and pages out of Mooncake.

Input: slices of a table in V4.1's shape, which are made for the run and removed in the end. Output: by the wall, which
neighbours disturb, with targets; and of the processors of all ranks together, without. Ranks talk over gloo on the
loopback, so this shows what the exchange costs, and not what a network does.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tierstore.extras import install_command, missing
from tierstore.units import format_bytes

from .. import stores
from ..pairs import Options, Result
from ..peers.stores import MissingPeerError
from . import lookups, mooncake_pages, rank_group, servers, training

SIZE_BYTES = 256 << 20  # of the trained table's float32 values; the table that is looked up has a quarter of its bytes


def run(folder: Path, options: Options) -> Result:
    """Measures exchanges. Needs some 1.5 GiB on the disk and 2 GiB of memory at the defaults. Blocks for minutes.

    Raises `ConfigError` without torch.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise missing("tierstore bench exchange", "torch", error) from error
    num_rows = (options.size_bytes or SIZE_BYTES) // (4 * stores.DIM)
    result = Result(f"{rank_group.SIZE} ranks, a table of {num_rows:,} rows of {stores.ROW_BYTES} bytes")
    result.facts["processors of this process, and load before"] = (
        f"{len(os.sched_getaffinity(0))}, {os.getloadavg()[0]:.1f}"
    )
    result.facts["trained values"] = format_bytes(num_rows * 4 * stores.DIM)
    with tempfile.TemporaryDirectory(dir=folder, prefix="tierstore-bench-") as name:
        paths = [
            [stores.make_store(Path(name) / side, num_rows, part=(index, rank_group.SIZE)).path
             for index in range(rank_group.SIZE)]
            for side in ("ours", "other")
        ]  # fmt: skip
        lookups.measure(paths[0], options.tokens, options.pairs, options.threads, result)
        training.measure(paths, options.tokens, options.pairs, options.threads, result)
        try:
            servers.measure(Path(name), options.tokens, options.pairs, num_rows, result)
        except ModuleNotFoundError as error:
            result.skipped["two daemons"] = f"{error}: {install_command('remote')}"
        try:
            mooncake_pages.measure(Path(name), paths[0][0], options.pairs, result)
        except MissingPeerError as error:
            result.skipped["Mooncake"] = str(error)
    return result
