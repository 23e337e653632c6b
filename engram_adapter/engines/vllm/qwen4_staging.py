"""Where the layers of `qwen4_exp` are put into vLLM: registered for the engine's classes, and fed before every forward.

Input: this process's modules of vLLM, the loaded model, the batches of its steps. Output: replaced classes; rows under
way when a step's forward begins. Errors: `EngineMismatchError` for classes that are not those this was written for, and
for a loaded model in which the replacement is not in use.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from ..gate import EngineMismatchError, check_attributes, check_signatures
from ..quiet_stores import quiet_stores
from .capturing import quiet_captures
from .checks import graph_tokens_max, settings_of
from .counters import counters_of
from .qwen4_exp import TieredPle

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
_STATE_SIGNATURES = {
    "__init__": ("vllm_config", "model", "encoder_cache", "device"),
    "prepare_inputs": ("input_batch", "req_states"),
}


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
    _stage_steps(model_state.Qwen4ExpModelState, engine)
    quiet_captures(engine)


def restore() -> None:
    """Takes the replacements of this process away, if there are any."""
    custom_op: Any = sys.modules.get("vllm.model_executor.custom_op")
    for name in _STOCK if custom_op is not None else ():
        if issubclass(custom_op.op_registry_oot.get(name, object), TieredPle):
            del custom_op.op_registry_oot[name]


def _stage_steps(state_class: Any, engine: str) -> None:
    """Has the model's state check the layers once they are loaded, and stage rows before every forward."""
    stock_init, stock_prepare = state_class.__init__, state_class.prepare_inputs
    if getattr(stock_prepare, "of_tierstore", False):
        return
    check_signatures(state_class, _STATE_SIGNATURES, engine)

    @functools.wraps(stock_init)
    def init(self: Any, vllm_config: Any, model: torch.nn.Module, *more: Any, **named: Any) -> None:
        stock_init(self, vllm_config, model, *more, **named)
        self.of_tierstore = StagedLayers(vllm_config, model)

    @functools.wraps(stock_prepare)
    def prepare_inputs(self: Any, input_batch: Any, req_states: Any) -> Any:
        model_inputs = stock_prepare(self, input_batch, req_states)
        self.of_tierstore.stage(input_batch, model_inputs)
        return model_inputs

    prepare_inputs.of_tierstore = True  # type: ignore[attr-defined]
    state_class.__init__, state_class.prepare_inputs = init, prepare_inputs


class StagedLayers:
    """The n-gram layers of a loaded model that look up in a store; none if tierstore is not configured."""

    def __init__(self, vllm_config: Any, model: torch.nn.Module) -> None:
        """Finds and checks the layers. Raises `EngineMismatchError` for one that is not in use as it must be."""
        hashings: list[Any] = [each for each in model.modules() if hasattr(each, "compute_ngram_ids")]
        self._layers = [(each, each.ngram_embedding) for each in hashings]
        if settings_of(vllm_config) is None:
            self._layers = []
        elif not hashings:
            raise EngineMismatchError(f"{type(model).__name__} has no n-gram layer, its configuration names some")
        for hashing, embedding in self._layers:
            if not isinstance(embedding, TieredPle):
                raise EngineMismatchError(
                    f"{type(model).__name__} has a {type(embedding).__name__}, not the class of tierstore that was "
                    f"registered for it; use a tested version of vLLM, without other plug-ins for this layer"
                )
            embedding.check_loaded(hashing)
        self._graph_tokens_max = graph_tokens_max(vllm_config)
        self._counters = counters_of(vllm_config, {each.prefix: each.rows for _, each in self._layers})

    def quiet(self) -> Any:
        """Returns a context in which the layers' stores disturb no capture."""
        return quiet_stores(embedding.rows.store for _, embedding in self._layers)

    def stage(self, input_batch: Any, model_inputs: Any) -> None:
        """Starts the lookups of a step's tokens. Waits for them if the step may be the replay of a whole graph."""
        tokens = input_batch.num_tokens
        for _, embedding in self._layers:
            embedding.rows.check()
            embedding.rows.is_staged = False  # a graph's replay, in which no Python ran, leaves it
        staged = [(hashing, embedding.rows) for hashing, embedding in self._layers if embedding.rows.stages]
        if not staged or not tokens:
            return
        token_ids = model_inputs.get("input_ids", input_batch.input_ids)[:tokens]
        arguments = (token_ids, model_inputs["query_start_loc"], model_inputs["ngram_context"])
        for hashing, rows in staged:
            rows.stage(hashing.compute_ngram_ids(*arguments))
        if token_ids.is_cuda and tokens <= self._graph_tokens_max:
            for _, rows in staged:  # a graph's replay runs no Python
                rows.finish()
