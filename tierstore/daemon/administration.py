"""What administrators have a daemon do: re-plans, reloads, swaps and rollbacks.

Input: a request. Output: its answer, when it is done. Errors: what the work raises; what was served before is served on
then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from ..errors import ConfigError, TierStoreError
from ..ipc.events import event
from ..ipc.messages import (
    Done,
    Move,
    ReloadRequest,
    ReplanAnswer,
    ReplanRequest,
    Request,
    SwapAnswer,
    SwapRequest,
)
from .epochs import Pairs
from .host import Host
from .placements import placed_entries
from .replanner import Replanner
from .versions import Note

logger = logging.getLogger("tierstore.daemon")


class Administration:
    """Carries requests out, one at a time as far as they change what is served. Any thread may call; blocks."""

    def __init__(self, host: Host, replanner: Replanner, note: Note, reload_certificates: Callable[[], None]) -> None:
        """note: keeps what is served from now on, durably."""
        self._host, self._replanner, self._note = host, replanner, note
        self._reload_certificates = reload_certificates

    def carry_out(self, request: Request) -> msgspec.Struct:
        """Does what a request other than that for the stat record says; returns the answer."""
        if isinstance(request, ReplanRequest):
            return ReplanAnswer(**msgspec.structs.asdict(self._replanner.replan()))
        if isinstance(request, ReloadRequest):
            self.reload()
            return Done()
        if isinstance(request, SwapRequest):
            return self._swap(request.store)
        previous = self._host.versions.previous_path
        if previous is None:
            raise ConfigError("nothing to roll back to: no version was swapped in since the daemon began")
        return self._swap(previous)

    def reload(self) -> None:
        """Reads again what may have changed on disk: certificates, and the placement, whose hottest become static."""
        try:
            self._reload_certificates()
        finally:  # a bad certificate does not keep a good placement out
            self._replanner.adopt(self._placed_entries())

    def _swap(self, path: str) -> SwapAnswer:
        done = self._host.versions.swap(path, self._replanner.counts_of, self._move_all, self._note)
        filled, version = 0, self._host.epochs.current
        try:
            filled += self._replanner.replan().entered  # the slots that the old version had
            filled += self._replanner.adopt(self._placed_entries(), only_free=True).entered
        except TierStoreError as error:
            # A damaged placement, or a GPU in the version before: the new one is served all the same.
            event(logger, logging.WARNING, "not_refilled", error=error)
        return SwapAnswer(
            version=version.number, store=version.path, warmed=done.num_warmed, filled=filled, seconds=done.seconds
        )

    def _placed_entries(self) -> dict[str, Pairs]:
        """Returns what the placement of the store that is served has; nothing if none is to be served."""
        if self._host.has_no_placement:
            return {}
        return placed_entries(self._host.epochs.current, self._host.tiers.slots)

    def _move_all(self) -> None:
        """Sends all clients the version that is served now."""
        for peer in self._host.clients.attached():
            try:
                moved = self._host.clients.move(peer)
                if moved is not None:
                    peer.send(Move(moved[0]), moved[1])
            except (TierStoreError, OSError) as error:  # gone, not reading, or out of descriptors: it attaches anew
                event(logger, logging.WARNING, "not_moved", pid=peer.pid, error=error)
                peer.drop(f"a new version could not be sent: {error}")
