"""Messages between a process and its workers, over pipes: a head in JSON, and a body of bytes.

Input: a function that answers requests; requests on standard input. Output: answers on what was standard output, until
the input ends. Whatever a library prints goes to standard error. Both sides use this file; it imports nothing of ours.
Errors: what the function raises becomes an answer that names it; `EOFError` if the other side is gone.

Layout of a message: bytes of the head u32, bytes of the body u64, little-endian; head; body.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

PREFIX = struct.Struct("<IQ")
HEAD_BYTES_MAX = 1 << 26  # a request carries a tokenizer's JSON in its body, not here
STDERR_BYTES_MAX = 1 << 20  # of what a library prints

Message = tuple[dict[str, Any], Iterable[Any]]  # a head, and the parts of the body: bytes or contiguous arrays


class RefusedError(Exception):
    """What was asked for cannot be had from the file. kind: the class of error that it becomes on the other side."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def send(fd: int, head: dict[str, Any], parts: Iterable[Any] = ()) -> None:
    """Writes one message. Blocks until the other side has taken it."""
    views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
    data = json.dumps(head).encode()
    prefix = PREFIX.pack(len(data), sum(map(len, views)))
    for left in (memoryview(prefix + data), *views):
        while left:
            left = left[os.write(fd, left) :]


def receive(
    read: Callable[[memoryview], int], allocate: Callable[[int], Any] = bytearray
) -> tuple[dict[str, Any], memoryview]:
    """Returns the next message; raises `EOFError` if the other side is gone.

    read: as `readinto` of a file. allocate: memory for so many bytes of a body.
    """
    head_bytes, body_bytes = PREFIX.unpack(_exactly(read, bytearray(PREFIX.size)))
    if head_bytes > HEAD_BYTES_MAX:
        raise EOFError(f"a message with a head of {head_bytes} bytes")
    head = json.loads(bytes(_exactly(read, bytearray(head_bytes))))
    return head, _exactly(read, allocate(body_bytes))


def _exactly(read: Callable[[memoryview], int], data: Any) -> memoryview:
    left = memoryview(data)
    while left:
        taken = read(left)
        if not taken:
            raise EOFError(f"{len(left)} bytes did not come")
        left = left[taken:]
    return memoryview(data)


def serve(handle: Callable[[dict[str, Any], memoryview], Iterator[Message]], memory_bytes: int) -> None:
    """Answers requests until there are no more. The last answer of each has {"end": true}, or names the error.

    memory_bytes: what this process may take beyond what it has now.
    """
    out = os.dup(1)
    os.dup2(2, 1)
    _limit(memory_bytes)

    def read(view: memoryview) -> int:
        return os.readv(0, [view])

    with contextlib.suppress(EOFError, BrokenPipeError):  # nobody asks any more, or nobody waits for the answer
        while True:
            head, body = receive(read)
            answer = _answers(handle, head, body)
            for parts in answer:
                send(out, *parts)


def _answers(
    handle: Callable[[dict[str, Any], memoryview], Iterator[Message]], head: dict[str, Any], body: memoryview
) -> Iterator[Message]:
    try:
        yield from handle(head, body)
    except RefusedError as error:
        yield {"error": error.kind, "text": str(error)}, ()
    except MemoryError as error:
        yield {"error": "memory", "text": str(error)}, ()
    except OSError as error:
        if error.errno is None:
            yield {"error": "damaged", "text": str(error)}, ()
        else:
            yield {"error": "system", "errno": error.errno, "text": str(error)}, ()
    except Exception as error:
        yield {"error": "damaged", "text": f"{type(error).__name__}: {error}"}, ()
    else:
        yield {"end": True}, ()


def _limit(memory_bytes: int) -> None:
    with open("/proc/self/statm") as file:
        now_bytes = int(file.read().split()[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, now_bytes + memory_bytes),
        (resource.RLIMIT_FSIZE, STDERR_BYTES_MAX),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def memory_argument() -> int:
    """Returns the limit of memory that the worker was started with."""
    return int(sys.argv[1])
