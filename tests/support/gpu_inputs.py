"""Inputs for the kernels of the hbm tier: indexes of given entries, in both areas, and tensors moved to the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engram_adapter.codecs import decode_rows
from tierstore import kernels
from tierstore.codec import GGUF_BLOCKS
from tierstore.kernels.gpu.codecs import BYTES, FP8, FP8_SCALED, RowCodec
from tierstore.kernels.gpu.gather import EntrySources
from tierstore.kernels.gpu.probe import DeviceIndex
from tierstore.spec import TableSpec, codec_row_bytes
from tierstore.tiers.hbm.launches import row_codec

KEY_MAX = 2**63 - 1


def native_block_of(wanted: int, native: int, interpreted: int = 1024) -> int:  # noqa: ARG001
    """Stands in for `launching.block_of`: the sizes that a GPU runs, in the interpreter too."""
    return native


def run_of(placed: Mapping[int, int], num_buckets: int) -> np.ndarray:
    """Buckets, uint8 [num_buckets, 64], of an order's keys and their places."""
    buckets = np.zeros((num_buckets, 64), dtype=np.uint8)
    keys = np.array(list(placed), dtype=np.int64)
    if num_buckets:
        assert kernels.index_entries(keys, np.array(list(placed.values()), dtype=np.uint32), buckets)
    return buckets


@dataclass
class HostIndex:
    """A `DeviceIndex`, and the same as NumPy arrays."""

    epoch: np.ndarray
    heads: np.ndarray
    buckets: np.ndarray
    index: DeviceIndex


def aligned(array: np.ndarray, device: torch.device, alignment: int = 64) -> torch.Tensor:
    """Bytes, uint8 [n, width], as a contiguous tensor of `device` whose address is a multiple of `alignment`."""
    room = torch.zeros(array.size + alignment, dtype=torch.uint8, device=device)
    start = -room.data_ptr() % alignment
    tensor = room[start : start + array.size].view(array.shape)
    tensor.copy_(torch.from_numpy(array))
    return tensor


def index_of(
    placed: Sequence[Mapping[int, int]], sizes: Sequence[int], device: torch.device, parity: int = 0
) -> HostIndex:
    """An index whose area of `parity` has each order's keys; the other area has the same keys at place 7,
    and others."""
    num_orders = len(placed)
    heads = np.zeros((2, num_orders, 2), dtype=np.int64)
    runs, start = [], 0
    for area in (0, 1):
        for order, (entries, num_buckets) in enumerate(zip(placed, sizes, strict=True)):
            stale = dict.fromkeys([*entries, 123_456_789_123][: num_buckets * 5], 7)
            runs.append(run_of(entries if area == parity else stale, num_buckets))
            heads[area, order] = start, num_buckets
            start += num_buckets
    buckets = np.concatenate([*runs, np.zeros((1, 64), dtype=np.uint8)])
    epoch = np.array([2 + parity], dtype=np.int64)
    index = DeviceIndex(
        torch.from_numpy(epoch.copy()).to(device), torch.from_numpy(heads).to(device), aligned(buckets, device)
    )
    return HostIndex(epoch, heads, buckets, index)


def blocks_of(codec: str, rows_per_entry: int, dim: int) -> RowCodec:
    """The rows of a quantized codec as the kernels know them."""
    row = row_codec(TableSpec.plain("t", 1, codec_row_bytes(codec, dim) or 0, codec, dim))
    return dataclasses.replace(row, rows_per_entry=rows_per_entry)


def codec_name(codec: RowCodec) -> str:
    """The name of a codec that decodes: the longest of those that mean the same."""
    if codec.blocks is None:
        return f"{FP8}*{codec.scale.hex()}" if codec.kind == FP8 else FP8_SCALED
    if not codec.blocks.scale:
        return codec.blocks.values
    factor = f"{'/' if codec.blocks.divides else '*'}{codec.scale.hex()}" if codec.blocks.scale == "e4m3" else ""
    return f"{codec.blocks.values}_{codec.blocks.scale}x{codec.blocks.block}{factor}"


