"""The shape of the tests' small tables (`support.stores.make_model`), and what buffers hold before a call."""

from __future__ import annotations

HEADS = 24  # rows a token: three orders of eight
ROW_BYTES = 40
ENTRY_BYTES = 8 * ROW_BYTES  # of one table, order and key
POISON = 0xA5  # in every byte of a buffer that a call must fill, or must leave alone
