"""What happens when a worker of vLLM starts: its configuration is read, the engine checked, the layers replaced.

Input: the worker's `VllmConfig`. Output: the classes of the model that it will load, replaced in this process; without
settings, put back. Errors: `EngineMismatchError` and `ConfigError`, which end the worker.
"""

from __future__ import annotations

import logging
from typing import Any

from ..gate import EngineMismatchError, check_version
from . import checks, deepseek_staging, longcat_staging, qwen4_staging
from .configured import SETTINGS_KEY

logger = logging.getLogger("vllm.tierstore")  # below the engine's logger, whose handlers show it

TESTED = ("0.32", "0.34")
_LAYERS = {
    "ple_layer_ids": qwen4_staging,
    "engram_layer_ids": deepseek_staging,
    "ngram_vocab_size_ratio": longcat_staging,
}  # by the key of the configuration that only such a model has


def prepare(vllm_config: Any) -> None:
    """Replaces the layers that a worker's model will have, if tierstore is configured; else puts the engine's back.

    Raises:
        ConfigError: A setting does not fit.
        EngineMismatchError: The version or a signature of the engine is another, or its configuration cannot work.
    """
    settings = checks.settings_of(vllm_config)
    if settings is None:
        for layers in _LAYERS.values():
            layers.restore()
        return
    text_config = vllm_config.model_config.hf_text_config
    found = [layers for key, layers in _LAYERS.items() if getattr(text_config, key, None)]
    if not found:
        _no_layers(vllm_config, text_config)
        return
    version = check_version("vllm", TESTED, forced=not settings.strict)
    checks.check_config(vllm_config)
    for layers in found:
        layers.replace(f"vllm {version}")


def _no_layers(vllm_config: Any, text_config: Any) -> None:
    """Refuses a model without tables if it was configured for this engine; the environment may be meant for others."""
    additional = vllm_config.additional_config
    message = (
        f"model {getattr(vllm_config.model_config, 'model', '?')} ({getattr(text_config, 'model_type', '?')}) has no "
        f"n-gram tables that tierstore serves (configuration keys {', '.join(_LAYERS)})"
    )
    if isinstance(additional, dict) and SETTINGS_KEY in additional:
        raise EngineMismatchError(f"{message}: leave {SETTINGS_KEY} out of additional_config, or serve such a model")
    logger.warning("%s: TIERSTORE_STORE is not used here", message)
