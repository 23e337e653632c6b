"""Requests to several servers are all sent before an answer is waited for, and who is asked again keeps no one else."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tierstore.errors import DaemonError
from tierstore.remote.channel import TryAgainError
from tierstore.remote.exchanges import Exchange, carry_out
from tierstore.remote.requests import Attempt


class FakeAnswer:
    """Takes one message."""

    def __init__(self) -> None:
        self.data = b""

    def take(self, data: bytes) -> None:
        self.data += data

    def check_whole(self) -> None:
        assert self.data


class FakeMember:
    """A server whose answers are `name`; writes down what it is asked. away: how often it is away first."""

    def __init__(self, name: str, log: list[str], away: int = 0) -> None:
        self.name, self._log, self._away = name, log, away

    def begin(self, attempt: Attempt, until: float) -> FakeMember:  # noqa: ARG002
        self._log.append(f"send {self.name}")
        self._left = [self.name.encode()]
        return self

    def ask(self, attempt: Attempt, until: float) -> tuple[Any, bytes]:  # noqa: ARG002
        self._log.append(f"send and wait {self.name}")
        self._raise_if_away()
        return self, self.name.encode()

    def next(self) -> bytes | None:
        self._log.append(f"wait {self.name}")
        self._raise_if_away()
        return self._left.pop() if self._left else None

    def cancel(self) -> None:
        self._log.append(f"cancel {self.name}")

    @property
    def connection(self) -> Any:
        return self

    def passed_over(self, connection: Any, error: Exception) -> Exception:  # noqa: ARG002
        return error

    def _raise_if_away(self) -> None:
        if self._away:
            self._away -= 1
            raise TryAgainError(f"{self.name} is away")


def exchange(member: FakeMember, *, is_small: bool = True, requests: int = 1) -> Exchange:
    attempt = Attempt("Lookup", b"", FakeAnswer, is_small)  # type: ignore[arg-type]
    return Exchange(member, [attempt] * requests)  # type: ignore[arg-type]


def carried_out(*exchanges: Exchange, seconds: float = 30) -> None:
    carry_out(exchanges, time.monotonic() + seconds, threading.Event())


@pytest.mark.parametrize("is_small", [True, False])
def test_all_requests_are_sent_before_an_answer_is_waited_for(is_small: bool) -> None:
    log: list[str] = []
    each = [exchange(FakeMember(name, log), is_small=is_small) for name in "abc"]
    carried_out(*each)
    assert log[:4] == ["send a", "send b", "send and wait c" if is_small else "send c", "wait a"]
    found = [[answer.data for answer in one.answers] for one in each]  # type: ignore[attr-defined]
    assert found == [[b"a"], [b"b"], [b"c"]]
    assert [one.connection.name for one in each if one.connection] == ["a", "b", "c"]  # type: ignore[attr-defined]
    assert not any(entry.startswith("cancel") for entry in log)


@pytest.mark.parametrize("away", ["a", "b"])
def test_only_a_server_that_was_away_is_asked_again(away: str) -> None:
    log: list[str] = []
    each = [exchange(FakeMember(name, log, away=2 * (name == away))) for name in "ab"]
    carried_out(*each)
    sent = [entry for entry in log if entry.startswith("send")]
    assert sent == ["send a", "send and wait b"] + [f"send and wait {away}"] * 2
    assert all(one.is_done for one in each)


def test_a_server_that_stays_away_is_named_and_nothing_is_left_under_way() -> None:
    log: list[str] = []
    each = [exchange(FakeMember("a", log)), exchange(FakeMember("b", log, away=1 << 30))]
    with pytest.raises(DaemonError, match="b is away"):
        carried_out(*each, seconds=0.05)
    assert each[0].is_done
    assert not each[1].is_done
    with pytest.raises(DaemonError, match="a is away"):
        carried_out(exchange(FakeMember("a", log, away=1 << 30), is_small=False), seconds=0.05)


def test_a_failure_of_the_last_gives_the_requests_of_the_others_up() -> None:
    log: list[str] = []

    class Broken(FakeMember):
        def ask(self, attempt: Attempt, until: float) -> tuple[Any, bytes]:
            super().ask(attempt, until)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carried_out(exchange(FakeMember("a", log)), exchange(Broken("b", log)))
    assert log == ["send a", "send and wait b", "cancel a"]


def test_several_requests_to_one_server_follow_one_another() -> None:
    log: list[str] = []
    carried_out(exchange(FakeMember("a", log), requests=2), exchange(FakeMember("b", log), requests=2))
    assert log[:2] == ["send a", "send b"]
    assert [log.count(f"send {name}") for name in "ab"] == [2, 2]
