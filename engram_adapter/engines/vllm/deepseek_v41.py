"""The Engram tables of DeepSeek-V4.1 in vLLM, looked up in a store: rows as stored, decoded as the engine does.

Input: row ids of a step, all heads of a token. Output: this rank's heads, in the engine's staging buffer. The engine
keeps its hash, its staging, its side stream and its events. Errors: `EngineMismatchError` while the model is built and
loaded; what lookups raise, later.

Shapes: T tokens of a step, C heads of a token (orders times heads), L heads of this rank.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from tierstore.store.store import Store

from ...hash_spec import HashSpec
from ..device_rows import rows_of
from ..gate import EngineMismatchError
from ..settings import EngineSettings
from ..tables import ExpectedTable, check_compared, check_rows, matching_table, rows_at, sample_offsets, served
from .checks import model_device

logger = logging.getLogger("vllm.tierstore")  # below the engine's logger, whose handlers show it

CODEC = "fp8_e4m3_e8m0x32"
SCALE_BLOCK = 32  # values that share a scale byte


class TieredEngramEmbedding(torch.nn.Module):
    """What the engine's `Engram` holds instead of its table: the same lookups, no weights.

    The attributes without a remark are those that the engine reads.
    """

    def __init__(self, vllm_config: Any, settings: EngineSettings, layout: Any, layer_hash_index: int) -> None:
        """Opens the store and finds the table; layout: the engine's `EngramLayout`. Raises `EngineMismatchError`."""
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        super().__init__()
        self.num_embeddings, self.dim = layout.num_embeddings[layer_hash_index], layout.head_dim
        self.layer_number = int(layout.layer_ids[layer_hash_index])
        self.layer_hash_index, self.prefix = layer_hash_index, f"layers.{self.layer_number}.engram"
        # Of a table on the host, the engine starts lookups on a side stream; a CPU has none.
        self.cpu_offload = torch.get_default_device().type != "cpu"
        self.dp_shared_memory = self.use_thp = False
        self.dp_size, self.peer_rows, self.block_size = 1, 0, SCALE_BLOCK
        sizes = tuple(int(size) for order in layout.primes[layer_hash_index] for size in order)
        self.n_hash_cols, self.tp_size = len(sizes), get_tensor_model_parallel_world_size()
        self.part_n_hash_cols = -(-self.n_hash_cols // self.tp_size)
        self.head_start = get_tensor_model_parallel_rank() * self.part_n_hash_cols
        head_end = self.head_start + self.part_n_hash_cols
        self.vocab_start_idx, self.vocab_end_idx = sum(sizes[: self.head_start]), sum(sizes[:head_end])
        self.part_num_embeddings = self.vocab_end_idx - self.vocab_start_idx
        self.weight = self._parameter(torch.empty(0, self.dim, dtype=torch.float8_e4m3fn), 0)
        self.weight_scale_inv = self._parameter(torch.empty(0, self.dim // SCALE_BLOCK, dtype=torch.uint8), self.dim)
        self._rows_compared = 0
        self._load_format = str(vllm_config.load_config.load_format)
        self.settings = settings
        self._open(vllm_config, settings.open_tables(model_device()), sizes)

    def _parameter(self, empty: torch.Tensor, bytes_start: int) -> torch.nn.Parameter:
        """Returns a parameter without rows, whose loader only compares; bytes_start: where its bytes lie in a row."""
        parameter = torch.nn.Parameter(empty, requires_grad=False)
        loader: Any = lambda _, loaded: self._compare(loaded, bytes_start)  # noqa: E731
        parameter.weight_loader = loader  # type: ignore[attr-defined]
        return parameter

    def _open(self, vllm_config: Any, store: Store, sizes: tuple[int, ...]) -> None:
        """Finds the table that this layer expects: the engine's heads, and the hash of its configuration."""
        where = self.prefix
        token_map = HashSpec.from_store(store).token_map
        self.hash_spec = HashSpec.from_config(vllm_config.model_config.hf_text_config.to_dict(), token_map)
        expected = ExpectedTable(
            self.hash_spec.table_name(self.layer_number),
            self.num_embeddings,
            self.dim,
            self.dim + self.dim // SCALE_BLOCK,
            (CODEC,),
            self.hash_spec.fingerprint(self.layer_number),
        )
        table = matching_table(store, expected, where)
        if table.spec.moduli != sizes:
            raise EngineMismatchError(
                f"{where}: the engine's heads have {sizes} rows, the store's {table.spec.moduli}: every row would be a "
                f"wrong one; build the store from the checkpoint that the engine loads"
            )
        tokens_max = vllm_config.scheduler_config.max_num_batched_tokens
        within = (self.vocab_start_idx, self.vocab_end_idx)
        self.rows = rows_of(self.settings, store, table.spec.name, tokens_max, self.weight.device, within)

    def _compare(self, loaded: torch.Tensor, bytes_start: int) -> None:
        """Takes no row of the checkpoint's tensor: compares a few with the store's."""
        spec, where = self.rows.table.spec, self.prefix
        width = self.weight_scale_inv.shape[1] if bytes_start else self.dim
        if len(loaded) < spec.num_rows or loaded.shape[1] != width or loaded.element_size() != 1:
            raise EngineMismatchError(
                f"{where}: the checkpoint has {list(loaded.shape)} values of {loaded.element_size()} bytes, the store "
                f"[{spec.num_rows}, {width}] of 1; build the store from the checkpoint that the engine loads"
            )
        offsets = sample_offsets(spec.num_rows, 0, spec.num_rows, width)
        found = rows_at(loaded.view(torch.uint8).cpu().numpy(), offsets)
        check_rows(self.rows.table, offsets, found, bytes_start, where)
        self._rows_compared += len(offsets)

    def lookup(self, indices: torch.Tensor, out: torch.Tensor, background: bool = False) -> None:  # noqa: ARG002
        """Puts this rank's heads of a step into `out`.

        Within a capture, launches only: the rows are in place when the graph replays.

        Args:
            indices: Row ids of all heads, integers [T, C].
            out: bf16 [T, L, dim], or uint8 [T, L, row_bytes] for rows as stored.
            background: The engine's; copies leave its multiprocessors alone anyway.
        """
        tokens = indices.shape[0]
        if not tokens:
            return
        self.rows.start_in_forward(indices)
        self.rows.finish_in_forward()
        heads = min(self.part_n_hash_cols, self.n_hash_cols - self.head_start)
        stored = self.rows.rows[:tokens, self.head_start : self.head_start + heads]
        out[:, :heads].copy_(stored if out.dtype == torch.uint8 else dequantized(stored, self.dim))
        out[:, heads:].zero_()

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the rows of all heads, bf16 [T, C, dim]: as the engine's class does, gathered over its ranks."""
        from vllm.distributed import tensor_model_parallel_all_gather

        out = torch.empty(
            (indices.shape[0], self.part_n_hash_cols, self.dim), dtype=torch.bfloat16, device=self.weight.device
        )
        self.lookup(indices, out)
        if self.tp_size > 1:
            out = tensor_model_parallel_all_gather(out, dim=1)
        return out[:, : self.n_hash_cols]

    def collapse_huge_pages(self) -> None:
        """Does nothing: there is no table in this process's memory."""

    def check_loaded(self, hashing: Any) -> None:
        """Checks the layer once the model is loaded, and logs that it is served; hashing: the engine's n-gram hash."""
        number, where = self.layer_number, self.prefix
        token_map = self.hash_spec.token_map
        assert token_map is not None
        sides = (
            (
                "multipliers",
                hashing.multipliers[self.layer_hash_index].tolist(),
                list(self.hash_spec.multipliers(number)),
            ),
            ("offsets", hashing.offsets[self.layer_hash_index].tolist(), list(self.rows.table.spec.offsets)),
            ("pad id", int(hashing.pad_id), self.hash_spec.pad_id),
            ("token map", hashing.token_map.tolist(), token_map.tolist()),
        )
        for what, found, wanted in sides:
            if found != wanted:
                shown = "differ" if what == "token map" else f"are {found}, the store's {wanted}"
                raise EngineMismatchError(
                    f"{where}: {what} of the engine's hash {shown}: every row would be a wrong one; build the store "
                    f"from the checkpoint and the tokenizer that the engine loads"
                )
        check_compared(self.rows.table, self._rows_compared, self._load_format, where)
        rows = self.rows
        logger.info("%s", served(rows.table, rows.store, self.settings.mode, where, self._rows_compared))


def dequantized(stored: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns stored rows, uint8 [..., row_bytes], as float32 [..., dim]: e4m3 times a power of two, as the engine.

    A scale byte is the exponent of a float32, so that 0 gives 0 and 255 infinity there, and here.
    """
    values = stored[..., :dim].view(torch.float8_e4m3fn).to(torch.float32)
    scales = (stored[..., dim:].to(torch.int32) << 23).view(torch.float32)
    values.unflatten(-1, (dim // SCALE_BLOCK, SCALE_BLOCK)).mul_(scales.unsqueeze(-1))
    return values
