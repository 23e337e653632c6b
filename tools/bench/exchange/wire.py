"""The bytes that a rank gives to exchanges for other ranks.

Input: a `Ranks`. Output: a count of bytes while a context is open; what a rank sends to itself is not counted, nor are
headers of gloo and TCP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_adapter.exchange import Ranks


class Wire:
    """num_bytes: sent to other ranks so far, while `counted` was open."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.num_bytes = ranks, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what goes through the exchanges of these ranks. Not for two at once."""
        ranks, all_to_all, send = self._ranks, self._ranks.start_all_to_all, self._ranks.start_send

        def of_all_to_all(what: str, sent: Any, send_counts: Any = None, *rest: Any, **named: Any) -> Any:
            row_bytes = sent.nbytes // max(1, len(sent))
            own = len(sent) // ranks.size if send_counts is None else int(send_counts[ranks.rank])
            self.num_bytes += (len(sent) - own) * row_bytes
            return all_to_all(what, sent, send_counts, *rest, **named)

        def of_send(what: str, tensor: Any, to: int) -> Any:
            self.num_bytes += tensor.nbytes
            return send(what, tensor, to)

        ranks.start_all_to_all, ranks.start_send = of_all_to_all, of_send  # type: ignore[method-assign]
        try:
            yield
        finally:
            del ranks.start_all_to_all, ranks.start_send
