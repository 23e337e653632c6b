"""Whatever happens is one line that programs can read, and a flood of it is a few lines and a count."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from typing import Any

import pytest

from tierstore.errors import ConfigError
from tierstore.ipc import events
from tierstore.ipc.events import RateLimit, configure_logging, event

logger = logging.getLogger("tierstore")

HOSTILE = [
    "two\nlines",
    "a\r\nb",
    'quote " and = and \\',
    "\x1b[31mred\x1b[0m",
    "nul \0 and del \x7f",
    "line \u2028 and next \x85",
    "no utf-8 \udcff",
    "ends with a quote'",
    "",
    "level=error",
]
pytestmark = pytest.mark.usefixtures("logging_as_before")


def parsed(line: str) -> dict[str, str]:
    """Values of a logfmt line, by a reader that knows nothing of the writer: bare up to a space, or a JSON string."""
    values, place = {}, 0
    while place < len(line):
        name, _, rest = line[place:].partition("=")
        assert name.isidentifier(), line
        place += len(name) + 1
        if rest.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(rest)
        else:
            value = rest.split(" ")[0]
            end = len(value)
            assert not set(value) & set('"=')
        assert rest[end : end + 1] in ("", " "), line
        values[name] = value
        place += end + 1
    return values


def logged(format: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The line of one event, and what is read of it."""
    stream = io.StringIO()
    configure_logging(format, stream)
    event(logger, logging.INFO, "replan", **fields)
    line = stream.getvalue()
    return line, json.loads(line) if format == "json" else parsed(line[:-1])


@pytest.mark.parametrize("format", events.FORMATS)
@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_value_cannot_break_its_line_and_is_read_back(format: str, value: str) -> None:
    line, values = logged(format, path=value, after=1)
    assert len(line.splitlines()) == 1
    assert line.endswith("\n")
    assert all(" " <= letter < "\x7f" for letter in line[:-1]) or "\x7f" in value
    assert values["path"] == value
    assert values["after"] in (1, "1")
    assert values["level"] == "info"


def test_an_event_has_time_level_name_and_its_values_in_order() -> None:
    line, values = logged("logfmt", entered=21_000, seconds=3.25, forced=False, previous=None, store="/srv/v41.tier")
    assert line.endswith(
        " level=info event=replan entered=21000 seconds=3.25 forced=false previous=null store=/srv/v41.tier\n"
    )
    assert len(values["time"]) == len("2026-01-02T03:04:05.678Z")
    assert line.startswith(f"time={values['time']} ")


def test_values_of_an_event_show_without_our_log_format(caplog: pytest.LogCaptureFixture) -> None:
    event(logger, logging.WARNING, "read_failed", page=3, path="two\nlines", error=OSError("bad"))
    assert caplog.messages == ['read_failed page=3 path="two\\nlines" error="OSError: bad"']
    event(logger, logging.WARNING, "stopped")
    assert caplog.messages[1:] == ["stopped"]


def test_json_keeps_numbers_and_says_others_as_text() -> None:
    _, values = logged("json", n=3, share=0.5, bad=float("nan"), pids=[1, 2], on=True, none=None)
    assert {name: values[name] for name in ("n", "share", "bad", "pids", "on", "none")} == {
        "n": 3,
        "share": 0.5,
        "bad": "nan",
        "pids": "[1, 2]",
        "on": True,
        "none": None,
    }


@pytest.mark.parametrize("format", events.FORMATS)
def test_an_error_is_named_and_its_traceback_is_on_the_same_line(format: str) -> None:
    stream = io.StringIO()
    configure_logging(format, stream)
    try:
        raise OSError(5, "Input/output\nerror")
    except OSError as error:
        event(logger, logging.WARNING, "read_failed", error=error)
        event(logger, logging.ERROR, "read_failed", error=error)
    warned, failed = (json.loads(line) if format == "json" else parsed(line) for line in stream.getvalue().splitlines())
    assert warned["error"] == failed["error"] == "OSError: [Errno 5] Input/output\nerror"
    assert "traceback" not in warned
    assert "test_an_error_is_named" in failed["traceback"]


