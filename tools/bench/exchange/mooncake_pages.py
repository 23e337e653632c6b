"""Cold pages out of Mooncake over loopback TCP: ours beside a bare client of the same wheel.

Input: a store, whose shards are put into a Mooncake of our own: a master, and a process that gives memory. Output: the
cost of a page, of as many distinct pages at a time on both sides; bytes are compared before anything is timed. The
bare client asks for all pages in one call; ours also checks each page, and takes a row out of it. Errors:
`MissingPeerError` without the wheel, or if its servers do not start here.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import tierstore
from tierstore.errors import ConfigError
from tierstore.formats.catalog import CATALOG_FILE, read_catalog
from tierstore.offline.mooncake import put_shards
from tierstore.tiers.mooncake import stretch_bytes

from .. import stores
from ..pairs import SUBJECT, Result
from ..peers import servers
from ..peers.stores import SPARE_BYTES, imported

PAGES = 1024  # of a run
DRAM = "16MiB"
BARE = "bare client"
TARGETS = {BARE: 0.8}
HOLDER = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 16 << 20, "tcp", "", "127.0.0.1:" + sys.argv[1])
open(sys.argv[3], "w").write(str(code))
sys.stdin.read()
"""


def measure(folder: Path, path: Path, pairs: int, result: Result) -> None:
    """Adds the case. folder: for logs; path: of a store with shards. Blocks."""
    image = read_catalog(path)
    layout = image.tables[stores.TABLE]
    bare_folder = folder / "catalog-alone"
    bare_folder.mkdir()
    shutil.copy(path / CATALOG_FILE, bare_folder)
    with _mooncake(folder, layout.store_bytes) as port:
        put_shards(path, f"mooncake://127.0.0.1:{port}")
        with (
            tierstore.open(bare_folder, dram=DRAM, pages=f"mooncake://127.0.0.1:{port}") as store,
            BareClient(folder, port, image, min(PAGES, layout.num_pages)) as bare,
        ):
            generator, first = np.random.default_rng(), layout.public_spec.row_start
            block = stores.find_store(path).block

            def draw() -> np.ndarray:
                return generator.choice(layout.num_pages, bare.num_pages, replace=False)

            def rows(pages: np.ndarray) -> np.ndarray:
                return store[stores.TABLE].rows(first + pages * layout.rows_per_page)

            pages = draw()
            if not np.array_equal(rows(pages), block[(first + pages * layout.rows_per_page) % stores.BLOCK_ROWS]):
                raise ConfigError("pages of Mooncake gave other rows than were built; run tests/tiers/test_mooncake.py")
            bare.check(pages, path)
            sides = {SUBJECT: lambda: _seconds(rows, draw()), BARE: lambda: _seconds(bare.read, draw())}
            case = f"Mooncake, {bare.num_pages:,} cold pages over loopback TCP"
            result.compare(case, "page", bare.num_pages, sides, pairs, TARGETS)


def _seconds(read: Any, pages: np.ndarray) -> float:
    started = time.perf_counter()
    read(pages)
    return time.perf_counter() - started


class BareClient:
    """The wheel's own client in this process, and a buffer for pages, registered."""

    def __init__(self, folder: Path, port: int, image: Any, num_pages: int) -> None:
        self.num_pages = num_pages
        self._image, self._layout = image, image.tables[stores.TABLE]
        self._buffer = np.empty((num_pages, self._layout.page_bytes), dtype=np.uint8)
        self._store = imported("mooncake.store", servers.MOONCAKE).MooncakeDistributedStore()
        self._log = folder / "client.log"
        with servers.standard_error_in(self._log):
            code = self._store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", f"127.0.0.1:{port}")
            code = code or self._store.register_buffer(self._buffer.ctypes.data, self._buffer.nbytes)
        if code:
            raise servers.MissingPeerError(f"its client does not start over TCP (code {code})")

    def read(self, pages: np.ndarray) -> list[list[int]]:
        """Reads pages, int64 [num_pages], into the buffer, in their order; returns the bytes of each, by object."""
        layout, each = self._layout, stretch_bytes(self._layout)
        parts: dict[str, tuple[list[int], list[int]]] = {}
        for place, page in enumerate(pages.tolist()):
            shard, of_shard = divmod(page, layout.pages_per_shard)
            number, start = divmod(of_shard * layout.page_bytes, each)
            name = f"tierstore/{self._image.base_identity}/{stores.TABLE}/{shard}/{number}"
            to, starts = parts.setdefault(name, ([], []))
            to.append(place * layout.page_bytes)
            starts.append(start)
        all_to, all_starts = ([of[side] for of in parts.values()] for side in (0, 1))
        sizes = [[layout.page_bytes] * len(to) for to in all_to]
        (found,) = self._store.get_into_ranges(
            [self._buffer.ctypes.data], [list(parts)], [all_to], [all_starts], [sizes]
        )
        return list(found)

    def check(self, pages: np.ndarray, path: Path) -> None:
        """Raises `ConfigError` unless pages come as the store's files have them."""
        layout = self._layout
        self._buffer[:] = 1
        got = self.read(pages)
        for place, page in enumerate(pages.tolist()):
            shard, of_shard = divmod(page, layout.pages_per_shard)
            with (path / self._image.shards[stores.TABLE][shard].file).open("rb") as file:
                file.seek(of_shard * layout.page_bytes)
                if file.read(layout.page_bytes) != self._buffer[place].tobytes():
                    raise ConfigError(f"the bare client read page {page} wrong (bytes got: {got[0][:1]})")

    def __enter__(self) -> BareClient:
        return self

    def __exit__(self, *_: object) -> None:
        with servers.standard_error_in(self._log):
            self._store.unregister_buffer(self._buffer.ctypes.data)
            self._store.close()


@contextlib.contextmanager
def _mooncake(folder: Path, num_bytes: int) -> Iterator[int]:
    """Yields the port of a master of our own, with a process that gives memory for `num_bytes` of shards."""
    package = imported("mooncake", servers.MOONCAKE)
    port, metrics = servers.free_ports(2)
    master = str(Path(package.__file__).parent / "mooncake_master")
    options = [f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics}"]
    segment_bytes = -(-(2 * num_bytes + SPARE_BYTES) >> 24) << 24  # whole pieces of 16 MiB, as it wants them
    code_file, quiet = folder / "holder.code", subprocess.DEVNULL
    with contextlib.ExitStack() as stack:

        def start(command: list[str]) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, cwd=folder)
            stack.callback(servers.end_server, process)
            return process

        process = start([master, *options])
        servers.await_ready(lambda: servers.listens(port), process, "mooncake_master")
        holder = start([sys.executable, "-c", HOLDER, str(port), str(segment_bytes), str(code_file)])
        servers.await_ready(lambda: code_file.exists() and code_file.read_text() != "", holder, "Mooncake's client")
        if code_file.read_text() != "0":
            raise servers.MissingPeerError(f"its client does not start over TCP (code {code_file.read_text()})")
        yield port
