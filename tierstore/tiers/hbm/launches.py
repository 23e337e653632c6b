"""The kernels of one table's lookups, and the buffers on the device that they use.

Input: keys, on the device or known to the host. Output: values in the caller's tensor, and a request to the host for
what no tier of the device holds. All methods only launch, on the current stream, so that they can be captured in a CUDA
graph; `gather` copies from the host, and cannot. Errors: `ValueError` for tensors that do not fit.

Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...codec import GGUF_BLOCKS, parse_codec
from ...kernels.gpu.await_answer import await_answer
from ...kernels.gpu.block_codecs import BlockFormat
from ...kernels.gpu.codecs import BLOCKS, BYTES, FP8, FP8_SCALED, RowCodec
from ...kernels.gpu.gather import gather_entries
from ...kernels.gpu.lookup import lookup_entries
from ...kernels.gpu.misses import MissList, StepState, post_misses
from ...kernels.gpu.row_ids import row_ids_of_keys
from ...kernels.gpu.rows import gather_rows
from ...kernels.gpu.scatter import scatter_entries
from ...spec import TableSpec
from .device import spins_in
from .mailbox import WAIT_S, Mailbox

if TYPE_CHECKING:
    from .tier import HbmTier


class LookupLaunches:
    """The launches of one lookup. Its buffers' addresses never change: captured graphs know them. One thread at a time.

    Attributes:
        asks_host: Whether the host answers what the device's tiers miss; False if the device reads all rows in DRAM
            itself.
        spins_max: How many looks at the mailbox the device waits for an answer.
        invalid_token_position: int64 [1] on the device: 1 + the position of a token id without keys, which the caller's
            kernel writes; `look_up` moves it to the mailbox.
    """

    by_row_id = False  # whether its mailbox is

    @torch.inference_mode(False)  # its tensors are written outside that mode too
    def __init__(
        self, tier: HbmTier, index: int, tokens_max: int, mailbox: Mailbox, codec: RowCodec | None = None
    ) -> None:
        """codec: how rows become values; None: as `row_codec` says."""
        table, device = tier.tables[index], tier.device
        spec = table.spec
        self._table, self._device, self._mailbox = table, device, mailbox
        self._codec = codec or row_codec(spec)
        self._row_address = tier.row_addresses[index]
        self.asks_host = self._row_address == 0
        if not self.asks_host:
            self._row_ids = torch.empty((tokens_max, spec.num_heads), dtype=torch.int64, device=device)
            self._moduli, self._offsets = (
                torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (spec.moduli, spec.offsets)
            )
        self.invalid_token_position = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.full((tokens_max, len(spec.orders)), -1, dtype=torch.int32, device=device)
        words = torch.zeros(7, dtype=torch.int64, device=device)
        self._state = StepState(words[0:1], words[1:2], words[2:3], words[3:4], words[4:5], words[5:7])
        self._misses = MissList(self._state.count, mailbox.keys_address, mailbox.pairs_address, mailbox.pairs_max)
        self.spins_max = spins_in(device, WAIT_S)

    def flat(self, num_tokens: int, out: torch.Tensor) -> torch.Tensor:
        """Returns out, [N, O * H, dim], by pairs, as the kernels take it; raises `ValueError` for too many tokens."""
        tokens_max = len(self._places)
        if num_tokens > tokens_max:
            raise ValueError(f"{num_tokens} tokens for a lookup of at most {tokens_max}; look up fewer at once")
        num_pairs = num_tokens * len(self._table.spec.orders)
        if self._codec.kind == BYTES:
            return out.view(torch.uint8).view(num_pairs, self._table.entry_bytes)
        return out.view(num_pairs, self._codec.rows_per_entry, self._codec.dim)

    def look_up(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copies what the device reads, and asks the host for the rest. keys: int64 [N, O]; values: as of `flat`."""
        self._probe(keys, values)
        self._gather_rows(keys, values)
        self._post()

    def _probe(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copies what slots and records hold, and lists the rest, if the host is asked for that."""
        table, misses = self._table, self._misses if self.asks_host else None
        lookup_entries(
            keys, table.index, table.sources, self._codec, values, misses, table.counts, self._places[: len(keys)]
        )

    def _post(self) -> None:
        """Begins the step, and asks the host for what is listed."""
        post_misses(self._state, self._mailbox.address, self._misses.pairs_max, self.invalid_token_position)

    def gather(self, keys: np.ndarray, places: np.ndarray, num_missed: int, values: torch.Tensor) -> None:
        """Copies what lies at places, int64 [N, O], for keys that the host knows, int64 [N, O].

        num_missed: pairs that the host reads into the mailbox meanwhile; `scatter` takes so many from there.
        """
        keys_there = torch.from_numpy(keys).to(self._device)
        places_there = self._places[: len(keys)]
        places_there.copy_(torch.from_numpy(places.astype(np.int32)))
        gather_entries(places_there, keys_there, self._table.sources, self._codec, values)
        self._gather_rows(keys_there, values)
        self._state.step.add_(1)
        self._state.posted.fill_(num_missed)

    def _gather_rows(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copies, by row id, what neither slots nor records hold, if the device reads all rows of the table in DRAM."""
        if self.asks_host:
            return
        row_ids = self._row_ids[: len(keys)]
        row_ids_of_keys(keys, self._moduli, self._offsets, row_ids)
        self._gather_by_id(row_ids, values)

    def _gather_by_id(self, row_ids: torch.Tensor, values: torch.Tensor) -> None:
        """The same of row ids, int64 [N, O * H], contiguous."""
        spec = self._table.spec
        rows = values.view(row_ids.numel(), values.shape[-1] // (1 if values.ndim == 3 else self._codec.rows_per_entry))
        gather_rows(row_ids.view(-1), self._row_address, spec.num_rows, self._codec, rows, self._places[: len(row_ids)])

    def await_answer(self) -> None:
        """Has the device wait for the host's answer to the step at hand."""
        await_answer(self._state, self._mailbox.address, self.spins_max)

    def scatter(self, values: torch.Tensor) -> None:
        """Moves the step's entries from the mailbox to where they were missed; NaN if they did not come."""
        scatter_entries(
            self._state, self._mailbox.pairs_address, self._mailbox.entries_address, self._codec,
            self._misses.pairs_max, values,
        )  # fmt: skip

    def steps_without_miss(self) -> int:
        """Returns how many steps asked the host for nothing. Blocks on the device."""
        return int(self._state.batch_counts[1])


def row_codec(spec: TableSpec) -> RowCodec:
    """Returns how the kernels make values of a table's rows: quantized ones are decoded, others copied as they lie."""
    codec = parse_codec(spec.codec)
    rows = spec.rows_per_key, spec.row_bytes, spec.dim
    if codec.values == "fp8_e4m3" and codec.scale in ("", "e8m0"):
        return RowCodec(FP8_SCALED if codec.scale else FP8, *rows, codec.factor)
    if codec.scale or codec.values in GGUF_BLOCKS:
        blocks = BlockFormat(codec.values, codec.scale, codec.block or spec.dim, codec.divides)
        return RowCodec(BLOCKS, *rows, codec.factor, blocks)
    return RowCodec(BYTES, *rows)
