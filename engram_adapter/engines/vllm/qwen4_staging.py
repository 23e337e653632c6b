"""Where the layers of `qwen4_exp` are put into vLLM: registered for the engine's classes, and fed before every forward.

Input: this process's modules of vLLM, the loaded model, the batches of its steps. Output: replaced classes; rows under
way when a step's forward begins. Errors: `EngineMismatchError` for classes that are not those this was written for, and
for a loaded model in which the replacement is not in use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..gate import EngineMismatchError, check_attributes, check_signatures
from ..rows import EngineRows
from .capturing import quiet_captures
from .qwen4_exp import TieredPle
from .staging import StagedLayers, stage_steps

_STOCK = ("Qwen4ExpPLEPinnedHostEmbedding", "Qwen4ExpPLEDeviceEmbedding")  # with and without engram_config.cpu_offload
_SIGNATURES = {
    "__init__": (
        "num_embeddings", "embedding_dim", "params_dtype", "padding_size", "prefix", "embedding_method",
        "num_ngram_heads", "max_total_tokens", "data_parallel_rank", "reduce_results",
    ),
    "allocate_embedding_weight": ("num_embeddings", "embedding_dim", "dtype"),
    "weight_loader": ("param", "loaded_weight", "checkpoint_start"),
    "start_prefetch": ("ngram_ids",),
    "finalize_prefetch": ("total_tokens",),
    "dequantize": ("embeddings", "output_dtype"),
}  # fmt: skip
_HASH_SIGNATURES = {"compute_ngram_ids": ("input_ids", "query_start_loc", "ngram_context", "output")}


def replace(engine: str) -> None:
    """Puts the replacements of this process in place; engine: package and version. Raises `EngineMismatchError`."""
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
    from vllm.model_executor import custom_op
    from vllm.models.qwen4_exp.common import ngram_embedding as common
    from vllm.models.qwen4_exp.nvidia import model_state, ngram_embedding

    check_attributes(common, _STOCK, engine)
    check_signatures(ngram_embedding.Qwen4ExpNGramEmbedding, _HASH_SIGNATURES, engine)
    for name in _STOCK:
        stock = getattr(common, name)
        registered = custom_op.op_registry_oot.get(name)
        if registered is not None and issubclass(registered, TieredPle):
            continue
        if registered is not None:
            raise EngineMismatchError(
                f"{engine}: {name} is replaced by {registered.__module__}.{registered.__qualname__} already; choose "
                f"one plug-in with VLLM_PLUGINS"
            )
        check_signatures(stock, _SIGNATURES, engine)
        methods = {
            "stock_class": stock,
            "start_prefetch": eager_break_during_capture(TieredPle.start_prefetch),
            "_finish": eager_break_during_capture(TieredPle._finish),
        }
        tiered = type(f"Tiered{name}", (TieredPle, stock), methods)
        custom_op.PluggableLayer.register_oot(tiered, name=name)
    stage_steps(model_state.Qwen4ExpModelState, StagedPles, engine)
    quiet_captures(engine)


def restore() -> None:
    """Takes the replacements of this process away, if there are any."""
    custom_op: Any = sys.modules.get("vllm.model_executor.custom_op")
    for name in _STOCK if custom_op is not None else ():
        if issubclass(custom_op.op_registry_oot.get(name, object), TieredPle):
            del custom_op.op_registry_oot[name]


class StagedPles(StagedLayers):
    """The layers of a loaded Qwen4-Exp model, each with the module that hashes for it."""

    _hashings: list[Any]

    def checked_layers(self, model: torch.nn.Module) -> list[Any]:
        """Returns the layers. Raises `EngineMismatchError` for one that is not in use as it must be."""
        self._hashings = [each for each in model.modules() if hasattr(each, "compute_ngram_ids")]
        if not self._hashings:
            raise EngineMismatchError(f"{type(model).__name__} has no n-gram layer, its configuration names some")
        embeddings = [hashing.ngram_embedding for hashing in self._hashings]
        for hashing, embedding in zip(self._hashings, embeddings, strict=True):
            if not isinstance(embedding, TieredPle):
                raise EngineMismatchError(
                    f"{type(model).__name__} has a {type(embedding).__name__}, not the class of tierstore that was "
                    f"registered for it; use a tested version of vLLM, without other plug-ins for this layer"
                )
            embedding.check_loaded(hashing)
        return embeddings

    def row_ids(self, input_batch: Any, model_inputs: dict[str, Any]) -> Iterator[tuple[EngineRows, torch.Tensor]]:
        """Yields a step's row ids, [T, H] for the rows of each layer."""
        token_ids = model_inputs.get("input_ids", input_batch.input_ids)[: input_batch.num_tokens]
        arguments = (token_ids, model_inputs["query_start_loc"], model_inputs["ngram_context"])
        for hashing in self._hashings:
            yield hashing.ngram_embedding.rows, hashing.compute_ngram_ids(*arguments)
