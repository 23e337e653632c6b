"""The order of lookups that use the same buffers, on whatever streams, and whether a captured graph replays one.

Input: launches as they begin and end. Output: waits, of a stream or of the host, for the lookup before. Errors: of the
device, as torch raises them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .device import is_capturing

if TYPE_CHECKING:
    from .tier import HbmTier


class StreamOrder:
    """The order of one set of buffers. Its owner's lock guards it.

    was_captured: whether any launch was ever captured in a graph, whose replays no event shows.
    """

    def __init__(self, tier: HbmTier, on_capture: Callable[[], None]) -> None:
        """on_capture: called when the first launch is captured."""
        self.was_captured = False
        self._tier, self._on_capture = tier, on_capture
        self._done = (
            torch.cuda.Event() if tier.device.type == "cuda" else None
        )  # recorded behind a lookup's last kernel

    def notes_capture(self) -> bool:
        """Returns whether a graph is captured on the current stream; from then on, one may be replayed at any time."""
        capturing = is_capturing(self._tier.device)
        if capturing and not self.was_captured:
            self.was_captured = True
            self._on_capture()
        return capturing

    def wait_on_stream(self) -> None:
        """Has the current stream wait for the lookup before. Within a graph, its own stream is the order."""
        if self._done is not None and not self.notes_capture():
            torch.cuda.current_stream(self._tier.device).wait_event(self._done)

    def wait_on_host(self) -> None:
        """Blocks until the device has done with the buffers."""
        if self.was_captured:  # a replay may be under way, which no event shows
            self._tier.synchronize()
        elif self._done is not None:
            self._done.synchronize()

    def end(self) -> None:
        """Notes that a lookup's last kernel was launched on the current stream."""
        if self._done is not None and not self.notes_capture():
            self._done.record(torch.cuda.current_stream(self._tier.device))
