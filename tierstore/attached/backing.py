"""A client of the daemon: the same `Store`, over tiers that all processes of the host share.

Flows in: the path of a daemon's socket. Flows out: rows, copied from shared memory that is mapped read-only, or read
from the shards by this process itself; the daemon is asked nothing on the way. It is told, lossily, what was looked up.
When it goes, lookups go on with what is mapped; when it is back, or serves another version, or this process has forked,
a new engine takes the place of the old one between two lookups. Refuses another hash than before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from .. import kernels
from ..errors import ConfigError, FingerprintMismatchError, FormatError, StoreNotReadyError, TierStoreError
from ..ipc.client_socket import dial, raise_error
from ..ipc.identity import this_process
from ..ipc.mapped import same_tables
from ..ipc.protocol import Channel, close_fds
from ..stats import counters_since
from ..store.backing import Backing
from ..store.embedded import open_placement
from ..store.options import check_options
from ..store.store import Store
from ..tiers.engine import READ_WAIT_S, Engine
from ..units import parse_bytes
from .engine import AttachedEngine
from .link import Link, warn_of_other_version

if TYPE_CHECKING:
    from ..tiers.hbm.engine import HbmEngine
    from .static_pin import HeldStatic

logger = logging.getLogger("tierstore")

DIAL_S = 5.0
REDIAL_S = 0.1  # between tries to find the daemon again: at first,
REDIAL_MAX_S = 1.0  # and at most
TELL_S = 1.0  # between two messages with counters
FOLLOW_S = 0.02  # between two looks for another static set, where a device reads that
SEND_S = 1.0
END_WAIT_S = 10.0


def attach(
    socket: str | os.PathLike[str],
    *,
    io: str = "auto",
    staging: int | str = "16MiB",
    timeout_s: float = DIAL_S,
    hbm: int | str | None = None,
    device: str | None = None,
) -> Store:
    """Attaches this process to a daemon (`tierstore serve`) and returns its store;
    `tierstore.connect` of a path does it.

    socket: its path. io: how this process reads what it misses, as in `tierstore.open`. staging: bytes that it may take
    for reads on their way; the tiers are the daemon's. hbm, device: bytes of GPU memory for a tier of this process
    above them, as in `tierstore.open`; as much host memory as `staging` is page-locked then, and the daemon's static
    set in place where it was started with --gpu-clients. Blocks, at most about timeout_s, and until HBM is filled.
    Raises `DaemonError` (no daemon, refused, another protocol), `ConfigError` (an option), `BudgetError` (of HBM), and
    what opening the store's shards raises.
    """
    if not kernels.native:
        raise ConfigError("attaching needs the compiled kernels: install gcc or clang, then tierstore again")
    options = check_options(io, hbm, device)
    backing = AttachedBacking(
        os.fspath(socket), io, parse_bytes(staging, "staging"), timeout_s, on_gpu=options is not None
    )
    if options is not None:
        try:
            backing.add_hbm(options.num_bytes, options.device)
        except BaseException:
            backing.engine.close(END_WAIT_S)
            backing.close()
            raise
    backing.start()
    return Store(backing)


class AttachedBacking(Backing):
    """Keeps a store attached, in a thread: hears of other versions, tells counters,
    finds a daemon that went and is back."""

    def __init__(self, socket: str, io: str, staging_bytes: int, timeout_s: float, *, on_gpu: bool = False) -> None:
        """Attaches; raises what `attach` raises. on_gpu: whether `add_hbm` comes next."""
        self._socket, self._io, self._staging_bytes = socket, io, staging_bytes
        self._ended = threading.Event()
        self._told: Any = None  # the counters that a daemon was told last,
        self._told_before: Any = None  # and by connections before the one that there is now
        self._channel: Channel | None
        self._channel, link = self._dial(timeout_s, on_gpu=on_gpu, writable_static=on_gpu)
        self.name = f"{link.opened.image.path} (attached by {socket})"
        self.specs, self.attachments = link.specs, link.attachments
        self._attached = AttachedEngine(link, self._relink)
        self.engine: Engine = self._attached
        self._hbm: HbmEngine | None = None
        self._static: HeldStatic | None = None  # where a device reads the daemon's
        self._hbm_lock = threading.RLock()  # of what is held of that; reentered where a store is collected meanwhile
        self._follow_at, self._follow_said = 0.0, ""  # not before that; what was said of why not
        self._thread: threading.Thread | None = None
        self._process = this_process()

    @property
    def build(self) -> str:
        return self._attached.link.identity

    def add_hbm(self, hbm_bytes: int, device: str) -> None:
        """Puts an hbm tier of this process above what is attached. Blocks while it is filled. Comes before the first
        lookup, and `start`."""
        from ..tiers.hbm.device import DramPart
        from ..tiers.hbm.opening import put_above
        from .static_pin import HeldStatic

        link, dram = self._attached.link, [DramPart() for _ in self.specs]
        if link.is_lent:
            self._static = HeldStatic(link)
            dram = self._static.parts
        else:
            logger.warning(
                "%s: the daemon's static set goes to %s by way of the host; 'tierstore serve --gpu-clients' lets it be "
                "read where it lies, by clients that are trusted as the daemon is",
                self.name, device,
            )  # fmt: skip
        try:
            self._hbm = put_above(self.name, self._attached, dram, hbm_bytes, self._staging_bytes, device)
        finally:
            link.protect_static()
        if not self._hbm.reads_records:
            self._static = None
        self.engine = self._hbm
        self._fill_hbm()
        self._hold_static()

    def _move_to(self, link: Link) -> Link:
        """Sends lookups through another link, from the device too; returns the old one. The hbm tier is empty then."""
        hbm = self._hbm
        if hbm is None:
            return self._attached.move_to(link)

        def move() -> Link:
            with self._hbm_lock:
                if self._static is not None:
                    self._static.leave()  # no kernel reads it now
            return self._attached.move_to(link)

        return hbm.move(move)

    def _fill_hbm(self) -> None:
        """Fills the hbm tier, if there is one, from the current placement of the store that it stands on."""
        if self._hbm is None:
            return
        image = self._attached.link.opened.image
        now, placed = open_placement(image.path, None, direct=False)
        if placed is None:
            logger.warning("%s: hbm stays empty: no placement says what belongs there; run 'tierstore plan'", self.name)
            return
        try:
            if now.identity != image.identity:
                raise FormatError(f"{image.path} was built anew since the daemon opened it: restart the daemon")
            self._hbm.change_entries(placed)
        finally:
            placed.close()

    def _refill_hbm(self) -> None:
        """The same where nobody waits: what goes wrong leaves the tier empty, which costs speed."""
        try:
            self._fill_hbm()
        except (TierStoreError, OSError, RuntimeError) as error:  # torch's own are RuntimeErrors
            logger.warning("%s: hbm stays empty: %s", self.name, error)
        self._hold_static()

    def _hold_static(self) -> None:
        """Has the device see the static set of the version that this is attached to, where it reads that. After the
        tier is filled, which may take long: the daemon changes nothing that is held."""
        with self._hbm_lock:
            if self._static is None or self._ended.is_set():
                return
            if not self._static.hold(self._attached.link):
                self._static = None
        self._follow_static()

    def _follow_static(self) -> None:
        """Has the device see the daemon's newest static set, where it reads that."""
        if self._static is None or time.monotonic() < self._follow_at or not self._hbm_lock.acquire(blocking=False):
            return
        try:
            if self._hbm is not None and not self._ended.is_set() and self._static.is_behind():
                self._static.follow(self._hbm.name_records)
                self._follow_said = ""
        except StoreNotReadyError:  # it is being closed
            pass
        except RuntimeError as error:  # torch's: a graph is being captured, for one
            self._follow_at = time.monotonic() + TELL_S
            if str(error) != self._follow_said:
                self._follow_said = str(error)
                logger.warning("%s: the daemon's static set of before is still read: %s", self.name, error)
        finally:
            self._hbm_lock.release()

    def _leave_static(self) -> None:
        """Holds nothing of it any more, where no kernel reads it."""
        if not self._hbm_lock.acquire(timeout=END_WAIT_S):
            return
        try:
            if self._static is not None and (self._hbm is None or self._hbm.device is None):
                self._static.leave()
        finally:
            self._hbm_lock.release()

    def start(self) -> None:
        """Begins to hear and to tell, in a thread of its own."""
        self._process = this_process()
        self._thread = threading.Thread(target=self._run, name="tierstore-attached", daemon=True)
        self._thread.start()

    def _dial(self, timeout_s: float, *, on_gpu: bool = False, writable_static: bool = False) -> tuple[Channel, Link]:
        channel, layout, fds = dial(self._socket, "client", timeout_s, on_gpu=on_gpu)
        try:
            return channel, self._link(layout, fds, writable_static=writable_static)
        except BaseException:
            channel.close()
            raise

    def _link(self, layout: dict[str, Any], fds: list[int], *, writable_static: bool = False) -> Link:
        """Maps what the daemon gave, and lets its descriptors go; refuses other tables than this store has."""
        try:
            link = Link(layout, fds, self._io, self._staging_bytes, writable_static=writable_static)
        finally:
            close_fds(fds)
        difference = same_tables(self.specs, link.specs) if hasattr(self, "specs") else None
        if difference:
            link.close(0)
            raise FingerprintMismatchError(
                f"{self._socket}: the daemon serves other tables than before: {difference}; what is mapped already "
                f"goes on to serve: connect again to have the new ones"
            )
        return link

    def _run(self) -> None:
        """The thread: attached, until it ends or loses the daemon; then in search of it."""
        try:
            self._attend_always()
        finally:
            self._leave_static()

    def _attend_always(self) -> None:
        pause_s, said = REDIAL_S, ""
        while not self._ended.is_set():
            if self._channel is not None:
                try:
                    self._attend(self._channel)
                except Exception as error:  # whatever it is, this thread is the only one that can attach again
                    if not self._ended.is_set():
                        logger.warning("%s: detached (%s): lookups go on, and it is looked for", self.name, error)
                self._channel.close()
                self._channel, self._told_before = None, self._told
                pause_s, said = REDIAL_S, ""
                continue
            if self._ended.wait(pause_s):
                return
            pause_s = min(2 * pause_s, REDIAL_MAX_S)
            try:
                self._follow_static()  # the daemon may go on without us
                self._attach_again()
            except Exception as error:  # the same
                if str(error) != said and not self._ended.is_set():
                    said = str(error)
                    logger.warning("%s: not attached yet: %s", self.name, error)
                continue
            logger.info("%s: attached again", self.name)
            self._refill_hbm()

    def _attach_again(self) -> None:
        """Dials and moves. The channel is ours only after the move:
        who is attached looks up by what it has attached to."""
        channel, link = self._dial(DIAL_S, on_gpu=self._static is not None)
        try:
            warn_of_other_version(self.name, self._attached.link, link)
            old = self._move_to(link)
        except BaseException:
            channel.close()
            raise
        self._channel = channel
        self._attached.retire(old, READ_WAIT_S)

    def _attend(self, channel: Channel) -> None:
        """Hears and tells until the channel ends, which raises."""
        told_at = time.monotonic()
        while not self._ended.is_set():
            left_s = told_at + TELL_S - time.monotonic()
            if left_s <= 0:
                told_at = time.monotonic()
                self._tell(channel)
                continue
            self._follow_static()
            try:
                message, fds = channel.receive(left_s if self._static is None else min(left_s, FOLLOW_S))
            except TimeoutError:
                continue
            if "move" not in message:
                close_fds(fds)
                raise_error(message)
                continue
            old = self._move_to(self._link(message["move"], fds))
            self._attached.retire(old, READ_WAIT_S)
            channel.send({"left": old.version}, timeout_s=SEND_S)
            del old  # what it maps goes now, and not with the next one
            self._refill_hbm()

    def _tell(self, channel: Channel) -> None:
        """Tells what was counted since the connections before this one: what they were told is not told twice."""
        counters = self._attached.counters()
        channel.send({"counters": counters_since(counters, self._told_before)}, timeout_s=SEND_S)
        self._told = counters

    def _relink(self) -> None:
        """In a forked child: attaches it by itself; where that cannot be now, it goes on without, and looks for the
        daemon."""
        if self._channel is not None:
            self._channel.close()  # the parent's; here it would only outlive it
        self._channel = self._told = self._told_before = None
        self._ended = threading.Event()
        self._hbm, self._static, self._hbm_lock = None, None, threading.RLock()  # a forked child has no device
        try:
            self._channel, link = self._dial(DIAL_S)
        except (TierStoreError, OSError) as error:
            logger.warning("%s: a forked child is not attached: %s", self.name, error)
            link = self._attached.link.alone()
        warn_of_other_version(self.name, self._attached.link, link)
        old = self._attached.move_to(link)
        self._attached.disown(old)
        if old.opened is not link.opened:
            old.opened.close()  # its engine was closed by the fork
        self.start()  # last: what it moves to must not be moved away from

    def details(self) -> dict[str, Any]:
        """See `Backing`; the memory is the daemon's, but for staging."""
        link = self._attached.link
        hbm = {} if self._hbm is None else self._hbm.memory()
        return {
            "io": self.engine.io,
            "memory": link.memory | hbm,
            "placement": {"epoch": link.opened.placed.placement.epoch if link.opened.placed else None},
            "attached": {"socket": self._socket, "now": self._channel is not None, "version": link.version},
        }

    def close(self) -> None:
        self._ended.set()
        if self._process == this_process():
            self._leave_static()
        channel = self._channel
        if channel is not None and self._process != this_process():
            channel.close()  # a child that never looked up: to end the connection would end its parent's
        elif channel is not None:
            with contextlib.suppress(TierStoreError, TimeoutError, OSError):
                self._tell(channel)
            channel.shutdown()
        if self._thread is not None and threading.current_thread() is not self._thread:  # which may collect the store
            self._thread.join(END_WAIT_S)
        self._attached.link.opened.close()
