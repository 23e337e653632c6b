"""What both families of vLLM share: layers checked once a model is loaded, rows under way before every forward.

Input: the class of a model's state, loaded models, batches. Output: rows under way when a step's forward begins.
Errors: `EngineMismatchError` for a loaded model in which the replacement is not in use; what lookups raise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from ..gate import check_signatures
from ..quiet_stores import quiet_stores
from ..rows import EngineRows
from .checks import graph_tokens_max, settings_of
from .counters import counters_of

_STATE = {
    "__init__": ("vllm_config", "model", "encoder_cache", "device"),
    "prepare_inputs": ("input_batch", "req_states"),
}


class StagedLayers:
    """The n-gram layers of a loaded model that look up in a store; none if tierstore is not configured.

    A family says how its layers are found and how a step's row ids are computed.
    """

    def __init__(self, vllm_config: Any, model: torch.nn.Module) -> None:
        """Finds and checks the layers. Raises `EngineMismatchError` for one that is not in use as it must be."""
        self.embeddings: list[Any] = [] if settings_of(vllm_config) is None else self.checked_layers(model)
        self._stages = any(embedding.rows.stages for embedding in self.embeddings)
        self._graph_tokens_max = graph_tokens_max(vllm_config)
        self._counters = counters_of(vllm_config, {each.prefix: each.rows for each in self.embeddings})

    def checked_layers(self, model: torch.nn.Module) -> list[Any]:
        """Returns the layers of a loaded model, each with `prefix` and `rows`. Raises `EngineMismatchError`."""
        raise NotImplementedError

    def row_ids(self, input_batch: Any, model_inputs: dict[str, Any]) -> Iterable[tuple[EngineRows, torch.Tensor]]:
        """Returns the row ids of a step, [T, C] for the rows of each layer; none of a step that looks nothing up."""
        raise NotImplementedError

    def quiet(self) -> Any:
        """Returns a context in which the layers' stores disturb no capture."""
        return quiet_stores(embedding.rows.store for embedding in self.embeddings)

    def stage(self, input_batch: Any, model_inputs: dict[str, Any]) -> None:
        """Starts the lookups of a step's tokens. Waits for them if the step may be the replay of a whole graph."""
        for embedding in self.embeddings:
            embedding.rows.check()
            embedding.rows.is_staged = False  # a graph's replay, in which no Python ran, leaves it
        tokens = input_batch.num_tokens
        if not self._stages or not tokens:
            return
        for rows, row_ids in self.row_ids(input_batch, model_inputs):
            rows.stage(row_ids)
        if input_batch.input_ids.is_cuda and tokens <= self._graph_tokens_max:
            for embedding in self.embeddings:  # a graph's replay runs no Python
                embedding.rows.finish()


def stage_steps(state_class: Any, layers_class: type[StagedLayers], engine: str) -> None:
    """Has a model's state check the layers once they are loaded, and stage rows before every forward.

    Args:
        state_class: The engine's class, changed in this process, once.
        layers_class: The family's.
        engine: Package and version, for messages.

    Raises:
        EngineMismatchError: The class is not the one that this was written for.
    """
    stock_init, stock_prepare = state_class.__init__, state_class.prepare_inputs
    if hasattr(stock_prepare, "of_tierstore"):
        return
    check_signatures(state_class, _STATE, engine)

    @functools.wraps(stock_init)
    def init(self: Any, vllm_config: Any, model: torch.nn.Module, *more: Any, **named: Any) -> None:
        stock_init(self, vllm_config, model, *more, **named)
        self.of_tierstore = layers_class(vllm_config, model)

    @functools.wraps(stock_prepare)
    def prepare_inputs(self: Any, input_batch: Any, req_states: Any) -> Any:
        model_inputs = stock_prepare(self, input_batch, req_states)
        self.of_tierstore.stage(input_batch, model_inputs)
        return model_inputs

    prepare_inputs.of_tierstore = True  # type: ignore[attr-defined]
    state_class.__init__, state_class.prepare_inputs = init, prepare_inputs