@pytest.mark.parametrize("format", events.FORMATS)
def test_ordinary_records_of_the_library_are_events_too(format: str) -> None:
    stream = io.StringIO()
    configure_logging(format, stream)
    logging.getLogger("tierstore.tiers").warning("a %s of\nlines", "pair")
    (line,) = stream.getvalue().splitlines()
    values = json.loads(line) if format == "json" else parsed(line)
    assert (values["event"], values["message"]) == ("log", "a pair of\nlines")


def test_a_long_value_is_cut_and_says_how_long_it_was() -> None:
    _, values = logged("json", text="x" * (events.VALUE_CHARS_MAX + 1))
    assert values["text"] == "x" * events.VALUE_CHARS_MAX + f"... ({events.VALUE_CHARS_MAX + 1} characters)"
    _, values = logged("json", text="x" * events.VALUE_CHARS_MAX)
    assert values["text"] == "x" * events.VALUE_CHARS_MAX


def record_of(name: str) -> logging.LogRecord:
    record = logging.LogRecord("tierstore", logging.WARNING, __file__, 1, name, None, None)
    record.event = name
    return record


def test_a_flood_of_one_name_is_a_few_lines_and_a_count_and_holds_up_no_other() -> None:
    now = 100.0
    limit = RateLimit(3, 10.0, clock=lambda: now)
    flood = [record_of("read_failed") for _ in range(50)]
    assert [limit.filter(record) for record in flood] == [True] * 3 + [False] * 47
    assert [record.left_out for record in flood[:3]] == [0, 0, 0]
    other = record_of("attached")
    assert limit.filter(other)
    now = 109.9
    assert not limit.filter(record_of("read_failed"))
    now = 110.0
    first, second = record_of("read_failed"), record_of("read_failed")
    assert limit.filter(first)
    assert limit.filter(second)
    assert (first.left_out, second.left_out, other.left_out) == (48, 0, 0)


def test_names_that_are_made_up_take_no_memory_without_end() -> None:
    limit = RateLimit(1, 10.0, clock=lambda: 0.0)
    assert all(limit.filter(record_of(f"name_{index}")) for index in range(events.NAMES_MAX + 1))
    assert len(limit._bursts) == events.NAMES_MAX
    assert limit.filter(record_of("name_0"))  # the one that was silent the longest was forgotten
    assert not limit.filter(record_of(f"name_{events.NAMES_MAX}"))


def test_the_count_of_those_left_out_is_on_the_next_line() -> None:
    stream = io.StringIO()
    now = 0.0
    handler = configure_logging("logfmt", stream)
    handler.filters[:] = [RateLimit(2, 10.0, clock=lambda: now)]
    for _ in range(5):
        event(logger, logging.WARNING, "read_failed", page=3)
    now = 10.0
    event(logger, logging.WARNING, "read_failed", page=3)
    lines = [parsed(line) for line in stream.getvalue().splitlines()]
    assert [line.get("left_out") for line in lines] == [None, None, "3"]


def test_the_limit_loses_no_count_when_threads_race() -> None:
    limit = RateLimit(5, 1e9)
    passed = []

    def flood() -> None:
        passed.append(sum(limit.filter(record_of("x")) for _ in range(500)))

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(passed) == 5
    assert limit._bursts["x"][2] == 4 * 500 - 5


def test_a_second_set_up_takes_the_place_of_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("logfmt", first)
    configure_logging("json", second, level=logging.WARNING)
    event(logger, logging.INFO, "quiet")
    event(logger, logging.WARNING, "loud")
    assert first.getvalue() == ""
    assert [json.loads(line)["event"] for line in second.getvalue().splitlines()] == ["loud"]


def test_another_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"log format 'xml': there are logfmt and json; give one of them"):
        configure_logging("xml")


def test_standard_error_is_where_events_go_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging()
    event(logger, logging.INFO, "started")
    assert "event=started" in stream.getvalue()


@pytest.mark.parametrize("fields", [{"level": 1}, {"two words": 1}, {"new\nline": 1}], ids=str)
def test_names_that_would_break_a_line_are_a_defect_of_the_caller(fields: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, TypeError)):
        event(logger, logging.INFO, "x", **fields)
