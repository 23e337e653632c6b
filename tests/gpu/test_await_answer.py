"""The device's wait for the host ends with the answer, with the refusal or at its bound;
the next step begins afresh."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.host_memory import POISON_INT64, address_of, host_bytes, host_words, wait_for_device

from tierstore.kernels import reference_mailbox
from tierstore.kernels.gpu.await_answer import await_answer
from tierstore.kernels.gpu.misses import StepState, post_misses

REQUESTED, NUM_MISSES, ANSWERED, STATUS, TIMED_OUT, FAILED = 0, 1, 8, 9, 16, 18  # in words
ENDLESS = 2**40  # looks: where a test waits this long, it is red
SECONDS_MAX = 60.0


class Host:
    """A thread that answers every step that it sees asked, each after a while, with the statuses given, then 0."""

    def __init__(self, mailbox: np.ndarray, statuses: tuple[int, ...] = (), delay_seconds: float = 0.0) -> None:
        self.mailbox, self.statuses, self.delay_seconds = mailbox, list(statuses), delay_seconds
        self.served: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        deadline = time.monotonic() + SECONDS_MAX
        while not self._stop.is_set() and time.monotonic() < deadline:
            asked = int(self.mailbox[REQUESTED])
            if asked == self.mailbox[ANSWERED]:
                time.sleep(0)
                continue
            self._stop.wait(self.delay_seconds)
            self.served.append((asked, int(self.mailbox[NUM_MISSES])))
            self.mailbox[STATUS] = self.statuses.pop(0) if self.statuses else 0
            self.mailbox[ANSWERED] = asked

    def close(self) -> None:
        self._stop.set()
        self._thread.join(SECONDS_MAX)
        assert not self._thread.is_alive()


@pytest.fixture
def mailbox() -> np.ndarray:
    return host_words(24)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Hosts that end with the test."""
    opened: list[Host] = []
    yield opened
    for host in opened:
        host.close()


@pytest.fixture
def state(device: torch.device) -> StepState:
    words = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(5)]
    return StepState(*words, batch_counts=torch.zeros(2, dtype=torch.int64, device=device))


def step_with(state: StepState, mailbox: np.ndarray, num_misses: int, spins_max: int = ENDLESS) -> None:
    state.count.fill_(num_misses)
    post_misses(state, address_of(mailbox), 8)
    await_answer(state, address_of(mailbox), spins_max)
    wait_for_device(state.count.device)


def words_of(state: StepState) -> tuple[int, int, int]:
    return int(state.step), int(state.ready), int(state.failed)


def test_a_step_is_ready_when_the_host_has_answered(state: StepState, mailbox: np.ndarray, hosts: list[Host]) -> None:
    hosts.append(Host(mailbox, delay_seconds=0.05))
    step_with(state, mailbox, 3)
    assert words_of(state) == (1, 1, 0)
    assert hosts[0].served == [(1, 3)]
    assert mailbox[[TIMED_OUT, FAILED]].tolist() == [0, 0]


def test_a_step_without_misses_does_not_look_at_the_mailbox(state: StepState) -> None:
    poisoned = host_bytes(192).view(np.int64)
    step_with(state, poisoned, 0)  # nobody would answer
    assert words_of(state) == (1, 1, 0)
    assert (poisoned == POISON_INT64).all()


@pytest.mark.parametrize("spins_max", [1, 2, 100])
def test_a_wait_ends_at_its_bound_and_both_sides_know(state: StepState, mailbox: np.ndarray, spins_max: int) -> None:
    step_with(state, mailbox, 3, spins_max)
    assert words_of(state) == (1, 0, 1)
    assert mailbox[[TIMED_OUT, FAILED]].tolist() == [1, 1]
    assert mailbox[[REQUESTED, NUM_MISSES, ANSWERED, STATUS]].tolist() == [1, 3, 0, 0]


def test_a_step_that_has_failed_is_not_waited_for_again(state: StepState, mailbox: np.ndarray) -> None:
    step_with(state, mailbox, 3, 10)
    mailbox[TIMED_OUT] = 0
    await_answer(state, address_of(mailbox), ENDLESS)
    wait_for_device(state.count.device)
    assert words_of(state) == (1, 0, 1)
    assert mailbox[TIMED_OUT] == 0


def test_an_answer_that_is_there_is_seen_at_the_first_look(state: StepState, mailbox: np.ndarray) -> None:
    mailbox[ANSWERED] = 1
    step_with(state, mailbox, 3, 1)
    assert words_of(state) == (1, 1, 0)


@pytest.mark.parametrize("status", [1, 2, 3, -1, 2**40])
def test_a_step_that_the_host_refuses_has_failed(state: StepState, mailbox: np.ndarray, status: int) -> None:
    mailbox[[ANSWERED, STATUS]] = 1, status
    step_with(state, mailbox, 3)
    assert words_of(state)[::2] == (1, 1)
    assert mailbox[[TIMED_OUT, FAILED]].tolist() == [0, 1]


def test_an_answer_to_another_step_is_none(state: StepState, mailbox: np.ndarray) -> None:
    for other in (-1, 0, 2, POISON_INT64):
        mailbox[ANSWERED] = other
        state.step.fill_(0)
        state.failed.fill_(0)
        step_with(state, mailbox, 3, 20)
        assert words_of(state) == (1, 0, 1)


def test_the_step_after_a_failed_one_is_right(state: StepState, mailbox: np.ndarray, hosts: list[Host]) -> None:
    step_with(state, mailbox, 3, 10)
    hosts.append(Host(mailbox, statuses=(0, 1)))  # comes late to step 1, which it may not see any more
    for step in (2, 3, 4):
        step_with(state, mailbox, step)
        assert int(state.step) == step
        assert int(state.ready) == step
    assert int(state.failed) in (2, 3)  # the second that it served
    step_with(state, mailbox, 0)
    assert words_of(state)[:2] == (5, 5)
    assert int(state.failed) < 5


@pytest.mark.parametrize("seed", range(2))
def test_many_steps_end_as_the_references_do(
    state: StepState, mailbox: np.ndarray, hosts: list[Host], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 0, 1, 5, 8], 100)
    statuses = tuple(int(status) for status in rng.choice([0, 0, 0, 1, 3], int((counts > 0).sum())))
    hosts.append(Host(mailbox, statuses))
    model, model_mailbox, left = reference_mailbox.Step(), np.zeros(24, dtype=np.int64), list(statuses)
    for count in counts.tolist():
        step_with(state, mailbox, count)
        model.count = count
        reference_mailbox.post_misses(model, model_mailbox, 8)
        if count:
            model_mailbox[[ANSWERED, STATUS]] = model.step, left.pop(0)
        reference_mailbox.await_answer(model, model_mailbox)
        assert words_of(state) == (model.step, model.ready, model.failed)
        assert int(state.posted) == model.posted
    assert state.batch_counts.tolist() == [model.num_batches, model.num_without_misses]
    np.testing.assert_array_equal(mailbox, model_mailbox)
    asked = [(step + 1, count) for step, count in enumerate(counts.tolist()) if count]
    assert hosts[0].served == asked


def test_what_cannot_be_waited_for_is_refused(state: StepState, mailbox: np.ndarray) -> None:
    with pytest.raises(ValueError, match="spins_max is 0"):
        await_answer(state, address_of(mailbox), 0)
    for address in (0, address_of(mailbox) + 8, -64):
        with pytest.raises(ValueError, match="multiple of 64"):
            await_answer(state, address, 1)
