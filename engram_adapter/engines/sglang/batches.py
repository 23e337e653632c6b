"""What a layer's forward does not see: before each batch, what went wrong in steps before it is raised.

Input: SGLang's calls. Output: the same. Errors: what lookups raise.

A graph's replay runs no Python: a layer that it holds cannot raise that a lookup of mode `device` failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.model_executor.model_runner_components import ngram_embedding_manager

from .hooks import Hook
from .steps import check_steps

_MANAGER = "sglang.srt.model_executor.model_runner_components.ngram_embedding_manager.NgramEmbeddingManager"


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


HOOKS = (Hook(f"{_MANAGER}.prepare_for_forward", prepare_for_forward),)
# What is called around, and its parameters in the tested versions.
SIGNATURES = {ngram_embedding_manager.NgramEmbeddingManager: {"prepare_for_forward": ("batch", "chunked_req")}}
