"""Messages are of their types, or a DaemonError that names what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.decisions.shared_budget import SharedShare
from tierstore.errors import DaemonError
from tierstore.ipc.messages import (
    EngineCounters,
    FromClient,
    FromDaemon,
    Goodbye,
    Hello,
    LatencyCounts,
    Layout,
    Move,
    RollbackRequest,
    StatRequest,
    SwapRequest,
    from_json,
    request_from_json,
    to_json,
)

COUNTERS = EngineCounters(
    1, 2, 3, 4, 5, 6, 7, 8, 9, LatencyCounts((1, 0), 10), (((1, 2), (3, 4), (5, 6)), ((7,), (8,), (2**63 - 1,)))
)
LAYOUT = Layout(
    is_exported=False,
    store="/srv/a.tier",
    identity="ab" * 32,
    version=3,
    tag=1,
    placement=None,
    sizes=(4096, 8192, 8192, 4096),
    tables={"layers.1": SharedShare(False, num_slots=5, head_starts=(0, 128)), "layers.2": SharedShare(True)},
    bad_pages={"layers.2": {7: "page 7: its checksum is of other bytes"}},
    budget_bytes=1 << 40,
    dram_bytes=1 << 39,
)
HELLO_OF = b'{"hello":1,"role":"client","pid":1,"release":"'  # and the release
HELLO = HELLO_OF + b'0"'


@pytest.mark.parametrize(
    "message", [Hello(1, "client", 7, "0.5", True), FromClient(counters=COUNTERS), FromClient(left=3), LAYOUT]
)
def test_a_message_comes_as_it_was(message: Any) -> None:
    assert from_json(to_json(message), type(message)) == message


def test_a_client_tells_the_daemons_messages_apart() -> None:
    assert from_json(to_json(Move(LAYOUT)), FromDaemon) == FromDaemon(move=LAYOUT)
    assert from_json(to_json(Goodbye("the daemon ends")), FromDaemon) == FromDaemon(bye="the daemon ends")
    assert from_json(to_json(LAYOUT), FromDaemon) == FromDaemon()


@pytest.mark.parametrize("request_", [StatRequest(), SwapRequest("/b"), RollbackRequest()])
def test_requests_are_told_apart_by_what_to_do(request_: Any) -> None:
    assert request_from_json(to_json(request_)) == request_


FOREIGN_JSON = {
    "not JSON": b"{",
    "a list": b"[1]",
    "a number": b"1",
    "null": b"null",
    "two objects": HELLO + b"}{}",
    "NaN": HELLO + b',"x":NaN}',
    "infinity": HELLO + b',"x":-Infinity}',
    "bytes that are not text": HELLO_OF + b'\xff"}',
    "a byte order mark": b"\xef\xbb\xbf" + HELLO + b"}",
    "UTF-16": (HELLO + b"}").decode().encode("utf-16"),
    "half a character": HELLO_OF + b'\\ud800"}',
    "half a character as a key": HELLO + b',"\\udfff":1}',
    "a bomb of lists": HELLO + b',"x":' + b"[" * 500_000,
    "a closed bomb of lists": HELLO + b',"x":' + b"[" * 250_000 + b"]" * 250_000 + b"}",
    "a bomb of objects": b'{"a":' * 150_000,
    "a control character": HELLO_OF + b'\n"}',
    "a huge integer": b'{"hello":' + b"9" * 100_000 + b"}",
    "a text for a number": b'{"hello":"1","role":"client","pid":1,"release":"0"}',
    "a number for a text": b'{"hello":1,"role":2,"pid":1,"release":"0"}',
    "a bool for a number": b'{"hello":true,"role":"client","pid":1,"release":"0"}',
    "a fraction for a number": b'{"hello":1.0,"role":"client","pid":1,"release":"0"}',
    "a missing field": b'{"hello":1,"role":"client","release":"0"}',
    "a text that is too long": HELLO_OF + b"x" * 65 + b'"}',
}


@pytest.mark.parametrize("data", FOREIGN_JSON.values(), ids=FOREIGN_JSON)
def test_what_is_not_that_message_is_a_daemon_error(data: bytes) -> None:
    with pytest.raises(DaemonError, match=r"a message of [\d,]+ bytes is not what was expected: .+"):
        from_json(data, Hello)


def test_old_clients_read_the_key_that_they_know() -> None:
    assert from_json(to_json(LAYOUT), dict)["lent"] is False


def layout_with(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = from_json(to_json(LAYOUT), dict)
    return fields | changes


WRONG_LAYOUTS = {
    "a version below 0": layout_with(version=-1),
    "a size below 0": layout_with(sizes=[4096, -1, 4096, 4096]),
    "three blocks": layout_with(sizes=[4096] * 3),
    "six blocks": layout_with(sizes=[4096] * 6),
    "a share with a start below 0": layout_with(tables={"t": {"resident": False, "recency_start": -4096}}),
    "a share with an area below 0": layout_with(tables={"t": {"resident": False, "area_starts": [0, -64]}}),
    "a share with one head": layout_with(tables={"t": {"resident": False, "head_starts": [0]}}),
    "a share that does not say whether it is resident": layout_with(tables={"t": {}}),
    "a bool for a number of slots": layout_with(tables={"t": {"resident": False, "num_slots": True}}),
    "a bad page of no number": layout_with(bad_pages={"t": {"x": "why"}}),
}


@pytest.mark.parametrize("fields", WRONG_LAYOUTS.values(), ids=WRONG_LAYOUTS)
def test_a_layout_that_no_blocks_can_have_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DaemonError, match="not what was expected"):
        from_json(to_json(fields), Layout)
    assert from_json(to_json(layout_with(more="to come")), Layout) == LAYOUT


WRONG_REPORTS = {
    "both": {"counters": from_json(to_json(COUNTERS), dict), "left": 1},
    "neither": {},
    "an unknown field": {"left": 1, "more": 2},
    "an unknown counter": {"counters": from_json(to_json(COUNTERS), dict) | {"more": 1}},
    "a counter below 0": {"counters": from_json(to_json(COUNTERS), dict) | {"rows": -1}},
    "a counter of 64 bits": {"counters": from_json(to_json(COUNTERS), dict) | {"rows": 2**63}},
    "a table of two lists": {"counters": from_json(to_json(COUNTERS), dict) | {"tables": [[[1], [2]]]}},
}


@pytest.mark.parametrize("fields", WRONG_REPORTS.values(), ids=WRONG_REPORTS)
def test_a_clients_report_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DaemonError, match="is the sender of another release"):
        from_json(to_json(fields), FromClient)


@pytest.mark.parametrize("data", [b"{}", b'{"do":"fly"}', b'{"do":3}', b'{"do":"swap"}', b'{"do":"stat","x":1}'])
def test_a_request_that_there_is_not_is_refused(data: bytes) -> None:
    with pytest.raises(DaemonError, match=r"do|store|unknown field `x`"):
        request_from_json(data)


def test_a_text_that_is_not_utf_8_cannot_be_sent() -> None:
    with pytest.raises(DaemonError, match=r"'\\udcff', which is not UTF-8: rename it"):
        to_json(SwapRequest("/store\udcff"))


@given(
    st.one_of(
        st.binary(max_size=200), st.text(alphabet='{}[]":,\\u0123456789eE.-ntrfalsd ', max_size=60).map(str.encode)
    )
)
def test_any_bytes_are_a_message_or_a_daemon_error(data: bytes) -> None:
    try:
        message = from_json(data, dict[str, Any])
    except DaemonError:
        return
    assert from_json(to_json(message), dict[str, Any]) == message
