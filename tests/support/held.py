"""What this process holds at one moment: its open files, threads and child processes.

A test compares by `<=`: what an earlier test left may end meanwhile, and must not count against this one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections import Counter

import psutil


def open_files() -> frozenset[str]:
    """Each open descriptor with what it leads to: a number that is closed and used again counts as another.

    What has no file (eventfd, epoll) is counted: gRPC, of an earlier test, makes its own anew when a test forks.
    """
    gc.collect()  # sockets of earlier tests, which errors' traces may hold
    found, without_file = set[str](), Counter[str]()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            leads_to = os.readlink(f"/proc/self/fd/{number}")
            if leads_to.startswith("anon_inode:"):
                without_file[leads_to] += 1
                found.add(f"{leads_to}, {without_file[leads_to]} of them")
            else:
                found.add(f"descriptor {number}: {leads_to}")
    return frozenset(found)


def running_threads() -> frozenset[str]:
    """The threads that Python knows."""
    return frozenset(f"thread {thread.name}, {thread.ident}" for thread in threading.enumerate())


def held() -> frozenset[str]:
    """Open files, threads that Python knows, and processes that this one started and has not waited for."""
    processes = {f"process {child.pid}" for child in psutil.Process().children()}
    return open_files() | running_threads() | processes
