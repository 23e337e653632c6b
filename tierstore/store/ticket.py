"""A lookup that was started early: what `Store.submit` and `Table.submit_rows` return.

Input: what an engine has under way. Output: a ticket to wait for. Errors: those of the lookup, raised by `wait`.
"""

from __future__ import annotations

from ..tiers.engine import Pending


class Ticket:
    """A lookup that was started early. Dropping it without `wait` leaks nothing: the reads end by themselves."""

    def __init__(self, pending: Pending | None) -> None:
        self._pending = pending

    def done(self) -> bool:
        """Returns whether the lookup has ended, well or with an error: its buffers are the caller's again."""
        return self._pending is None or self._pending.done()

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until every row is in its buffer; raises what the lookup raises.

        Raises `TimeoutError` after timeout_s seconds; the lookup goes on, and `wait` may be called again, as after
        Ctrl-C. May be called from any thread, and more than once.
        """
        if self._pending is not None:
            self._pending.wait(timeout_s)


def handed_out(pending: Pending | None) -> Ticket:
    """Returns the ticket of what is under way, which then ends by itself. If this raises, it is cancelled."""
    if pending is None:
        return Ticket(None)
    try:
        ticket = Ticket(pending)
        pending.detach()
        return ticket
    except BaseException:  # nobody has the ticket
        pending.cancel()
        raise
