"""The Engram tables of DeepSeek-V4.1 in SGLang, looked up in a store: the engine hashes, the store has the rows.

Input: row ids of a forward, or of the batch that is scheduled next. Output: rows as the engine dequantizes them.
Errors: `EngineMismatchError` while the model is built and loaded; what lookups raise, later.

SGLang has two seams, and both are taken: the embedding (`EngramEmbedding`), and the stager that hashes an extend batch
on the host before its forward (`EngramRowStager`). Imported only by the plug-in, because it imports SGLang.

Shapes: T tokens, C hash columns (orders times heads), D values of a row.
"""

from __future__ import annotations

import dataclasses
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from sglang.srt.layers import engram, engram_staging
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph import eager_on_graph
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context import is_in_breakable_cuda_graph
from sglang.srt.runtime_context import get_parallel

from ...codecs import SCALE_BLOCK, decode_rows
from ...hash_config import LayerHash
from ...hash_spec import HashSpec
from ..gate import EngineMismatchError
from ..tables import ExpectedTable
from .checks import BREAKABLE, DISABLED
from .hooks import Hook
from .layer import LayerTable
from .steps import HostSteps, steps_of

FAMILY, CODEC = "deepseek_v41", "fp8_e4m3_e8m0x32"


class TieredEngramEmbedding(torch.nn.Module):
    """Stands for `EngramEmbedding`: the same calls and attributes, no rows in memory, no collective of ranks."""

    host_table = None  # of SGLang's own layouts, none of which this is
    peer = None
    shared_host_table_without_ats = False

    def __init__(self, num_embeddings: int, dim: int, layer_id: int, column_bounds: tuple[int, ...]) -> None:
        """Opens the layer's table; the arguments are the engine's. Raises `EngineMismatchError`."""
        super().__init__()
        layer = f"layers.{layer_id}.engram.embed"
        expected = ExpectedTable(
            f"layers.{layer_id}", num_embeddings, dim, dim + dim // SCALE_BLOCK, (CODEC,), fingerprint=""
        )
        self.tiered = LayerTable(layer, expected, decode=(BREAKABLE, DISABLED), prefill=(BREAKABLE, DISABLED))
        _check_columns(self.tiered, column_bounds)
        self.dim, self.layer_id, self.column_bounds = dim, layer_id, column_bounds
        self.staged_by_scheduler = False
        self.weight = _no_rows(dim, torch.float8_e4m3fn)
        self.scale = _no_rows(dim // SCALE_BLOCK, torch.float8_e8m0fnu)
        for parameter in (self.weight, self.scale):
            vars(parameter)["weight_loader"] = self._compare
        self._now = steps_of(self.tiered)  # of the forward
        # Of the batches that come next: two, so that one is read while a GPU copies the other.
        # Under prefill context parallelism a rank has only some of the tokens on its host; the forward looks up then.
        self.can_stage = self.tiered.settings.mode == "host" and get_parallel().attn_cp_size == 1
        self._ahead = tuple(HostSteps(self.tiered) for _ in range(2 if self.can_stage else 0))
        self._is_captured = self.tiered.settings.mode == "device"
        self._under_way: list[StagedStep | None] = [None, None]  # of each of `_ahead`
        self._turn = 0

    def _compare(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Takes no row of the table: compares a few with the store's."""
        row_bytes = self.tiered.table.spec.row_bytes
        self.tiered.compare(loaded_weight, 0, (0, self.dim) if param is self.weight else (self.dim, row_bytes))

    def finish_load(self, _label: str) -> None:
        """Checks that rows were compared while weights loaded, and that none are here."""
        self.tiered.check_loaded(weight=self.weight, scale=self.scale)

    def enable_scheduler_staging(self) -> None:
        """Has the rows of extend batches started before their forward."""
        self.staged_by_scheduler = True

    def new_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns an output for the rows of `indices`, [..., D] bfloat16, not filled."""
        return torch.empty(*indices.shape, self.dim, dtype=torch.bfloat16, device=indices.device)

    def forward(
        self,
        indices: torch.Tensor,
        forward_batch: Any = None,
        *,
        cp_all_tokens: bool = False,  # noqa: ARG002
    ) -> torch.Tensor:
        """Returns the rows of int64 [T, C] row ids, [T, C, D] bfloat16. Blocks until they are read.

        Every rank reads the rows of its own tokens, so there is nothing to gather: `cp_all_tokens` changes nothing.
        """
        if indices.shape[0] == 0:
            return self.new_rows(indices)
        # A graph is left to read rows in Python. Launches stay in it; and of a staged layer, the engine itself has
        # left it for extend batches: one cannot leave it twice.
        stays = self._is_captured or (
            self.staged_by_scheduler
            and forward_batch is not None
            and forward_batch.forward_mode.is_extend_without_speculative()
            and is_in_breakable_cuda_graph()
        )
        return self._read.run_eager(indices) if stays else self._read(indices)

    @eager_on_graph
    def _read(self, indices: torch.Tensor) -> torch.Tensor:
        self._now.start(indices)
        return self._dequantized(self._now.finish(), self.new_rows(indices))

    def stage(self, row_ids: torch.Tensor, device: torch.device) -> StagedStep:
        """Starts to read the rows of a batch that is not yet at work; row_ids: int64 [T, C] on the host."""
        self._turn = turn = 1 - self._turn
        self._ahead[turn].start(row_ids, device)
        self._under_way[turn] = step = StagedStep(row_ids, device, turn)
        return step

    def dequant_staged(self, rows: StagedStep, _scales: None, _copied: None, hash_shape: torch.Size) -> torch.Tensor:
        """Returns the rows that were staged, [*hash_shape, D] bfloat16, zeros for padded tokens. Blocks on reads."""
        ahead = self._ahead[rows.turn]
        if self._under_way[rows.turn] is not rows:  # taken before, or other batches were staged since
            ahead.start(rows.row_ids, rows.device)
        self._under_way[rows.turn] = None
        stored = ahead.finish()
        out = torch.empty(*hash_shape, self.dim, dtype=torch.bfloat16, device=rows.device)
        tokens = stored.shape[0]
        assert tokens <= out.shape[0], (tokens, out.shape)
        out[tokens:].zero_()
        self._dequantized(stored, out[:tokens])
        return out

    def _dequantized(self, stored: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fills out, [T, C, D] bfloat16, from rows as stored, [T, C, row_bytes], by the engine's own arithmetic."""
        if not stored.is_cuda:
            return out.copy_(decode_rows(stored, CODEC, self.dim))  # float32 products, rounded once, as the engine's
        # The engine's kernel takes two tables.
        values, scales = stored[..., : self.dim].contiguous(), stored[..., self.dim :].contiguous()
        ids = torch.arange(stored.shape[0] * stored.shape[1], device=stored.device)
        engram.engram_gather(values.data_ptr(), scales.data_ptr(), ids, out.view(-1, self.dim), self.dim, SCALE_BLOCK)
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class StagedStep:
    """A layer's rows of one batch, under way.

    Attributes:
        row_ids: int64 [T, C] on the host.
        device: Where the rows come out.
        turn: Which of the two buffers they are read into.
    """

    row_ids: torch.Tensor
    device: torch.device
    turn: int


class TieredRowStager(engram_staging.EngramRowStager):
    """Stands for `EngramRowStager`: reads start when a batch is scheduled, while the forward before it runs."""

    def __init__(self, hasher: Any, embeds: list[TieredEngramEmbedding], device: torch.device) -> None:
        """The arguments are the engine's; there is no table to gather from."""
        self.hasher, self.embeds, self.device = hasher, embeds, device

    @classmethod
    def from_model(cls, model: torch.nn.Module, hasher: Any, device: torch.device) -> TieredRowStager | None:
        """Checks every Engram layer of a loaded model; returns a stager, None if the layout has no host tokens.

        Raises:
            EngineMismatchError: A layer is not ours, has rows in memory, or its hash is not the table's.
        """
        layers = [module for module in model.modules() if isinstance(module, engram.Engram)]
        layers.sort(key=lambda layer: layer.layer_hash_index)
        embeds = [layer.embed for layer in layers]
        for index, embed in enumerate(embeds):
            if not isinstance(embed, TieredEngramEmbedding):
                raise EngineMismatchError(
                    f"Engram layer {index} is a {type(embed).__module__}.{type(embed).__qualname__}, expected "
                    f"tierstore's: something else replaces it; name the plug-ins to load in SGLANG_PLUGINS"
                )
            embed.finish_load("")
            embed.tiered.check_hash(hash_of(hasher, index, embed).fingerprint(embed.layer_id))
            embed.tiered.log_ready()
        if not embeds or not embeds[0].can_stage:
            return None
        for embed in embeds:
            embed.enable_scheduler_staging()
        return cls(hasher, embeds, device)

    def stage(self, batch: Any) -> list[tuple[StagedStep, None, None]] | None:
        """Starts the reads of an extend batch in every layer; None leaves the lookup to the forward."""
        if not batch.forward_mode.is_extend_without_speculative():
            return None
        resets = zip(batch.encoder_swa_reset or (), batch.prefix_lens, strict=False)
        if any(reset and prefix for reset, prefix in resets):
            return None  # some backends replay cached tokens in a forward of their own, which takes no staged rows
        windows = self._windows(batch)
        if windows is None:
            return None
        ids, _ = self.hasher.hash_windows(*windows)
        return [(embed.stage(ids[:, index], self.device), None, None) for index, embed in enumerate(self.embeds)]


def hash_of(hasher: Any, index: int, embed: TieredEngramEmbedding) -> HashSpec:
    """Returns the hash that the engine computes for a layer; index: the layer's place among the Engram layers."""
    multipliers, primes = hasher.multipliers[index].tolist(), hasher.primes[index]
    parts = LayerHash(tuple(multipliers), tuple(primes.flatten().tolist()), embed.column_bounds[-1])
    token_map = hasher.token_map.cpu().numpy().astype(np.int32)
    return HashSpec(
        family=FAMILY,
        orders=tuple(range(2, hasher.max_ngram_size + 1)),
        heads=primes.shape[1],
        vocab_size=len(token_map),
        pad_id=int(hasher.pad_id),
        barrier_id=None,
        layer_hashes={embed.layer_id: parts},
        token_map=token_map,
        needs_token_map=True,
    )


def _check_columns(tiered: LayerTable, column_bounds: tuple[int, ...]) -> None:
    """Checks where each hash column's rows begin, which are primes of the hash."""
    spec = tiered.table.spec
    stored, expected = (*spec.offsets, spec.num_rows), tuple(column_bounds)
    if stored != expected:
        pairs = enumerate(zip_longest(stored, expected))
        column, (begins, wanted) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
        raise EngineMismatchError(
            f"{tiered.layer}: hash column {column} of table {spec.name} begins at row {begins}, the engine's at "
            f"{wanted}; build the store from the checkpoint that the engine loads"
        )


def _no_rows(width: int, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(0, width, dtype=dtype), requires_grad=False)


HOOKS = (
    Hook("sglang.srt.layers.engram.EngramEmbedding", TieredEngramEmbedding),
    Hook("sglang.srt.layers.engram_staging.EngramRowStager", TieredRowStager),
)
# What is replaced or called, and its parameters in the tested versions.
SIGNATURES = {
    engram.EngramEmbedding: {
        "__init__": ("num_embeddings", "dim", "layer_id", "column_bounds"),
        "forward": ("indices", "forward_batch", "cp_all_tokens"),
        "dequant_staged": ("rows", "scales", "copied", "hash_shape"),
        "new_rows": ("indices",),
        "finish_load": ("label",),
        "enable_scheduler_staging": (),
    },
    engram.Engram: {
        "forward": ("x", "hash_ids", "forward_batch", "input_ids", "cp_all_tokens"),
        "embed_rows": ("hash_ids", "forward_batch", "cp_all_tokens"),
    },
    engram.EngramHasher: {"hash_windows": ("tokens", "blocked")},
    engram_staging.EngramRowStager: {
        "from_model": ("model", "hasher", "device"),
        "stage": ("batch",),
        "_windows": ("batch",),
    },
}