# Rows of 264, 33, 40 and 24 bytes, entries that are multiples of 16, 8, 4, 2 and of nothing.
CODECS = {
    "bytes-264x8": RowCodec(BYTES, 8, 264, 0),
    "bytes-33x3": RowCodec(BYTES, 3, 33, 0),
    "bytes-40x1": RowCodec(BYTES, 1, 40, 0),
    "bytes-6x7": RowCodec(BYTES, 7, 6, 0),
    "bytes-4x3": RowCodec(BYTES, 3, 4, 0),
    "bytes-1x1": RowCodec(BYTES, 1, 1, 0),
    "bytes-20000": RowCodec(BYTES, 5, 4000, 0),
    "scaled-264x8": RowCodec(FP8_SCALED, 8, 264, 256),
    "scaled-33x3": RowCodec(FP8_SCALED, 3, 33, 32),
    "scaled-99x5": RowCodec(FP8_SCALED, 5, 99, 96),
    "scaled-1056x6": RowCodec(FP8_SCALED, 6, 1056, 1024),
    "fp8-24x4": RowCodec(FP8, 4, 24, 24, 0.37),
    "fp8-33x1": RowCodec(FP8, 1, 33, 33, 1e-3),
    "nvfp4-144x8": blocks_of("fp4_e2m1_e4m3x16*0x1.8p-7", 8, 256),
}
BLOCK_CODECS = {
    "nvfp4-27x3": blocks_of("fp4_e2m1_e4m3x16/0x1.9p+3", 3, 48),
    "mxfp4-17x5": blocks_of("fp4_e2m1_e8m0x32", 5, 32),
    "int8-164x4": blocks_of("int8_fp32", 4, 160),
    "uint8-20x3": blocks_of("uint8b128_fp16x8", 3, 16),
    "uint4-66x2": blocks_of("uint4b8_bf16x128", 2, 128),
    "nf4-36x3": blocks_of("nf4_fp32x64", 3, 64),
    "fp8-rows": blocks_of("fp8_e4m3_bf16", 2, 40),
    **{f"{codec}-x2": blocks_of(codec, 2, 256) for codec in GGUF_BLOCKS},
}


def decoded(entries: np.ndarray, codec: RowCodec) -> np.ndarray:
    """Entries, uint8 [n, entry_bytes], as the adapter decodes them; bfloat16 as int16, all NaNs the same."""
    if codec.kind == BYTES:
        return entries
    rows = torch.from_numpy(entries.reshape(len(entries), codec.rows_per_entry, codec.row_bytes).copy())
    return patterns(decode_rows(rows, codec_name(codec), codec.dim))


LOST = {"uint8": 0xFF, "int16": 0x7FC0}  # by the type of an output's patterns: what stands where no value may be


def patterns(values: torch.Tensor) -> np.ndarray:
    """Values of an output as integers; every NaN as 0x7fc0."""
    if values.dtype == torch.uint8:
        return values.cpu().numpy()
    return torch.where(values.isnan(), 0x7FC0, values.view(torch.int16)).to(torch.int16).cpu().numpy()


def poisoned_out(num_entries: int, codec: RowCodec, device: torch.device) -> torch.Tensor:
    """An output full of 0x5a."""
    shape = (codec.entry_bytes,) if codec.kind == BYTES else (codec.rows_per_entry, codec.dim)
    if codec.kind == BYTES:
        return torch.full((num_entries, *shape), 0x5A, dtype=torch.uint8, device=device)
    return torch.full((num_entries, *shape), 0x5A5A, dtype=torch.int16, device=device).view(torch.bfloat16)


def poison_of(num_entries: int, codec: RowCodec) -> np.ndarray:
    return patterns(poisoned_out(num_entries, codec, torch.device("cpu"))).copy()


class Sources:
    """Random entries at places 0 .. num_slots + num_records - 1, some in slots,
    the others in records of host memory."""

    def __init__(
        self, seed: int, num_slots: int, num_records: int, codec: RowCodec, device: torch.device, tilt: int = 0
    ) -> None:
        random = np.random.default_rng(seed)
        stride = -(-codec.entry_bytes // 16) * 16
        record_bytes = -(-codec.entry_bytes // 8) * 8 + 16
        self.slots = random.integers(0, 256, size=(num_slots, stride), dtype=np.uint8)
        self.records = random.integers(0, 256, size=(num_records, record_bytes), dtype=np.uint8)
        self.entries = np.concatenate([self.slots[:, : codec.entry_bytes], self.records[:, : codec.entry_bytes]])
        room = torch.zeros(self.records.size + 64, dtype=torch.uint8)
        self.host_memory = room.pin_memory() if device.type == "cuda" else room
        start = -self.host_memory.data_ptr() % 64 + tilt
        self.host_memory[start : start + self.records.size] = torch.from_numpy(self.records.reshape(-1))
        self.sources = EntrySources(
            aligned(self.slots, device),
            self.host_memory.data_ptr() + start if num_records else 0,
            record_bytes,
            num_records,
        )
