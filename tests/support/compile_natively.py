"""Run as a program without TRITON_INTERPRET: compiles what the launchers launch for an H100,
on a machine without any GPU.

The argument says for how many codecs entries are gathered, those of a kind of their own first.
Every launch is kept from the device: its kernel is compiled down to machine code with the very arguments of the launch,
and its name and the widest loads and stores that it has are printed.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from support.gpu_inputs import BLOCK_CODECS, CODECS, Sources, index_of, poisoned_out
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tierstore.kernels.gpu import gather, launching, lookup, probe, put_rows, rows, scatter, token_keys
from tierstore.kernels.gpu import misses as misses_module
from tierstore.kernels.gpu.codecs import BYTES
from tierstore.kernels.gpu.misses import MissList, StepState

CPU = torch.device("cpu")
ONE_OF_A_KIND = ("bytes-264x8", "scaled-264x8", "fp8-24x4")
NVFP4 = "nvfp4-144x8"


def instead_of_launching(compiled: list[Any]) -> None:
    """From here on launches compile, and add what they compiled to `compiled`."""
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,  # noqa: ARG005
        )
    )
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    @contextlib.contextmanager
    def anywhere(device: torch.device) -> Iterator[None]:  # noqa: ARG001
        yield

    JITFunction.run = compile_only
    launching.on_device = anywhere


def find_entries() -> None:
    index = index_of([{1: 2}] * 3, (1, 1, 1), CPU).index
    probe.find_entries(index, torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int32))


def gather_entries() -> None:
    codecs = [CODECS[name] for name in (*ONE_OF_A_KIND, NVFP4, *CODECS)] + list(BLOCK_CODECS.values())
    for codec in codecs[: int(sys.argv[1])]:
        keys, places = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int32)
        gather.gather_entries(places, keys, Sources(1, 2, 2, codec, CPU).sources, codec, poisoned_out(12, codec, CPU))


def lookup_entries() -> None:
    index = index_of([{1: 2}] * 3, (1, 1, 1), CPU).index
    count, counts = torch.zeros(1, dtype=torch.int64), torch.zeros(10, dtype=torch.int64)
    for name in ONE_OF_A_KIND:
        codec, keys = CODECS[name], torch.zeros(4, 3, dtype=torch.int64)
        sources, out = Sources(1, 2, 2, codec, CPU).sources, poisoned_out(12, codec, CPU)
        for pairs in (lookup.PAIRS_NATIVE, 8):
            lookup.PAIRS_NATIVE = pairs
            lookup.lookup_entries(keys, index, sources, codec, out, MissList(count, 0, 0, 12), counts)


def scatter_entries() -> None:
    words = [torch.zeros(1, dtype=torch.int64) for _ in range(5)]
    state = StepState(*words, torch.zeros(2, dtype=torch.int64))
    for name in ONE_OF_A_KIND:
        scatter.scatter_entries(state, 64, 64, CODECS[name], 12, poisoned_out(12, CODECS[name], CPU))


def gather_rows() -> None:
    ids, places = torch.zeros(24, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int32)
    for name, width in (("bytes-264x8", 264), ("scaled-264x8", 256)):
        codec = CODECS[name]
        out = torch.zeros(24, width, dtype=torch.uint8 if codec.kind == BYTES else torch.bfloat16)
        rows.gather_rows(ids, 4096, 7, codec, out)
        rows.gather_rows(ids, torch.zeros(7, codec.row_bytes, dtype=torch.uint8), 7, codec, out, places)


def keys_of_row_ids() -> None:
    ids, out = torch.zeros(4, 24, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64)
    heads, counts = torch.ones(24, dtype=torch.int64), torch.full((3,), 3, dtype=torch.int64)
    address_map = token_keys.DeviceAddressMap(heads, heads, counts, torch.ones(3, 3, dtype=torch.int64))
    token_keys.keys_of_row_ids(ids, address_map, (0, 5), out)
    token_keys.keys_of_row_ids(ids[:, ::1], address_map, (0, 5), out, torch.zeros_like(ids))


def list_row_ids() -> None:
    misses = MissList(torch.zeros(1, dtype=torch.int64), 64, 64, 12)
    ids = torch.zeros(4, 24, dtype=torch.int64)
    misses_module.list_row_ids(ids, (0, 5), torch.zeros(4, 3, dtype=torch.int64), misses, 64)


def put() -> None:
    ids, out = torch.zeros(4, 24, dtype=torch.int64), torch.zeros(4, 24, 272, dtype=torch.uint8)
    put_rows.put_rows(ids, (0, 5), torch.zeros(4, 24, 264, dtype=torch.uint8), out[:, :, 8:])
    put_rows.put_rows(ids, (0, 5), None, out[:, :, 3:])


LAUNCHES: tuple[Callable[[], None], ...] = (
    find_entries,
    gather_entries,
    lookup_entries,
    scatter_entries,
    gather_rows,
    keys_of_row_ids,
    list_row_ids,
    put,
)


def main() -> None:
    assert not launching.INTERPRETED
    np.seterr(all="raise")
    compiled: list[Any] = []
    instead_of_launching(compiled)
    for launch in LAUNCHES:
        before = len(compiled)
        launch()
        assert len(compiled) > before, f"{launch.__name__} launched nothing"
        for kernel in compiled[before:]:
            moves = sorted(set(re.findall(r"\b(?:ld|st)\.[a-z0-9.:_]*", kernel.asm["ptx"])) - {"ld.param"})
            assert kernel.asm["cubin"]
            print(launch.__name__, kernel.name, *(move for move in moves if "global" in move))


if __name__ == "__main__":
    main()
