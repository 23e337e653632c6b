"""What a layer's forward cannot do: before each batch, raise what went wrong; while graphs are captured, be quiet.

Input: SGLang's calls. Output: the same. Errors: what lookups raise; `TimeoutError` as `Store.quiet`.

A graph's replay runs no Python: a layer that it holds cannot raise that a lookup of mode `device` failed. And SGLang
captures in CUDA's global mode, in which other threads end a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.model_executor.model_runner_components import ngram_embedding_manager
from sglang.srt.model_executor.runner import decode_cuda_graph_runner, prefill_cuda_graph_runner

from ..quiet_stores import quiet_stores
from .hooks import Hook
from .layer import stores_in_use
from .steps import check_steps

_MANAGER = "sglang.srt.model_executor.model_runner_components.ngram_embedding_manager.NgramEmbeddingManager"
_RUNNER = "sglang.srt.model_executor.runner"


def prepare_for_forward(original: Callable[..., Any], manager: Any, batch: Any, **named: Any) -> Any:
    """Raises what went wrong in earlier steps, whose rows were NaN; then prepares a batch. The scheduler calls it.

    Args:
        original: The engine's method.
        manager: Its owner, of which each scheduler has one, whatever the model.
        batch: The batch that is scheduled, or None.
        named: `chunked_req`, which is the engine's.
    """
    check_steps()
    return original(manager, batch, **named)


def capture(original: Callable[..., Any], runner: Any) -> None:
    """Captures a runner's graphs, of the model or of a draft model, while the layers' stores are quiet."""
    with quiet_stores(stores_in_use()):
        original(runner)


HOOKS = (
    Hook(f"{_MANAGER}.prepare_for_forward", prepare_for_forward),
    Hook(f"{_RUNNER}.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture", capture),
    Hook(f"{_RUNNER}.prefill_cuda_graph_runner.PrefillCudaGraphRunner.capture", capture),
)
# What is called around, and its parameters in the tested versions.
SIGNATURES = {
    ngram_embedding_manager.NgramEmbeddingManager: {"prepare_for_forward": ("batch", "chunked_req")},
    decode_cuda_graph_runner.DecodeCudaGraphRunner: {"capture": ()},
    prefill_cuda_graph_runner.PrefillCudaGraphRunner: {"capture": ()},
}
