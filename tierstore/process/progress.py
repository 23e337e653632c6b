"""How a long job reports its progress. Input: none. Output: one type. Errors: none."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called now and then, in the thread that started the job, with what is done and what there is in all.

Both count the same thing: bytes, rows or entries, as the job says. What it raises ends the job.
"""
