"""A page: as many whole rows as fit, zero padding, and a trailer that says which page it is and that it is whole.

Input: rows as planes, or pages read back. Output: sealed pages, or rows. Errors: `CorruptPageError` for a page that is
damaged, that lies where another belongs, or that comes from another table or another version of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Sequence

import numpy as np

from .. import kernels
from ..errors import CorruptPageError
from ..layout import PageShape
from ..spec import TableSpec

PAGE_VERSION = 1

FAULTS = {
    kernels.PAGE_BAD_CHECKSUM: "its checksum is wrong: it was damaged, or belongs to another table or checkpoint",
    kernels.PAGE_OTHER_VERSION: "its page format is of another version",
    kernels.PAGE_OTHER_NUMBER: "it has another page's number: it was moved",
}


def page_seed(spec: TableSpec, origin_digest: str) -> int:
    """Returns the CRC seed of a table's pages, so that a page of another table, hash or checkpoint never passes,
    nor one of another slice. spec: the public one."""
    table: list[object] = [spec.name, spec.num_rows, spec.row_bytes, spec.codec, spec.fingerprint, origin_digest]
    if spec.is_slice:
        table += [spec.row_start, spec.row_end]
    identity = json.dumps(table)
    return kernels.crc32c(hashlib.sha256(identity.encode()).digest())


def seal_pages(planes: Sequence[np.ndarray], shape: PageShape, page_start: int, seed: int, out: np.ndarray) -> None:
    """Turns planes, uint8 [rows, width_bytes] each, into pages numbered from `page_start` on,
    in `out` [P, page_bytes]."""
    kernels.seal_pages(planes, out, shape.rows_per_page, page_start, PAGE_VERSION, seed)


def page_faults(pages: np.ndarray, page_numbers: np.ndarray, seed: int) -> list[tuple[int, str]]:
    """Returns (page number, what is wrong) of those of `pages`, uint8 [P, page_bytes],
    that are not page_numbers [P]."""
    status = kernels.check_pages(pages, page_numbers, PAGE_VERSION, seed)
    return [(int(page_numbers[i]), FAULTS[int(status[i])]) for i in np.flatnonzero(status)]


def fault_text(where: str, status: int) -> str:
    """Returns the message of a page whose check gave `status`; `where` names page and table."""
    return f"{where}: {FAULTS[status]}; repair its shard: {repair_command()}"


def repair_command(
    store: str | os.PathLike[str] = "STORE", source: str | os.PathLike[str] | None = "CHECKPOINT"
) -> str:
    """Returns the command that rebuilds damaged shards from their checkpoint; source None:
    placements only need none."""
    command = f"tierstore verify {shlex.quote(os.fspath(store))} --repair"
    return command if source is None else f"{command} --source {shlex.quote(os.fspath(source))}"


def check_pages(pages: np.ndarray, page_numbers: np.ndarray, seed: int, table_name: str) -> None:
    """Raises `CorruptPageError`, naming the first, if any of `pages` is not the page that page_numbers says."""
    status = kernels.check_pages(pages, page_numbers, PAGE_VERSION, seed)
    bad = np.flatnonzero(status)
    if len(bad):
        where = (
            f"page {page_numbers[bad[0]]} of table {table_name} ({len(bad)} of {len(page_numbers)} pages read are bad)"
        )
        raise CorruptPageError(fault_text(where, int(status[bad[0]])))
