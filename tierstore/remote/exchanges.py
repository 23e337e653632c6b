"""Requests to several servers at once, by one thread: all are sent, then answers are taken in turn as they come.

The last one is sent as a call that blocks if its answer is one message: grpc takes a fifth less time for those.

Input: attempts, by member. Output: answers, whose rows are where they belong. Errors: what a server raised; a server
that is away or busy is asked again until the time is up, while the others' answers stay.

Why one thread: grpc receives beside it, and copies of rows are short. A thread for each server was not faster (0.90 to
1.06 of this time for one token), and could still write to a buffer after an error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ..errors import DaemonError
from .channel import RETRY_S_MAX, RETRY_S_MIN, Connection, Stream, TryAgainError
from .member import PASSED_OVER, Member
from .replies import Answer
from .requests import Attempt


class Exchange:
    """One member's requests, one after another. Of one thread.

    Attributes:
        answers: Those that are whole, in the attempts' order.
        connection: The replica that gave the last one.
    """

    def __init__(self, member: Member, attempts: Sequence[Attempt]) -> None:
        self.member, self.answers = member, list[Answer]()
        self.connection: Connection | None = None
        self._attempts = attempts
        self._stream: Stream | None = None
        self._answer: Answer | None = None

    @property
    def is_done(self) -> bool:
        """Whether all answers are there."""
        return len(self.answers) == len(self._attempts)

    @property
    def is_last_small(self) -> bool:
        """Whether one request is left, and its answer is one message."""
        return len(self.answers) == len(self._attempts) - 1 and self._attempts[-1].is_small

    def ask(self, until: float) -> None:
        """Sends the next request, and blocks for its answer, which is one message. Raises like `step`."""
        attempt = self._attempts[len(self.answers)]
        answer = attempt.answer()
        connection, data = self.member.ask(attempt, until)
        try:
            answer.take(data)
            answer.check_whole()
        except PASSED_OVER as error:
            raise self.member.passed_over(connection, error) from None
        self.connection = connection
        self.answers.append(answer)

    def begin(self, until: float) -> None:
        """Sends the next request."""
        attempt = self._attempts[len(self.answers)]
        self._answer = attempt.answer()
        self._stream = self.member.begin(attempt, until)

    def step(self, until: float) -> None:
        """Takes the next message, and blocks for it; behind the last one, sends the next request.

        Raises `TryAgainError` where the request must be sent again: then `begin` does it. A replica that answers
        garbage counts as one that is gone; what it wrote is written over.
        """
        stream, answer = self._stream, self._answer
        assert stream is not None
        assert answer is not None
        try:
            data = stream.next()
            if data is not None:
                answer.take(data)
                return
            answer.check_whole()
        except PASSED_OVER as error:
            self.cancel()
            raise self.member.passed_over(stream.connection, error) from None
        self.connection = stream.connection
        self.answers.append(answer)
        self._stream = None
        if not self.is_done:
            self.begin(until)

    def cancel(self) -> None:
        """Gives the request that is under way up: nothing is written afterwards."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()


def carry_out(exchanges: Sequence[Exchange], until: float, closed: threading.Event) -> None:
    """Has all exchanges answered. Blocks until `until` at most; closed: ends the pauses between tries.

    Raises:
        DaemonError: A server did not answer in time. All else as `Connection.unary`. Nothing is written afterwards.
    """
    pause_s, waiting = RETRY_S_MIN, [each for each in exchanges if not each.is_done]
    try:
        while waiting:
            again, last = _in_turn(waiting, until)
            if again and (time.monotonic() + pause_s >= until or closed.wait(pause_s)):
                raise DaemonError(str(last)) from last
            waiting, pause_s = again, min(2 * pause_s, RETRY_S_MAX)
    finally:
        for each in exchanges:
            each.cancel()


def _in_turn(exchanges: Sequence[Exchange], until: float) -> tuple[list[Exchange], TryAgainError | None]:
    """Sends what exchanges ask next, and takes the answers in turn; returns which must ask again, and why the last."""
    again: list[Exchange] = []
    last: TryAgainError | None = None
    *others, final = exchanges
    for each in others:
        each.begin(until)
    active = others
    if not final.is_last_small:
        final.begin(until)
        active = [*others, final]
    else:
        try:
            final.ask(until)
        except TryAgainError as error:
            again, last = [final], error
    while active:
        for each in active:
            try:
                each.step(until)
            except TryAgainError as error:
                again.append(each)
                last = error
        active = [each for each in active if not each.is_done and each not in again]
    return again, last
