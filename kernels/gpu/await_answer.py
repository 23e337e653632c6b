"""The wait of a device for the host's answer: bounded, and ending in a step that is ready or one that has failed.

Input: the step that `post_misses` began, and the host's words in the mailbox. Output: the step's number in `ready` or
in `failed`, or in both if the host answered that some entries could not be read. The next launch scatters the entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import launching
from .mailbox import ANSWERED, FAILED, STATUS, TIMED_OUT
from .misses import StepState, check_mailbox


def await_answer(state: StepState, mailbox_address: int, spins_max: int) -> None:
    """Waits, on the device, until the host has answered the step at hand;
    a step that is ready or has failed waits no more.

    mailbox_address: of the block that mailbox.py describes, at a multiple of 64; spins_max: how often `answered` is
    looked at before the step is given up, 1 or more; each look goes over the bus, about a microsecond. Given up, the
    step's number is stored as `timed_out` in the mailbox and as `state.failed`; a status other than 0 is a failed step
    too. `failed` in the mailbox reports either to the host. Asynchronous: the
    caller does not wait, what was launched behind this does. One program of one warp; a ready step costs three loads.
    """
    check_mailbox(mailbox_address)
    if spins_max < 1:
        raise ValueError(f"spins_max is {spins_max}, must be 1 or more: an answer is seen by looking for it")
    with launching.on_device(state.count.device):
        _await_answer[(1,)](state.step, state.ready, state.failed, mailbox_address, spins_max, num_warps=1)


@triton.jit(do_not_specialize=["mailbox", "spins_max"])
def _await_answer(
    step: tl.tensor,
    ready: tl.tensor,
    failed: tl.tensor,
    mailbox: tl.int64,
    spins_max: tl.int64,
) -> None:
    number = tl.load(step)
    if (tl.load(ready) != number) & (tl.load(failed) != number):
        answered = (mailbox + ANSWERED).to(tl.pointer_type(tl.int64))
        seen = tl.load(answered, volatile=True)
        spins = tl.full((), 1, tl.int64)
        while (seen != number) & (spins < spins_max):
            seen = tl.load(answered, volatile=True)
            spins += 1
        if seen == number:
            # A device word is exchanged, for acquire: an atomic operation on a word of
            # the host's might undo a write of it.
            tl.atomic_xchg(ready, number, sem="acq_rel", scope="sys")
            if tl.load((mailbox + STATUS).to(tl.pointer_type(tl.int64)), volatile=True) != 0:
                tl.store(failed, number)
                tl.store((mailbox + FAILED).to(tl.pointer_type(tl.int64)), number)
        else:
            tl.store((mailbox + TIMED_OUT).to(tl.pointer_type(tl.int64)), number)
            tl.store(failed, number)
            tl.store((mailbox + FAILED).to(tl.pointer_type(tl.int64)), number)
