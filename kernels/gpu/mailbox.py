"""The block of page-locked host memory by which a device asks the host for entries;
kernels/cpu/mailbox.h has the same numbers.

Byte offsets of int64 words. The device writes `requested` last, the host `answered` last; each is the number of a step.
"""

import triton.language as tl

REQUESTED = tl.constexpr(0)  # device: the step whose misses are in the block
NUM_MISSES = tl.constexpr(8)  # device
ANSWERED = tl.constexpr(64)  # host: the step whose entries are in the block
STATUS = tl.constexpr(72)  # host: 0 where all of them are
TIMED_OUT = tl.constexpr(128)  # device: the step that it gave up waiting for
INVALID_TOKEN_POSITION = tl.constexpr(136)  # device: 1 + the position of a token id outside the vocabulary
FAILED = tl.constexpr(144)  # device: a step whose late entries did not come, whatever the reason
