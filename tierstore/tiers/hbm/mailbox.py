"""The host's side of one lookup's mailbox: page-locked memory by which the device asks for what no tier of its holds.

Input: the device's requests, which a native thread serves (`kernels.MailboxServer`), and what went wrong on either
side. Output: where kernels find the parts of the block; errors by name. Errors: `BudgetError` if page-locked memory has
run out, `TimeoutError` if host or disk have stopped answering, and what a read raised. kernels/cpu/mailbox.h draws the
block.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from ... import kernels
from ...errors import TierStoreError
from ..faults import closed_error

if TYPE_CHECKING:
    from .tier import HbmTier

WAIT_S = 60.0  # how long the device waits for the host, about, and the host for the device
ANSWER_PAUSE_S = 1e-4  # between two looks whether the host has answered
_CLOSED = kernels.MAILBOX_STATUSES.index("closed")


class Mailbox:
    """The block of one lookup, and its place in the server. Its owner's lock guards it.

    Attributes:
        pairs_max: How many pairs of (token, order) one request holds.
        pairs: int32 [pairs_max], the numbers of missed pairs; of keys that the host knows, the host writes them.
        address, keys_address, pairs_address, entries_address, row_ids_address: Of the block and its parts, for kernels.
    """

    def __init__(
        self, what: str, tier: HbmTier, server: kernels.MailboxServer, index: int, tokens_max: int, by_row_id: bool
    ) -> None:
        """
        Args:
            what: The store, as errors call it.
            tier: Whose page-locked memory the block is taken from.
            server: Answers the requests.
            index: The table's.
            tokens_max: Tokens of one lookup.
            by_row_id: Whether the device asks for row ids too, of pairs that have no key.
        """
        spec = tier.tables[index].spec
        self._what, self._table, self._server = what, spec.name, server
        self._entry_bytes = spec.entry_bytes
        self.pairs_max = tokens_max * len(spec.orders)
        what_for = f"a lookup of {tokens_max} tokens of table {spec.name} from the device"
        rows_per_key = spec.rows_per_key if by_row_id else 0
        self._block = tier.pinned.take(kernels.mailbox_bytes(self.pairs_max, spec.entry_bytes, rows_per_key), what_for)
        keys_start = kernels.MAILBOX_STARTS["keys"]
        pairs_start = kernels.mailbox_pairs_start(self.pairs_max)
        entries_start = kernels.mailbox_entries_start(self.pairs_max)
        self._words = self._block[:keys_start].view(np.int64)
        self.pairs = self._block[pairs_start : pairs_start + 4 * self.pairs_max].view(np.int32)
        self._entries = self._block[entries_start : entries_start + self.pairs_max * spec.entry_bytes]
        self.address = self._block.ctypes.data
        self.keys_address, self.pairs_address = self.address + keys_start, self.address + pairs_start
        self.entries_address = self.address + entries_start
        self.row_ids_address = self.address + kernels.mailbox_row_ids_start(self.pairs_max, spec.entry_bytes)
        self._id = server.add(index, self._block, self.pairs_max, by_row_id)

    def entries_of(self, num_pairs: int) -> np.ndarray:
        """Returns where the entries of the first pairs lie, which the host writes: uint8 [num_pairs, entry_bytes]."""
        return self._entries[: num_pairs * self._entry_bytes].reshape(num_pairs, self._entry_bytes)

    def release(self) -> None:
        """Lets the memory go. Nothing else may be called then."""
        self._block = self._words = self.pairs = self._entries = np.empty(0, dtype=np.uint8)

    def take(self, name: str) -> int:
        """Returns a word that the device writes if something is wrong, and clears it; 0 if nothing is."""
        at = _word(name)
        word = int(self._words[at])
        if word:
            self._words[at] = 0
        return word

    def wait_for_answer(self) -> None:
        """Blocks until the host has answered a request that the device gave up: until then it writes to the block.

        Raises `TimeoutError` after WAIT_S.
        """
        requested, answered = _word("requested"), _word("answered")
        deadline = time.monotonic() + WAIT_S
        while self._words[requested] != self._words[answered]:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self._what}: step {self._words[requested]} of table {self._table}, which the device gave up, "
                    f"has not been answered within {WAIT_S:.0f} s more; the disk has stopped answering"
                )
            time.sleep(ANSWER_PAUSE_S)

    def check(self) -> None:
        """Raises what went wrong in a step that the device has done, once; returns if nothing did.

        Raises `TimeoutError` if the host did not answer, and what its reads raised.
        """
        failed, timed_out = self.take("failed"), self.take("timed_out")
        if not failed:
            return
        fault = self._server.fault(self._id)
        if fault is not None:
            raise fault
        if timed_out:
            raise TimeoutError(
                f"{self._what}: the device waited {WAIT_S:.0f} s, in step {timed_out}, for entries of table "
                f"{self._table}; the disk or the host has stopped answering"
            )
        if self._words[_word("status")] == _CLOSED:
            raise closed_error(self._what)
        raise TierStoreError(
            f"{self._what}: the host did not understand what the device asked for in step {failed} of table "
            f"{self._table}: its memory was written by somebody else; look for a kernel that writes out of bounds, and "
            f"open the store again"
        )

    def time_replays(self) -> None:
        """Has the server time the requests: replays of a captured graph are launched without us."""
        self._server.time(self._id)

    def num_requests(self) -> int:
        """Returns how often the device has asked the host for what a step missed."""
        return int(self._server.served(self._id))


def _word(name: str) -> int:
    """Returns the index of a word of the block."""
    return kernels.MAILBOX_STARTS[name] // 8
