"""The way to a daemon: dialed, its answer becomes a link, and every link of a store has the same tables.

Input: the path of a socket; messages with descriptors. Output: a channel to the daemon, and a `Link` of the version
that it serves. Errors: `DaemonError` (no daemon, or refused), `FingerprintMismatchError` (other tables than before),
and what opening the store's shards raises.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import FingerprintMismatchError
from ..ipc.channel import Channel
from ..ipc.client_socket import dial
from ..ipc.mapped import same_tables
from ..ipc.messages import Layout, from_json
from ..ipc.protocol import close_fds
from ..spec import TableSpec
from .link import Link


class Dialer:
    """Connects to one daemon's socket and maps what it serves. Any thread may call."""

    def __init__(self, socket: str, io: str, threads: int | None, readers: int | None, staging_bytes: int) -> None:
        """
        Args:
            socket: The path of the daemon's socket.
            io: How this process reads what the daemon's memory does not hold, as in `tierstore.open`.
            threads: That copy the rows of a large lookup, as in `tierstore.open`.
            readers: Lookups that may read pages at once, as in `tierstore.open`.
            staging_bytes: Bytes of this process that reads under way may take.
        """
        self.socket, self.staging_bytes = socket, staging_bytes
        self._io, self._threads, self._readers = io, threads, readers
        self._specs: Sequence[TableSpec] | None = None  # of the first link; later ones must have the same

    def dial(self, timeout_s: float, *, on_gpu: bool = False, writable_static: bool = False) -> tuple[Channel, Link]:
        """Connects, and maps what the daemon serves. Blocks.

        Args:
            timeout_s: How long to try to connect, in seconds.
            on_gpu: Whether this process's GPU will read the daemon's static set in place.
            writable_static: As for `Link`.

        Returns:
            The open channel, which the caller closes, and the link.

        Raises:
            DaemonError: The daemon cannot be reached, or it refuses.
            FingerprintMismatchError: The daemon serves other tables than before.
        """
        channel, answer, fds = dial(self.socket, "client", timeout_s, on_gpu=on_gpu)
        try:
            return channel, self.link(_layout(answer, fds), fds, writable_static=writable_static)
        except BaseException:
            channel.close()
            raise

    def link(self, layout: Layout, fds: list[int], *, writable_static: bool = False) -> Link:
        """Maps what a message of the daemon describes, and closes the message's descriptors. Raises as `dial` does."""
        try:
            link = Link(
                layout, fds, self._io, self._threads, self._readers, self.staging_bytes, writable_static=writable_static
            )
        finally:
            close_fds(fds)
        difference = None if self._specs is None else same_tables(self._specs, link.specs)
        if difference:
            link.close(0)
            raise FingerprintMismatchError(
                f"{self.socket}: the daemon serves other tables than before: {difference}; what is mapped already "
                f"goes on to serve: connect again to have the new ones"
            )
        self._specs = link.specs
        return link


def _layout(answer: bytes, fds: list[int]) -> Layout:
    """Returns the layout that a daemon's answer to the hello says; closes its descriptors if it says none."""
    try:
        return from_json(answer, Layout)
    except BaseException:
        close_fds(fds)
        raise
