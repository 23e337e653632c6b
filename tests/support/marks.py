"""What the markers of tests mean, and which files have them; `tests/conftest.py` registers and sets them.

- `gpu`: runs kernels of `kernels/gpu`: on the GPU if the machine has one, else in Triton's interpreter, slowly.
- `daemon`: talks with a daemon or a gRPC server, in this process or in one of its own.
- `process`: starts other programs, or kills, starves or interrupts processes.
- `long`: takes seconds where others take milliseconds: whole commands, whole models, statistics over many runs.
- `slow`: a sweep, a statistic or a soak that finds what the other tests find too, or very rarely more.

`make check` runs what has none of them, `make test` all but `slow`, `make test-all` everything. A folder or a file of
the table MARKS has its marks as a whole. A test that uses a name of the table USES, itself or by a function or a
fixture of its file, has that name's marks. A class or a single test may say more itself, with `pytest.mark`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from types import CodeType, FunctionType
from typing import Any

import pytest

MARKERS = {
    "gpu": "runs kernels of kernels/gpu, on a GPU or in Triton's interpreter",
    "daemon": "talks with a daemon or a gRPC server",
    "process": "starts other programs, or kills, starves or interrupts processes",
    "long": "takes seconds: whole commands, whole models, statistics over many runs",
    "slow": "a sweep, a statistic or a soak, for make test-all",
}
# By the path below tests/, without its ending; a folder's marks are those of all its files.
MARKS: dict[str, tuple[str, ...]] = {
    "attached": ("daemon",),
    "attached/test_attached_hbm": ("gpu",),
    "attached/test_gpu_clients": ("gpu", "process"),
    "bench": ("process",),
    "daemon": ("daemon",),
    "decisions/test_intervals": ("long",),
    "decisions/test_replan": ("long",),
    "docs/test_errors_page": ("long",),
    "engram_adapter/ranks": ("process", "long"),
    "engram_adapter/test_around_models": ("long",),
    "engram_adapter/test_attached_embedding": ("daemon",),
    "engram_adapter/test_codec_libraries": ("long",),
    "engram_adapter/test_device_embedding": ("gpu",),
    "engram_adapter/test_device_streams": ("gpu",),
    "engram_adapter/test_engram_layer": ("long",),
    "engram_adapter/test_load_pretrained": ("long",),
    "engram_adapter/test_lookup_operators": ("long",),
    "engram_adapter/test_pickled_embedding": ("long",),
    "engram_adapter/test_read_ahead": ("long",),
    "engram_adapter/test_real_trace": ("long",),
    "engram_adapter/test_saved_tables": ("long",),
    "engram_adapter/test_swap_qwen4": ("long",),
    "engram_adapter/test_trained_stores": ("long",),
    "engram_adapter/test_trainer": ("long",),
    "faults": ("process",),
    "gpu": ("gpu",),
    "gpu/test_compile": ("process",),
    "gpu/test_compile_requests": ("process",),
    "ipc/test_identity": ("process",),
    "kernels/test_cpp": ("process",),
    "kernels/test_key_counts_kernel": ("long",),
    "kernels/test_mailbox": ("long",),
    "kernels/test_reports_kernel": ("long",),
    "kernels/test_simulate_kernel": ("long",),
    "offline/test_build": ("long",),
    "offline/test_count": ("long",),
    "offline/test_count_documents": ("long",),
    "offline/test_place": ("long",),
    "offline/test_plan_and_place": ("long",),
    "offline/test_repair": ("long",),
    "remote": ("daemon",),
    "test_cases": ("process",),
    "test_wheel": ("process", "slow"),
    "tiers/test_mooncake": ("process", "long"),
    "tiers/test_hbm": ("gpu",),
    "tiers/test_hbm_quiet": ("gpu",),
    "tiers/test_hbm_rows": ("gpu",),
    "tiers/test_hbm_times": ("gpu",),
    "training/test_training_interrupts": ("long",),
    "training/test_training_memory": ("process",),
    "tools/test_bench": ("process",),
    "tools/test_bench_against": ("long",),
    "tools/test_bench_gpu": ("gpu",),
    "tools/test_bench_overlap": ("gpu",),
    "tools/test_bench_remote": ("daemon",),
    "tools/test_bench_serve": ("daemon",),
    "tools/test_bench_train": ("process", "long"),
    "tools/test_cli": ("long",),
    "tools/test_corpus": ("long",),
    "tools/test_damaged_inputs": ("process",),
    "tools/test_demo": ("process",),
    "tools/test_epochs_cli": ("long",),
    "tools/test_json": ("long",),
    "tools/test_plan_cli": ("long",),
    "tools/test_profile_cli": ("long",),
    "tools/test_report": ("long",),
    "tools/test_token_containers": ("process",),
    "training/test_power_loss": ("process",),
    "training/test_trainer_power_loss": ("process",),
}

USES: dict[str, tuple[str, ...]] = {
    "Daemon": ("daemon",),
    "dumped": ("process",),
    "RemoteServer": ("daemon",),
    "ServeProcess": ("daemon", "process"),
    "SocketServer": ("daemon",),
    "multiprocessing": ("process",),
    "serving": ("daemon",),
    "serving_process": ("daemon", "process"),
    "subprocess": ("process",),
}


def marks_of(path: PurePath) -> frozenset[str]:
    """The marks of a test file or a folder, by its path below tests/."""
    plain = path.with_suffix("")
    return frozenset(mark for each in (plain, *plain.parents) for mark in MARKS.get(each.as_posix(), ()))


def marks_by_use(function: FunctionType, fixtures: Iterable[str]) -> frozenset[str]:
    """The marks of a test function by the names that it uses, and that functions and fixtures of its file use."""
    marks: set[str] = set()
    seen: set[str] = set()
    names = [*_names_of(function.__code__), *fixtures]
    while names:
        name = names.pop()
        if name not in seen:
            seen.add(name)
            marks.update(USES.get(name, ()))
            used = inspect.unwrap(function.__globals__.get(name))
            if isinstance(used, FunctionType) and used.__module__ == function.__module__:
                names += _names_of(used.__code__)
    return frozenset(marks)


def _names_of(code: CodeType) -> Iterator[str]:
    """All names in a function's code, and in the functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of(constant)


def slow_but(kept: Iterable[object], values: Iterable[Any], *, several: bool = False) -> list[Any]:
    """Values of a parameter, of which `make test` tries only some: all others are slow.

    several: each value is a tuple, one of it for each of several parameters.
    """
    chosen = list(kept)
    return [
        value if value in chosen else pytest.param(*(value if several else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


def excluded_by(expression: str) -> frozenset[str]:
    """The marks that no selected test has, of an expression of `-m` like "not gpu and not slow"; else none."""
    parts = [part.split() for part in expression.split(" and ")]
    if not all(len(part) == 2 and part[0] == "not" for part in parts):
        return frozenset()
    return frozenset(name for _, name in parts)
