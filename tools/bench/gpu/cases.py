"""Lookups of random entries in gigabytes of device memory and of page-locked memory, beside copies of the same bytes.

Input: a device, a clock, sizes. Output: figures, each with its bound where it has one; a wrong entry raises
`CheckError` before anything is timed. A lookup and the copy that it is set beside run in turn, in the same rounds, over
inputs that rotate. An entry's bytes count as they are read and as they are written; keys and index, which a lookup
reads besides, do not count.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tierstore.kernels import reference_gpu
from tierstore.kernels.gpu import lookup, rows
from tierstore.kernels.gpu.codecs import BYTES, FP8_SCALED, RowCodec
from tierstore.tiers.hbm.device import PinnedMemory
from tierstore.units import format_bytes

from ..pairs import Figure, interleave
from ..stores import DIM, ENTRY_BYTES, HEADS, ROW_BYTES
from .clock import Clock, Launch
from .tables import NUM_ORDERS, CheckError, RandomTable, StepMemory, check_same, patterns, poisoned, wait_for

OUTPUTS = 4  # that rotate: together more than a GPU's cache holds
CHECKED = 64  # entries whose values are compared with the reference, before a case is timed
RAW, VALUES = RowCodec(BYTES, HEADS, ROW_BYTES, 0), RowCodec(FP8_SCALED, HEADS, ROW_BYTES, DIM)
RAW_BOUND, VALUES_BOUND, HOST_BOUND = 0.7, 0.6, 0.8  # of a copy's rate, at least


@dataclass(frozen=True)
class Scale:
    """How large the cases are. tokens: of a batch; entries, records: in device and in host memory; inputs: batches that
    rotate; copy_bytes: of the large copy.

    layers: lookups in a replayed graph of decoding; decode_tokens: tokens of one; misses: of a step, the numbers that
    are tried. table_bytes, dram, hbm, placed: of the small store, and how many of its entries are placed.
    """

    tokens: int = 8192
    entries: int = 2 << 20  # 4.1 GiB
    records: int = 1 << 19  # 1.04 GiB
    inputs: int = 16
    copy_bytes: int = 2 << 30
    layers: int = 32
    decode_tokens: tuple[int, ...] = (1, 2, 4, 8)
    misses: tuple[int, ...] = (1, 24, 200)
    table_bytes: int = 512 << 20
    dram: str = "384MiB"
    hbm: str = "96MiB"
    placed: int = 60_000

    @property
    def batch_bytes(self) -> int:
        """Bytes of a batch's entries."""
        return self.tokens * NUM_ORDERS * ENTRY_BYTES


