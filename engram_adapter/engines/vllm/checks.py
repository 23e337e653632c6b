"""What a configuration of vLLM says: the plug-in's settings, and options under which rows cannot come from a store.

Input: a `VllmConfig`. Output: settings. Errors: `EngineMismatchError`, with the option and what
to set instead.
"""

from __future__ import annotations

from typing import Any

import torch

from ..gate import EngineMismatchError
from ..settings import EngineSettings
from .configured import SETTINGS_KEY

LAZY_FORMATS = ("auto", "hf", "safetensors", "dummy")  # formats that read a tensor only when its loader copies it
LAZY_STRATEGIES = (None, "lazy")


def settings_of(vllm_config: Any) -> EngineSettings | None:
    """Returns the settings in a configuration of vLLM, else those of the environment, None without any."""
    additional = getattr(vllm_config, "additional_config", None)
    given = additional.get(SETTINGS_KEY) if isinstance(additional, dict) else None
    return EngineSettings.find(given)


def graph_tokens_max(vllm_config: Any) -> int:
    """Returns the tokens of the largest step that may be the replay of a whole graph; 0 if there are no such graphs."""
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        return 0
    return int(compilation.max_cudagraph_capture_size or 0)


def model_device() -> str:
    """Returns the device that a model is built on, while it is: "cpu", or "cuda:0"."""
    device = torch.get_default_device()
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def check_config(vllm_config: Any) -> None:
    """Raises `EngineMismatchError` for the first option that does not fit; has files of weights read lazily."""
    _check_loading(vllm_config.load_config)
    _check_parallel(vllm_config)
    _check_platform()


def _check_loading(load_config: Any) -> None:
    load_format = str(load_config.load_format)
    if load_format not in LAZY_FORMATS:
        raise EngineMismatchError(
            f"load_format {load_format!r} reads the whole n-gram table from the checkpoint; use --load-format "
            f"safetensors, which reads what is copied"
        )
    strategy = load_config.safetensors_load_strategy
    if strategy not in LAZY_STRATEGIES:
        raise EngineMismatchError(
            f"safetensors_load_strategy {strategy!r} reads the whole n-gram table from the checkpoint; use "
            f"--safetensors-load-strategy lazy"
        )
    load_config.safetensors_load_strategy = "lazy"  # left out, it would read ahead whole files from a network's disk
    extra = load_config.model_loader_extra_config
    if isinstance(extra, dict) and extra.get("enable_multithread_load"):
        raise EngineMismatchError(
            "model_loader_extra_config enable_multithread_load reads the whole n-gram table from the checkpoint; "
            "leave it out"
        )


def _check_parallel(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    if not vllm_config.use_v2_model_runner:
        raise EngineMismatchError(
            "the V1 model runner has no place before the forward where rows are staged, and captured graphs would "
            "repeat those of the capture; leave VLLM_USE_V2_MODEL_RUNNER at its default, or set it to 1"
        )
    if parallel.pipeline_parallel_size > 1:
        raise EngineMismatchError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}: n-gram layers need the token ids, which "
            f"only the first stage has; use 1"
        )
    if getattr(parallel, "enable_dbo", False):
        raise EngineMismatchError(
            "enable_dbo splits a step into two that run at once, and rows are staged for whole steps; leave it out"
        )
    if parallel.data_parallel_size > 1:
        _check_data_parallel(vllm_config.engram_config)


def _check_data_parallel(engram: Any) -> None:
    if getattr(engram, "embedding_across_dp", False):
        raise EngineMismatchError(
            "engram_config embedding_across_dp divides the table over data-parallel ranks, and every rank looks up in "
            "the store; leave it out"
        )


def _check_platform() -> None:
    from vllm.platforms import current_platform

    if current_platform.is_rocm():
        raise EngineMismatchError(
            "vLLM on ROCm has n-gram layers of its own, which tierstore does not replace; run without it there"
        )
