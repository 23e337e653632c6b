"""The n-gram tables of Qwen4-Exp in SGLang, looked up in a store: the engine hashes and scales, the store has the rows.

Input: n-gram ids of a forward, one layer ahead. Output: unscaled bfloat16 rows, as the engine's own gather gives them.
Errors: `EngineMismatchError` while the model is built and loaded; what lookups raise, later.

Taken: the n-gram module, which knows its layer and its hash; its offloaded embedding; and the loader of weights, which
copies the table by itself. Imported only by the plug-in, because it imports SGLang.

Shapes: T tokens, H heads of all orders, D values of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from sglang.srt.models import qwen4_exp

from tierstore.spec import codec_scale

from ...hash_config import LayerHash
from ...hash_spec import HashSpec
from ..gate import EngineMismatchError
from ..tables import ExpectedTable
from .checks import BREAKABLE, DISABLED
from .hooks import Hook
from .layer import LayerTable
from .steps import steps_of

FAMILY = "qwen4_exp"
CODECS = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8_e4m3"}
_SHARD = re.compile(r"\blayers\.(\d+)\.ple\.ple_embedding\.ngram_embedding\.shard_(\d+)\.weight$")


class TieredPleEmbedding(qwen4_exp.Qwen4ExpPinnedHostEmbedding):
    """Stands for `Qwen4ExpPinnedHostEmbedding`: the same calls and attributes, no rows in memory.

    Every rank reads all rows of its tokens, so `reduce` adds nothing up. Only if the engine leaves the adding to a
    later collective, a rank gives the rows of its own part, and zeros.
    """

    def __init__(self, embedding: Any, *, backend: str = "pinned", table_dir: str | None = None) -> None:
        """Takes over the engine's metadata; `bind` gives the table. Raises `EngineMismatchError`."""
        torch.nn.Module.__init__(self)
        if backend != "pinned" or table_dir is not None:
            raise EngineMismatchError(
                f"--ple-offload-backend {backend} keeps the n-gram table in a file of SGLang's; tierstore takes its "
                f"place: leave --ple-offload-backend and --ple-offload-dir out"
            )
        source = embedding.weight
        if source.dtype not in CODECS or embedding.num_added_embeddings:
            raise EngineMismatchError(
                f"an n-gram embedding of {source.dtype} with {embedding.num_added_embeddings} added rows; tierstore "
                f"serves {' and '.join(map(str, CODECS))} without added rows"
            )
        for name in self._COPIED_ATTRIBUTES:
            setattr(self, name, getattr(embedding, name))
        self.quant_method = None  # there is nothing to process after loading
        weight = torch.empty(0, self.embedding_dim, dtype=source.dtype, device="cpu")
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        vars(self.weight)["weight_loader"] = self.weight_loader
        self.register_buffer("weight_scale", embedding.weight_scale, persistent=True)
        del embedding.weight
        self._pending: torch.Tensor | None = None  # where the rows go that were started and not taken

    def bind(self, layer: int, hash_spec: HashSpec) -> None:
        """Opens the layer's table. Raises `EngineMismatchError` if it is not the one that the engine expects."""
        name = hash_spec.table_name(layer)
        width = self.embedding_dim * self.weight.element_size()
        expected = ExpectedTable(
            name, self.org_vocab_size, self.embedding_dim, width, (CODECS[self.weight.dtype],),
            hash_spec.fingerprint(layer),
        )  # fmt: skip
        # Prefill graphs are left where rows are fetched and taken; decode graphs capture both.
        self.tiered = LayerTable(
            f"{name}.ple.ple_embedding.ngram_embedding", expected, decode=(DISABLED,), prefill=(BREAKABLE, DISABLED)
        )
        self.layer = layer
        shard = self.shard_indices
        self._all = steps_of(self.tiered)
        own = (shard.org_vocab_start_index, shard.org_vocab_end_index)
        self._own = steps_of(self.tiered, own) if self.tp_size > 1 else self._all
        self._current = self._all

    def weight_loader(self, _param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        """Is not used: `load_weights` takes the table's tensors out."""
        raise EngineMismatchError(
            f"{self.tiered.layer}: SGLang loads the table as one tensor of {list(loaded_weight.shape)}; use a version "
            f"that tierstore was tested with"
        )

    def compare(self, loaded: torch.Tensor, start_row: int) -> None:
        """Takes no row of a part of the table: compares a few with the store's."""
        if loaded.dtype != self.weight.dtype:
            raise EngineMismatchError(
                f"{self.tiered.layer}: the checkpoint's rows are {loaded.dtype}, the engine's {self.weight.dtype}; set "
                f"text_config.ple_embedding_dtype to the dtype of the checkpoint"
            )
        self.tiered.compare(loaded, start_row, (0, self.tiered.table.spec.row_bytes))

    def finish_load(self) -> None:
        """Checks what was loaded, and logs where the rows come from."""
        self.tiered.check_loaded(weight=self.weight)
        scale = torch.tensor(codec_scale(self.tiered.table.spec.codec)).to(self.weight_scale.dtype)
        loaded = self.weight_scale.detach().cpu().reshape(-1)
        if self.tiered.rows_compared and not bool((loaded == scale).all()):
            raise EngineMismatchError(
                f"{self.tiered.layer}: weight_scale is {loaded.tolist()} in the engine, {scale.item()} in the store; "
                f"build the store from the checkpoint that the engine loads"
            )
        self.tiered.log_ready()

    def gather(self, input_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Reads the rows of ids, [T, H], as [T, H, D] bfloat16.

        Without `out`, blocks until they are read. With it, starts to read them, which `reduce` of it finishes: the
        engine gathers into a buffer of its own while the layer before runs.
        """
        if out is not None and (
            tuple(out.shape) != (*input_ids.shape, self.embedding_dim) or out.dtype != torch.bfloat16
        ):
            raise ValueError(f"rows of {list(input_ids.shape)} ids into {list(out.shape)} of {out.dtype}")
        output = self.allocate_output((*input_ids.shape, self.embedding_dim), input_ids.device) if out is None else out
        if input_ids.numel() == 0:
            return output
        self._current = self._own if self._is_added_later() else self._all
        self._current.start(input_ids)
        self._pending = output
        if out is None:
            self._take()
        return output

    def reduce(self, output: torch.Tensor) -> torch.Tensor:
        """Waits for rows that were started into this output, and returns it: each rank has all of them."""
        if self._pending is not None:
            assert self._pending.data_ptr() == output.data_ptr(), "rows were gathered into another buffer"
            self._take()
        return output

    def _take(self) -> None:
        output, self._pending = self._pending, None
        assert output is not None
        stored = self._current.finish()
        output.copy_(stored.view(self.weight.dtype))  # fp8 to bfloat16 is exact

    def _is_added_later(self) -> bool:
        return self.tp_size > 1 and bool(qwen4_exp.get_attn_tp_context().input_scattered)


class TieredNGramEmbedding(qwen4_exp.Qwen4ExpNGramEmbedding):
    """Stands for `Qwen4ExpNGramEmbedding`: the same, its embedding bound to the table of its layer."""

    def __init__(self, config: Any, embedding_dim: int, ple_layer_index: int = 0, *rest: Any, **named: Any) -> None:
        """The arguments are the engine's. Raises `EngineMismatchError`."""
        layer = sorted(set(config.ple_layer_ids))[ple_layer_index] - 1
        if not config.ple_offload_embedding:
            raise EngineMismatchError(
                f"layers.{layer}: SGLang would load the n-gram table to the GPU; add --ple-offload-embedding, whose "
                f"place tierstore takes"
            )
        super().__init__(config, embedding_dim, ple_layer_index, *rest, **named)
        embedding = self.ngram_embedding
        if not isinstance(embedding, TieredPleEmbedding):
            raise EngineMismatchError(
                f"layers.{layer}: the n-gram embedding is a {type(embedding).__module__}."
                f"{type(embedding).__qualname__}, expected tierstore's: something else replaces it; name the plug-ins "
                f"to load in SGLANG_PLUGINS"
            )
        embedding.bind(layer, hash_of(self, layer))


def hash_of(ngram: Any, layer: int) -> HashSpec:
    """Returns the hash that the engine computes for a layer."""
    multipliers, moduli = ngram.layer_multipliers.tolist(), ngram.ngram_heads_vocab_sizes.tolist()
    eos = int(ngram.eos_token_id)
    return HashSpec(
        family=FAMILY,
        orders=tuple(range(2, ngram.ngram_size + 1)),
        heads=ngram.heads_per_ngram,
        vocab_size=ngram.unigram_vocab_size,
        pad_id=eos,
        barrier_id=eos,
        layer_hashes={layer: LayerHash(tuple(multipliers), tuple(moduli), ngram.ngram_embedding.org_vocab_size)},
        token_map=None,
        needs_token_map=False,
    )


def load_weights(original: Callable[..., Any], model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
    """Loads a model's weights without its n-gram tables, of which a few rows are compared with the store's.

    Args:
        original: The engine's loader.
        model: The engine's model.
        weights: Names and tensors of the checkpoint, whose bytes are read when they are copied.
    """
    served = {module.layer: module for module in model.modules() if isinstance(module, TieredPleEmbedding)}
    loaded = original(model, _without_tables(weights, served, model.config))
    for embedding in served.values():
        embedding.finish_load()
    return loaded


def _without_tables(
    weights: Iterable[tuple[str, torch.Tensor]], served: dict[int, TieredPleEmbedding], config: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    text_config = getattr(config, "text_config", config)
    parts = int(getattr(text_config, "split_ngram_parts", getattr(config, "split_ngram_parts", 512)))
    for name, tensor in weights:
        match = _SHARD.search(name)
        embedding = served.get(int(match[1])) if match else None
        if match is None or embedding is None:
            yield name, tensor
        else:
            part_rows = -(-embedding.org_vocab_size // parts)
            embedding.compare(tensor, int(match[2]) * part_rows)


HOOKS = (
    Hook("sglang.srt.models.qwen4_exp.Qwen4ExpPinnedHostEmbedding", TieredPleEmbedding),
    Hook("sglang.srt.models.qwen4_exp.Qwen4ExpNGramEmbedding", TieredNGramEmbedding),
    Hook("sglang.srt.models.qwen4_exp.Qwen4ExpForConditionalGeneration.load_weights", load_weights),
)
# What is replaced or called, and its parameters in the tested versions.
SIGNATURES = {
    qwen4_exp.Qwen4ExpPinnedHostEmbedding: {
        "__init__": ("embedding", "backend", "table_dir"),
        "allocate_output": ("shape", "device"),
        "gather": ("input_ids", "out"),
        "reduce": ("output",),
        "forward": ("input_ids",),
    },
    qwen4_exp.Qwen4ExpNGramEmbedding: {
        "__init__": ("config", "embedding_dim", "ple_layer_index", "quant_config", "prefix"),
    },
    qwen4_exp.Qwen4ExpPLELayer: {
        "start_prefetch": ("batch", "forward_batch"),
        "_consume_prefetched_embeddings": ("forward_batch",),
    },
    qwen4_exp.Qwen4ExpForConditionalGeneration: {"load_weights": ("weights",)},
}