class KernelCases:
    """The cases that need no store."""

    def __init__(
        self, device: torch.device, clock: Clock, scale: Scale, random: np.random.Generator, rounds: int
    ) -> None:
        self.device, self.clock, self.scale, self.random, self.rounds = device, clock, scale, random, rounds

    def figures(self) -> Generator[tuple[str, list[Figure]], None, None]:
        """Yields what was measured, and its figures."""
        with RandomTable(self.device, self.random, RAW, self.scale.entries, 0) as table:
            yield "copies within the device", [self._large_copy(table.slots)]
            yield "raw bytes from HBM", self._from_hbm(table, RAW, "raw bytes", RAW_BOUND)
            yield "values from HBM", self._from_hbm(table, VALUES, "dequantized to bf16", VALUES_BOUND)
        del table  # its memory is wanted
        with RandomTable(self.device, self.random, RAW, 0, self.scale.records) as table:
            yield "copies over the bus", self._bus_copies(table)
            yield "raw bytes from pinned DRAM", self._from_dram(table)
            yield "rows of a resident table from pinned DRAM", self._rows_from_dram(table)

    def _large_copy(self, slots: torch.Tensor) -> Figure:
        flat = slots.view(-1)
        num_bytes = min(self.scale.copy_bytes, len(flat) // 2)
        target = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        timed = self.clock.in_turn(copies(flat, [target], num_bytes, 2))
        return rates(
            f"device-to-device copy of {format_bytes(num_bytes)}, read and written",
            2 * num_bytes,
            [timed() for _ in range(self.rounds)],
        )

    def _from_hbm(self, table: RandomTable, codec: RowCodec, what: str, bound: float) -> list[Figure]:
        """The lookup kernel beside a copy that reads and writes as many bytes in all."""
        with StepMemory(self.device, self.scale.tokens * NUM_ORDERS) as step:
            launches = self._lookups(table, codec, step)
            num_entries = self.scale.tokens * NUM_ORDERS
            written = ENTRY_BYTES if codec.kind == BYTES else 2 * HEADS * DIM
            moved = num_entries * (ENTRY_BYTES + written)
            targets = [torch.empty(moved // 2, dtype=torch.uint8, device=self.device) for _ in range(OUTPUTS)]
            sides = {
                "lookup": self.clock.in_graph(launches),
                "copy": self.clock.in_graph(copies(table.slots.view(-1), targets, moved // 2, self.scale.inputs)),
            }
            case = f"{self.scale.tokens:,} tokens, all in {format_bytes(table.slots.numel())} of HBM, {what}"
            return beside(
                case,
                interleave(sides, self.rounds),
                moved,
                f"a device-to-device copy of {format_bytes(moved // 2)}",
                bound,
            )

    def _from_dram(self, table: RandomTable) -> list[Figure]:
        with StepMemory(self.device, self.scale.tokens * NUM_ORDERS) as step:
            launches = self._lookups(table, RAW, step)
            sides = {"lookup": self.clock.in_turn(launches), "copy": self.clock.in_turn(self._to_device(table))}
            case = f"{self.scale.tokens:,} tokens, all in {format_bytes(table.records.size)} of pinned DRAM, raw bytes"
            return beside(
                case, interleave(sides, self.rounds), self.scale.batch_bytes, "a pinned host-to-device copy", HOST_BOUND
            )

    def _lookups(self, table: RandomTable, codec: RowCodec, step: StepMemory) -> list[Launch]:
        """Lookups of batches that the table holds, after the first was checked."""
        num_pairs = self.scale.tokens * NUM_ORDERS
        outs = [poisoned(num_pairs, codec, self.device) for _ in range(OUTPUTS)]
        counts = torch.zeros(3 * NUM_ORDERS + 1, dtype=torch.int64, device=self.device)
        batches = [table.held(self.scale.tokens) for _ in range(self.scale.inputs)]

        def launch(keys: torch.Tensor, out: torch.Tensor) -> None:
            lookup.lookup_entries(keys, table.index, table.sources, codec, out, step.misses, counts)

        keys, places = batches[0]
        launch(keys, outs[0])
        wait_for(self.device)
        self._check(table, codec, places.view(-1), outs[0])
        check_same("misses of a batch that is all there", [int(step.state.count)], [0])
        outputs = itertools.cycle(outs)
        return [partial(launch, keys, next(outputs)) for keys, _ in batches]

    def _check(self, table: RandomTable, codec: RowCodec, places: torch.Tensor, out: torch.Tensor) -> None:
        """Every byte of raw entries, and the values of some."""
        if codec.kind == BYTES:
            held = (
                table.slots[places, :ENTRY_BYTES]
                if len(table.slots)
                else table.records[places.cpu().numpy(), :ENTRY_BYTES]
            )
            expected = held if isinstance(held, torch.Tensor) else torch.from_numpy(held).to(self.device)
            if not torch.equal(out, expected):
                wrong = int((out != expected).any(1).sum())
                raise CheckError(f"lookup_entries: {wrong} of {len(out)} entries are not what lies at their places")
            return
        some = torch.from_numpy(self.random.integers(len(places), size=CHECKED)).to(self.device)
        entries = table.slots[places[some], :ENTRY_BYTES].cpu().numpy()
        check_same("lookup_entries: values", patterns(out[some]), reference_gpu.decode_entries(entries, codec))

    def _bus_copies(self, table: RandomTable) -> list[Figure]:
        """Copies of as many bytes as a batch's entries, to the device and from it."""
        num_bytes = self.scale.batch_bytes
        pinned = PinnedMemory(self.device, 2 * num_bytes)
        targets = list(torch.from_numpy(pinned.block[: 2 * num_bytes]).view(2, num_bytes))
        source = torch.empty(2 * num_bytes, dtype=torch.uint8, device=self.device).random_(0, 256)
        sides = {
            "host-to-device": self.clock.in_turn(self._to_device(table)),
            "device-to-host": self.clock.in_turn(copies(source, targets, num_bytes, 2)),
        }
        try:
            seconds = interleave(sides, self.rounds)
        finally:
            wait_for(self.device)
            pinned.close()
        return [
            rates(f"pinned {side} copy of {format_bytes(num_bytes)}", num_bytes, each) for side, each in seconds.items()
        ]

    def _to_device(self, table: RandomTable) -> list[Launch]:
        num_bytes = self.scale.batch_bytes
        targets = [torch.empty(num_bytes, dtype=torch.uint8, device=self.device) for _ in range(OUTPUTS)]
        return copies(torch.from_numpy(table.records.reshape(-1)), targets, num_bytes, self.scale.inputs)

    def _rows_from_dram(self, table: RandomTable) -> list[Figure]:
        """The records' memory as a table that lies whole there: rows by their number."""
        num_rows = table.records.size // ROW_BYTES
        num_ids = self.scale.tokens * NUM_ORDERS * HEADS
        memory = table.records.reshape(-1)[: num_rows * ROW_BYTES].reshape(num_rows, ROW_BYTES)
        batches = [
            torch.from_numpy(self.random.integers(num_rows, size=num_ids)).to(self.device)
            for _ in range(self.scale.inputs)
        ]
        outs = [torch.full((num_ids, ROW_BYTES), 0x5A, dtype=torch.uint8, device=self.device) for _ in range(OUTPUTS)]

        def launch(row_ids: torch.Tensor, out: torch.Tensor) -> None:
            rows.gather_rows(row_ids, memory.ctypes.data, num_rows, RAW, out)

        launch(batches[0], outs[0])
        check_same("gather_rows", outs[0].cpu(), memory[batches[0].cpu().numpy()])
        outputs = itertools.cycle(outs)
        launches = [partial(launch, row_ids, next(outputs)) for row_ids in batches]
        sides = {"lookup": self.clock.in_turn(launches), "copy": self.clock.in_turn(self._to_device(table))}
        case = f"{num_ids:,} rows of a resident table, by row id, in pinned DRAM"
        return beside(
            case, interleave(sides, self.rounds), self.scale.batch_bytes, "a pinned host-to-device copy", None
        )


def copies(source: torch.Tensor, targets: Sequence[torch.Tensor], num_bytes: int, count: int) -> list[Launch]:
    """Copies of `num_bytes` each, from parts of `source` all over it, into the targets in turn."""
    starts = np.linspace(0, len(source) - num_bytes, count).astype(np.int64) // 64 * 64

    def copy(start: int, target: torch.Tensor) -> None:
        target.copy_(source[start : start + num_bytes], non_blocking=True)

    outputs = itertools.cycle(targets)
    return [partial(copy, start, next(outputs)) for start in starts.tolist()]


def rates(case: str, num_bytes: int, seconds: Sequence[float]) -> Figure:
    """The rate at which so many bytes were moved, in each round."""
    return Figure(case, "GB/s", [num_bytes / each / 1e9 for each in seconds])


def beside(case: str, seconds: dict[str, list[float]], num_bytes: int, copy: str, bound: float | None) -> list[Figure]:
    """The rates of a lookup and of a copy that moves the same bytes, and the one over the other, round by round."""
    ratios = [copied / looked_up for looked_up, copied in zip(seconds["lookup"], seconds["copy"], strict=True)]
    return [
        rates(case, num_bytes, seconds["lookup"]),
        Figure(f"{case}: time of a batch", "us", [statistics.median(seconds["lookup"]) * 1e6]),
        rates(f"{copy}, in the same rounds", num_bytes, seconds["copy"]),
        Figure(f"{case}: rate over that of {copy}", "ratio", ratios, bound, at_least=True),
    ]
