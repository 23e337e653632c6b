"""What this process holds at one moment: its open files, threads and child processes.

A test compares by `<=`: what an earlier test left may end meanwhile, and must not count against this one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading

import psutil


def open_files() -> frozenset[str]:
    """Each open descriptor with what it leads to: a number that is closed and used again counts as another."""
    gc.collect()  # sockets of earlier tests, which errors' traces may hold
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found.add(f"descriptor {number}: {os.readlink(f'/proc/self/fd/{number}')}")
    return frozenset(found)


def running_threads() -> frozenset[str]:
    """The threads that Python knows."""
    return frozenset(f"thread {thread.name}, {thread.ident}" for thread in threading.enumerate())


def held() -> frozenset[str]:
    """Open files, threads that Python knows, and processes that this one started and has not waited for."""
    processes = {f"process {child.pid}" for child in psutil.Process().children()}
    return open_files() | running_threads() | processes
