"""The block of page-locked host memory by which a device requests entries; kernels/cpu/mailbox.h draws and defines it.

Byte offsets of int64 words. The device writes `requested` last, the host `answered` last; each is the number of a step.
"""

import triton.language as tl

from .. import MAILBOX_STARTS

# Written by the device: the step whose misses are in the block, and how many.
REQUESTED = tl.constexpr(MAILBOX_STARTS["requested"])
NUM_MISSES = tl.constexpr(MAILBOX_STARTS["num_misses"])

# Written by the host: the step whose entries are in the block, and 0 if all of them are.
ANSWERED = tl.constexpr(MAILBOX_STARTS["answered"])
STATUS = tl.constexpr(MAILBOX_STARTS["status"])

# Written by the device: the step that it gave up waiting for; 1 + the position of a token id outside the vocabulary;
# a step whose entries did not come, whatever the reason.
TIMED_OUT = tl.constexpr(MAILBOX_STARTS["timed_out"])
INVALID_TOKEN_POSITION = tl.constexpr(MAILBOX_STARTS["invalid_token_position"])
FAILED = tl.constexpr(MAILBOX_STARTS["failed"])
