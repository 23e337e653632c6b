"""Attachments: waits for clients to leave an epoch end, and whoever outlasted one is not
waited for again until it left."""

from __future__ import annotations

import os

import numpy as np
import pytest

import tierstore
from tierstore import kernels
from tierstore.daemon import attachment, attachments
from tierstore.daemon.attachments import Attachments

WAIT_S = 0.2


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attachments, "GRACE_PERIOD_S", WAIT_S)
    made = Attachments()
    yield made
    made.close()


def set_active(block: np.ndarray, parity: int, count: int) -> None:
    block[64 * parity : 64 * parity + 8].view(np.uint64)[0] = count


def in_vain(clients: Attachments, version: int, epoch: int, *, is_last: bool = False) -> list[int]:
    """Waits; returns the processes that were waited for until the time was up."""
    waited_for: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attachments, "event", lambda *_, processes, **__: waited_for.extend(processes))
        clients.wait_for_grace_period(version, epoch, is_last=is_last)
    return waited_for


def test_a_client_that_stays_delays_one_change_and_no_more(clients: Attachments) -> None:
    _, block = clients.attach("a", 1, version=1)
    assert in_vain(clients, 1, 4) == []
    set_active(block, 0, 3)
    assert in_vain(clients, 1, 4) == [1]
    assert in_vain(clients, 1, 6) == []  # the same parity: it has timed out, and is not waited for
    assert in_vain(clients, 1, 5) == []
    set_active(block, 0, 0)
    assert in_vain(clients, 1, 6) == []  # it has left, and so is waited for from now on
    set_active(block, 0, 1)
    assert in_vain(clients, 1, 8) == [1]
    assert clients.waiting_for == []


def test_a_client_of_an_old_version_is_waited_for_once_until_it_moves(clients: Attachments) -> None:
    clients.attach("a", 1, version=1)
    assert in_vain(clients, 1, 2) == []
    assert in_vain(clients, 1, 2, is_last=True) == [1]
    assert in_vain(clients, 1, 2, is_last=True) == []
    assert clients.move("a", 2) is not None
    assert clients.versions_of("a") == [1, 2]
    clients.leave("a", 1)
    assert clients.versions_of("a") == [2]
    assert clients._of["a"].timed_out == set()  # nothing is kept of a version that it left
    assert in_vain(clients, 1, 2, is_last=True) == []


def test_a_gpu_pin_taken_after_its_client_timed_out_is_waited_for_all_the_same(
    clients: Attachments, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, block = clients.attach("a", os.getpid(), version=1, on_gpu=True)
    assert in_vain(clients, 1, 4, is_last=True) == [os.getpid()]  # it pins nothing: it times out like any other
    control = np.zeros(2 * kernels.CONTROL_BYTES, dtype=np.uint8)
    control = control[-control.ctypes.data % 64 :][: kernels.CONTROL_BYTES]
    kernels.publish_epoch(control, 1, 4)
    pin = kernels.EpochPin(control, 1, block)
    assert pin.pin() == 4
    monkeypatch.setattr(attachments, "PIN_WAIT_S", WAIT_S)
    for is_last in (True, False):
        assert not clients.wait_for_grace_period(1, 4, is_last=is_last)
        assert clients.waiting_for == [os.getpid()]
    clients.detach("a")
    assert not clients.wait_for_grace_period(1, 4, is_last=False)  # this process maps its block, and may pin it still
    pin.unpin(4)
    assert clients.wait_for_grace_period(1, 4, is_last=False)
    assert clients.waiting_for == []


def test_an_unrecorded_pin_of_a_gpu_client_is_released_with_the_client(clients: Attachments) -> None:
    _, block = clients.attach("a", os.getpid(), version=1, on_gpu=True)
    control = np.zeros(2 * kernels.CONTROL_BYTES, dtype=np.uint8)
    control = control[-control.ctypes.data % 64 :][: kernels.CONTROL_BYTES]
    kernels.publish_epoch(control, 1, 4)
    pin = kernels.EpochPin(control, 1, block)
    assert pin.pin() == 4
    kernels.publish_epoch(control, 1, 5)
    assert pin.pin() == 5
    assert kernels.active_pins(block) == (1, 1)
    with pytest.raises(ValueError, match="not pinned"):
        pin.unpin(6)
    pin.unpin(5)
    child = os.fork()
    if child == 0:
        del pin
        os._exit(0)  # the counts are the parent's
    os.waitpid(child, 0)
    assert kernels.active_pins(block) == (1, 0)
    del pin
    assert kernels.active_pins(block) == (0, 0)


def test_orphans_have_a_limit(clients: Attachments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "ORPHANS_MAX", 2)
    for who in "ab":
        clients.attach(who, os.getpid(), version=1, on_gpu=True)
        clients.detach(who)
    with pytest.raises(tierstore.DaemonError, match="2 clients are gone whose GPUs may still read"):
        clients.attach("c", os.getpid(), version=1, on_gpu=True)
    clients.attach("c", os.getpid(), version=1)


def test_a_client_that_left_or_has_the_version_is_not_moved(clients: Attachments) -> None:
    clients.attach("a", 1, version=1)
    assert clients.move("a", 1) is None
    clients.detach("a")
    assert clients.move("a", 2) is None
    assert clients.clients() == []


def test_no_descriptor_for_a_block_is_a_named_error_and_leaves_nothing(
    clients: Attachments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(attachment, "make_client_block", fails)
    with pytest.raises(tierstore.DaemonError, match=r"process 7: Too many open files: .*hard limit.*raise"):
        clients.attach("a", 7, version=1)
    assert clients.clients() == []
    assert clients.readers() == []


def test_the_reports_of_who_is_gone_can_be_read_once_more(clients: Attachments) -> None:
    _, block = clients.attach("a", 1, version=1)
    reports = np.zeros(3, dtype=kernels.REPORT)
    reports["key"] = 5, 6, 7
    kernels.ReportWriter(block).add(reports)
    clients.detach("a")
    (reader,) = clients.take_last_readers()
    out = np.empty(10, dtype=kernels.REPORT)
    assert reader.take(out) == 3
    assert out["key"][:3].tolist() == [5, 6, 7]
    assert clients.take_last_readers() == []
