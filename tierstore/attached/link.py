"""A link: one version of a daemon's store, as a client has it mapped and open.

Input: the daemon's message with its descriptors, and the store's own files. Output: an engine that copies from the
daemon's memory, which it may only read, and reads from the shards what is not there. Errors: `DaemonError` for messages
that contradict their blocks, and for a store that is not the one that the daemon opened.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np

from .. import kernels
from ..decisions.budget import LINE_BYTES, STAGING_FRACTION, plan_staging
from ..errors import ConfigError, DaemonError, FormatError, TierStoreError
from ..formats.catalog import CatalogImage
from ..ipc.mapped import Blocks, OpenVersion, StaticParts, recency_part, static_parts, table_memories
from ..ipc.messages import Layout
from ..store.embedded import open_placement
from ..tiers.native import NativeEngine, SharedEpochs
from ..tiers.nvme import choose_io
from ..tiers.placed import PlacementFile
from ..tiers.shared import map_block

logger = logging.getLogger("tierstore")

_BLOCKS = ("control", "static", "recency", "client", "resident")  # as their descriptors come
_NOTHING = np.empty(0, dtype=np.uint8)


class Link:
    """A version as this process has it mapped: the engine over it, and the connection by which it came.

    is_exported: whether the daemon exports its static block, writable, to this process's GPU. static_id: equal for
    links whose static block is the same memory.
    """

    def __init__(
        self,
        layout: Layout,
        fds: Sequence[int],
        io: str,
        threads: int | None,
        readers: int | None,
        staging_bytes: int,
        *,
        writable_static: bool = False,
    ) -> None:
        """Maps and opens all; the descriptors stay the caller's. Raises what `connect` raises.

        writable_static: whether a static block with a writable export may be written here, which drivers need that
        lock it, until `protect_static`.
        """
        self.version, self._tag, self.is_exported = layout.version, layout.tag, layout.is_exported
        self._shares, self._bad_pages = layout.tables, layout.bad_pages
        self.memory = {"budget_bytes": layout.budget_bytes, "dram_bytes": layout.dram_bytes}
        path, identity, sizes = layout.store, layout.identity, layout.sizes
        if len(fds) != len(sizes):
            raise DaemonError(
                f"the daemon sent {len(fds)} descriptors of {len(sizes)} blocks: is it of another release?"
            )
        writable = {"client", "static"} if self.is_exported and writable_static else {"client"}
        blocks = {
            name: map_block(fd, size, f"the {name} block", writable=name in writable)
            for name, fd, size in zip(_BLOCKS, fds, sizes, strict=False)
        }
        found = os.fstat(fds[_BLOCKS.index("static")])
        self.static_id = found.st_dev, found.st_ino
        self._choice = choose_io(io, threads, readers)
        direct = self._choice.mode == "uring"
        self.path, self.identity = path, identity
        with _reading(path):
            image, placed = _open(path, layout.placement, layout.published, direct=direct)
            self.opened = OpenVersion(image, placed, direct=direct)
        try:
            if image.identity != identity:
                raise DaemonError(
                    f"{path} is not the store that the daemon opened (digest {image.identity[:12]}, and there "
                    f"{identity[:12]}): it was built anew, or is another here; restart the daemon, "
                    "or mount the same"
                )
            if image.folded != layout.folded:
                raise DaemonError(
                    f"{path}: versions up to {image.folded} were folded into one after the daemon opened it; have it "
                    f"open the store again: tierstore swap SOCKET {path}"
                )
            if list(self._shares) != list(image.tables):
                raise DaemonError(f"{path}: its tables are not those that the daemon serves; restart the daemon")
            self.attachments = image.attachments
            self.specs = [layout.public_spec for layout in image.tables.values()]
            self._blocks = blocks
            self._what = f"the store {path} (of a daemon)"
            staged = self.opened.placed.placement.tables if self.opened.placed else {}
            self._staging = plan_staging(
                image.tables,
                staged,
                int(staging_bytes / STAGING_FRACTION),
                staging_bytes,
                self._choice.num_readers,
                image.touched,
            )
            self.engine = self._make_engine(
                SharedEpochs(blocks["control"], self.version, blocks["client"], reports=True)
            )
        except BaseException:
            self.opened.close()
            raise

    def static_parts(self, name: str) -> StaticParts | None:
        """Returns where a table's static set lies; None for a table that is in memory whole."""
        share, layout = self._shares[name], self.opened.image.tables[name]
        return None if share.resident else static_parts(self._blocks["static"], layout, share)

    def epoch_pin(self) -> kernels.EpochPin:
        """Returns a new pin, `kernels.EpochPin`, on epochs of this version."""
        return kernels.EpochPin(self._blocks["control"], self.version, self._blocks["client"])

    def protect_static(self) -> None:
        """Has the kernel refuse writes to the static block, as of all others of the daemon."""
        if self._blocks["static"].flags.writeable:
            kernels.protect(self._blocks["static"])

    def _make_engine(self, shared: SharedEpochs) -> NativeEngine:
        tables, blocks = self.opened.image.tables, self._blocks
        mapped = Blocks(blocks["control"], blocks["static"], blocks["recency"], blocks.get("resident", _NOTHING))
        caches = {
            name: kernels.EntryCache(
                recency_part(mapped.recency, tables[name], share),
                num_sets=share.num_sets, entry_bytes=tables[name].spec.entry_bytes, is_new=False,
            )
            for name, share in self._shares.items() if not share.resident
        }  # fmt: skip
        memories = table_memories(self.opened, self._shares, mapped, self._tag, caches, self._bad_pages)
        engine = NativeEngine(
            self._what, self.opened.files, memories, self._choice, self._staging, self.opened.placed, shared
        )
        for index, (name, share) in enumerate(self._shares.items()):
            if share.resident:
                engine.set_resident(index, self._bad_pages.get(name, {}))
        return engine

    def alone(self) -> Link:
        """Returns a link without a daemon, over the same files and memory: for a forked child, while it finds none.

        Its lookups are counted in a block that nobody looks at. They are right all the same, since each sees afterwards
        whether its epoch is still readable: whoever changes it just does not wait.
        """
        link = copy.copy(self)
        memory = np.zeros(kernels.CLIENT_BLOCK_BYTES + LINE_BYTES, dtype=np.uint8)
        start = -memory.ctypes.data % LINE_BYTES
        block = memory[start : start + kernels.CLIENT_BLOCK_BYTES]
        kernels.init_client_block(block)
        link.engine = self._make_engine(SharedEpochs(self._blocks["control"], self.version, block, reports=False))
        return link

    def close(self, timeout_s: float) -> bool:
        """Waits for the lookups of its engine, then unmaps and closes; returns whether they ended in time."""
        ended = self.engine.close(timeout_s)
        if ended:
            self.opened.close()
        return ended


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Says what an attached process of another user needs, if it may not read the store's files."""
    try:
        yield
    except (TierStoreError, OSError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, PermissionError):
            cause = cause.__cause__
        if cause is None and _can_be_reached(path):
            raise
        at = getattr(cause, "filename", None) or path
        raise ConfigError(
            f"{path}: the daemon lets user {os.geteuid()} attach, but that user may not read {os.fsdecode(at)}: an "
            "attached process reads by itself what is not in the daemon's memory; give it read access to the store's "
            f"files and folders: setfacl -R -m u:{os.geteuid()}:rX {path}, "
            "or look up by gRPC (tierstore serve --listen)"
        ) from error


def _can_be_reached(path: str) -> bool:
    """Whether this user may enter the folders above a path."""
    try:
        os.stat(path)
    except PermissionError:
        return False
    except OSError:
        return True
    return True


def _open(path: str, epoch: int | None, version: int, *, direct: bool) -> tuple[CatalogImage, PlacementFile | None]:
    """Opens a store with the placement that its daemon has open; without, if that was pruned since."""
    if epoch is not None:
        try:
            return open_placement(path, epoch, version, direct=direct)
        except (ConfigError, FormatError) as error:
            logger.warning("%s: %s: what is not in memory is read from pages", path, error)
    return open_placement(path, "none", version, direct=direct)


def warn_of_other_version(name: str, before: Link, now: Link) -> None:
    """Logs a warning if a client that attached again looks up in another version of the store than before."""
    if now.identity != before.identity:
        logger.warning(
            "%s: attached again, to another version of the store than before: rows come from %s (digest %.12s) now, "
            "they came from %s (digest %.12s); if that is not meant, use 'tierstore swap'",
            name, now.path, now.identity, before.path, before.identity,
        )  # fmt: skip
