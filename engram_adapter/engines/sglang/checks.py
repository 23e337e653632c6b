"""Configurations of SGLang under which rows cannot come from a store, or under which the table would be read anyway.

Input: SGLang's published configuration, and the plug-in's settings. Output: none. Errors: `EngineMismatchError`, with
the option and what to set instead.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.runtime_context import get_exec, get_model

from ..gate import EngineMismatchError
from ..settings import EngineSettings

LAZY_FORMATS = ("auto", "safetensors", "dummy")  # formats that read a tensor only when its loader copies it
DUMMY = "dummy"  # the format that loads no weights
DISABLED, BREAKABLE = "disabled", "breakable"  # graphs that do not capture the lookup


def check_config(settings: EngineSettings, decode: tuple[str, ...], prefill: tuple[str, ...]) -> None:
    """Raises `EngineMismatchError` for the first option that does not fit.

    Args:
        settings: What the user set.
        decode: Graph backends of decode in which this model's lookup runs Python at every step.
        prefill: The same of prefill.
    """
    model, execution = get_model(), get_exec()
    _check_loading(model)
    if execution.kernel.enable_nvidia_megakernel:
        raise EngineMismatchError("--enable-nvidia-megakernel reads the n-gram table from its own memory; leave it out")
    if settings.mode == "host":
        _check_graphs(execution.graph.cuda_graph_config, {"decode": decode, "prefill": prefill})


def load_format() -> str:
    """Returns the format of weights, as --load-format names it."""
    value = get_model().load_format
    return str(getattr(value, "value", value))


def _check_loading(model: Any) -> None:
    if load_format() not in LAZY_FORMATS:
        raise EngineMismatchError(
            f"--load-format {load_format()} reads the whole n-gram table from the checkpoint; use --load-format "
            f"safetensors, which reads what is copied"
        )
    eager = {
        "--weight-loader-disable-mmap": model.weight_loader_disable_mmap,
        "--weight-loader-prefetch-checkpoints": model.weight_loader_prefetch_checkpoints,
        "--startup-weight-load-mode overlap": model.is_startup_weight_load_overlap,
        f"--weight-cache-mode {model.weight_cache_mode}": model.weight_cache_mode != "off",
    }
    for option, is_on in eager.items():
        if is_on:
            raise EngineMismatchError(f"{option} reads the whole n-gram table from the checkpoint; leave it out")


def _check_graphs(config: Any, allowed: dict[str, tuple[str, ...]]) -> None:
    """Refuses graphs that would capture the lookup, and replay the rows of the capture for ever."""
    for phase, backends in allowed.items():
        backend = DISABLED if config is None else str(getattr(config, phase).backend)  # None: a device without graphs
        if backend not in backends:
            raise EngineMismatchError(
                f'{phase} graphs are {backend!r}: mode "host" reads rows in Python, which a captured graph does not '
                f"run; add --cuda-graph-backend-{phase}={backends[0]}, or set TIERSTORE_MODE=device with TIERSTORE_HBM"
            )
