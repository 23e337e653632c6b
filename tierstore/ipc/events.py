"""Events of the daemon as lines that programs can read: logfmt, or JSON.

Input: log records, those of `event` and ordinary ones. Output: one line each, whatever their values hold: what
would break a line, or a terminal, is escaped, and long values are cut. Events of one name that come faster than a limit
are left out and counted, so that a failing disk fills no log; the next line of that name says how many were.
"""

from __future__ import annotations

import collections
import json
import logging
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from ..errors import ConfigError

FORMATS = ("logfmt", "json")
VALUE_CHARS_MAX = 4096  # of a value, a traceback included; what is longer is cut
BURST_MAX = 20  # events of one name
BURST_S = 10.0  # in so long
NAMES_MAX = 256  # names whose rate is kept; beyond, the one that was silent the longest is forgotten

_BARE = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but for space, quote, equals sign and backslash
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = frozenset({"time", "level", "event", "message", "left_out", "error"})


def event(
    logger: logging.Logger, level: int, name: str, /, *, error: BaseException | None = None, **fields: Any
) -> None:
    """Logs that something of the name `name` happened, with values. Any thread; blocks on the log's stream only.

    level: of `logging`. error: shown with its class and, at level ERROR or above, its traceback. Names of fields are
    words of ASCII letters, digits and underscores, and none that every line has.
    """
    assert all(map(_NAME.fullmatch, (name, *fields))), (name, fields)
    assert not fields.keys() & _RESERVED, fields
    if logger.isEnabledFor(level):
        shown = error if level >= logging.ERROR else None
        if error is not None:
            fields["error"] = f"{type(error).__name__}: {error}"
        message = " ".join(filter(None, (name, _logfmt_line(_plain_values(fields)))))  # for logs that others set up
        logger.log(level, message, exc_info=shown, extra={"event": name, "fields": fields}, stacklevel=2)


def configure_logging(
    format: str = "logfmt",
    stream: TextIO | None = None,
    *,
    level: int = logging.INFO,
    burst_max: int = BURST_MAX,
    burst_s: float = BURST_S,
) -> logging.Handler:
    """Sends everything that tierstore logs to a stream (by default standard error), a line each; returns the handler.

    format: "logfmt" or "json". Of one name, at most burst_max events in burst_s seconds are written. A second call
    takes the first one's place. Raises `ConfigError` for another format.
    """
    if format not in FORMATS:
        raise ConfigError(f"log format {format!r}: there are {' and '.join(FORMATS)}; give one of them")
    handler = _EventHandler(stream or sys.stderr)
    handler.setFormatter(EventFormatter(format))
    handler.addFilter(RateLimit(burst_max, burst_s))
    logger = logging.getLogger("tierstore")
    for other in [other for other in logger.handlers if isinstance(other, _EventHandler)]:
        logger.removeHandler(other)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return handler


class _EventHandler(logging.StreamHandler):
    """A handler of ours, so that `configure_logging` knows which one to replace."""


class EventFormatter(logging.Formatter):
    """Makes one line of a log record, as `format` says: "logfmt" or "json". Time is UTC."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self._as_line = _json_line if format == "json" else _logfmt_line

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as a line of ASCII without its end. Ordinary records are events of the name "log"."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
        }
        if not hasattr(record, "event"):
            values["message"] = record.getMessage()
        values |= getattr(record, "fields", {})
        if left_out := getattr(record, "left_out", 0):
            values["left_out"] = left_out
        if record.exc_info and record.exc_info[0]:
            values["traceback"] = self.formatException(record.exc_info)
        return self._as_line(_plain_values(values))


class RateLimit(logging.Filter):
    """Lets at most burst_max records of one name pass in burst_s seconds of `clock`,
    and has the next one say how many did not.

    Any thread. The name of an ordinary record is its message before its arguments are put in.
    """

    def __init__(self, burst_max: int, burst_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._burst_max, self._burst_s, self._clock = burst_max, burst_s, clock
        self._lock = threading.Lock()  # guards `_bursts`
        # By name: [start, passed, left out], the latest last.
        self._bursts: collections.OrderedDict[str, list[float]] = collections.OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a record passes; one that does gets `left_out`,
        how many of its name did not since the last."""
        name = str(getattr(record, "event", record.msg))
        now = self._clock()
        with self._lock:
            burst = self._bursts.setdefault(name, [now, 0, 0])
            self._bursts.move_to_end(name)
            if len(self._bursts) > NAMES_MAX:
                self._bursts.popitem(last=False)
            if now - burst[0] >= self._burst_s:
                burst[:2] = now, 0
            if burst[1] >= self._burst_max:
                burst[2] += 1
                return False
            burst[1] += 1
            record.left_out, burst[2] = int(burst[2]), 0
        return True


def _plain_values(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    """Returns a value that JSON has as a scalar; texts are cut at VALUE_CHARS_MAX."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = str(value)
    return text if len(text) <= VALUE_CHARS_MAX else f"{text[:VALUE_CHARS_MAX]}... ({len(text)} characters)"


def _json_line(values: dict[str, Any]) -> str:
    return json.dumps(values)  # of ASCII: what else there is, and what ends a line, is escaped


def _logfmt_line(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={_logfmt_value(value)}" for name, value in values.items())


def _logfmt_value(value: Any) -> str:
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else json.dumps(value)
    return json.dumps(value)
