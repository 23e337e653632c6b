"""A client takes exactly the rows that it asked for: what a faulty or foreign server
answers otherwise is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from support.shapes import POISON

from tierstore.errors import FormatError
from tierstore.remote.messages import LookupReply, Part
from tierstore.remote.places import Place
from tierstore.remote.replies import Answer, LastVersion, decoded
from tierstore.remote.rows_reply import PartShape, RowsReply
from tierstore.remote.wire import encode

NONE = [0, 0]


def answer() -> tuple[Answer, np.ndarray]:
    """An answer to three tokens of a table of two orders, 4 bytes a token."""
    out = np.full((3, 2, 2), POISON, dtype=np.uint8)
    return Answer("grpc://x", [(0, np.zeros((3, 2), dtype=np.int64), out)], [Place(out, 4)], [(2, 1)]), out


def reply(*parts: Part, version: int = 1) -> bytes:
    return encode(LookupReply(version, list(parts)))


def part(start: int, num_bytes: int, table: int = 0) -> Part:
    return Part(table, start, bytes(range(num_bytes)), [1, 0], NONE, [0, 2])


def test_parts_in_order_fill_the_buffer_and_are_counted() -> None:
    taken, out = answer()
    taken.take(reply(part(0, 4)))
    with pytest.raises(FormatError, match="the rows are 8 bytes short"):
        taken.check_whole()
    taken.take(reply(part(1, 8)))
    taken.check_whole()
    assert out.reshape(-1).tolist() == [0, 1, 2, 3, *range(8)]
    assert (taken.hits, taken.num_bytes) == ([[[2, 0], [0, 0], [0, 4]]], 12)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (reply(part(1, 4)), "4 bytes from 1 on of table 0, after 0 of 12"),  # one is missing before it
        (reply(part(0, 4), part(0, 4)), "4 bytes from 0 on of table 0, after 4 of 12"),  # twice
        (reply(part(0, 13)), "13 bytes from 0 on"),  # beyond the end
        (reply(part(2**61, 4)), "of table 0, after 0"),
        (reply(part(0, 4, table=1)), "table 1 of 1"),
        (reply(Part(0, 0, b"1234", [1], NONE, NONE)), r"counts \[1\] of 2 orders"),
        (reply(Part(0, 0, b"1234", NONE, NONE, [2**48, 0])), "counts"),
        (reply(Part(0, 0, b"1234")), r"counts \[\] of 2 orders"),
        (b"\x0a\x01", "answered what is no LookupReply .* is that a tierstore"),
        (b"", None),
    ],
)
def test_rows_that_were_not_asked_for_are_refused(data: bytes, words: str | None) -> None:
    taken, out = answer()
    if words is not None:
        with pytest.raises(FormatError, match=words):
            taken.take(data)
    else:
        taken.take(data)
    with pytest.raises(FormatError, match="short"):
        taken.check_whole()
    assert out[-1, -1, -1] == POISON


def test_a_reply_of_the_version_that_answered_last_is_taken_as_any_other() -> None:
    last, taken = LastVersion(), []
    for version, expected in ((1, (0, 0)), (1, (9, 1)), (2, (9, 1)), (2, (9, 2))):
        assert last.version == expected  # of which the reply is expected to be
        message = RowsReply(version, 9, [PartShape(0, 0, 3, 4, 2)])
        message.rows[0][:] = np.arange(12)
        message.count(0, [[1, 2], [0, 1], [2, 0]])
        out = np.full((3, 2, 2), POISON, dtype=np.uint8)
        request = (0, np.zeros((3, 2), dtype=np.int64), out)
        got = Answer("grpc://x", [request], [Place(out, 4)], [(2, 1)], last)
        got.take(message.message)
        got.check_whole()
        assert out.reshape(-1).tolist() == list(range(12))
        taken.append((got.version, got.hits, got.num_bytes))
    counts = [[[1, 2], [0, 1], [2, 0]]]
    assert taken == [((9, version), counts, 12) for version in (1, 1, 2, 2)]
    with pytest.raises(FormatError, match="after 12 of 12"):  # twice
        got.take(message.message)


def test_an_answer_is_of_one_version() -> None:
    taken, _ = answer()
    taken.take(reply(part(0, 4), version=1))
    with pytest.raises(FormatError, match="version 2 within an answer of version 1"):
        taken.take(reply(part(1, 4), version=2))


def test_what_is_no_message_is_refused_with_its_url() -> None:
    with pytest.raises(FormatError, match="grpc://x answered what is no LookupReply"):
        decoded(LookupReply, b"\xff", "grpc://x")
