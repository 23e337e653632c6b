"""An SGLang of names and signatures alone, as the tested versions have them, for tests that run without it.

Input: a fixture's `monkeypatch`. Output: modules in `sys.modules`, with a hook registry that works as SGLang's does.
`tests/engines/sglang_layers.py` holds the same names to the real package.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

OURS = "engram_adapter.engines.sglang."
MANAGER = "sglang.srt.model_executor.model_runner_components.ngram_embedding_manager"
RUNNER = "sglang.srt.model_executor.runner"
BREAKABLE = "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph"


class HookType(Enum):
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    """Applies hooks when all plug-ins are loaded, and only logs one that fails."""

    _hooks: ClassVar[dict[str, tuple[Any, HookType]]] = {}

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: HookType) -> None:
        cls._hooks[target] = (hook, hook_type)

    @classmethod
    def apply_hooks(cls) -> None:
        for target, (hook, hook_type) in cls._hooks.items():
            with suppress(Exception):
                owner, name = target.rsplit(".", 1)
                found = pkgutil.resolve_name(target)
                setattr(
                    pkgutil.resolve_name(owner), name, _wrapped(found, hook) if hook_type is HookType.AROUND else hook
                )


def _wrapped(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: hook(original, *args, **kwargs)


class EngramEmbedding(torch.nn.Module):
    def __init__(self, num_embeddings, dim, layer_id, column_bounds): ...
    def forward(self, indices, forward_batch=None, *, cp_all_tokens=False): ...
    def dequant_staged(self, rows, scales, copied, hash_shape): ...
    def new_rows(self, indices): ...
    def finish_load(self, label): ...
    def enable_scheduler_staging(self): ...


class Engram(torch.nn.Module):
    def forward(self, x, hash_ids, forward_batch=None, *, input_ids, cp_all_tokens=False): ...
    def embed_rows(self, hash_ids, forward_batch, cp_all_tokens): ...


class EngramHasher(torch.nn.Module):
    def hash_windows(self, tokens, blocked): ...


class EngramRowStager:
    @classmethod
    def from_model(cls, model, hasher, device): ...
    def stage(self, batch): ...
    def _windows(self, batch): ...


class Qwen4ExpPinnedHostEmbedding(torch.nn.Module):
    _COPIED_ATTRIBUTES = ("tp_size", "org_vocab_size", "shard_indices", "embedding_dim")

    def __init__(self, embedding, *, backend="pinned", table_dir=None): ...

    def allocate_output(self, shape, device):
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    def gather(self, input_ids, out=None): ...
    def reduce(self, output): ...

    def forward(self, input_ids):
        return self.reduce(self.gather(input_ids))


class Qwen4ExpNGramEmbedding(torch.nn.Module):
    def __init__(self, config, embedding_dim, ple_layer_index=0, quant_config=None, prefix=""): ...


class Qwen4ExpPLELayer(torch.nn.Module):
    def start_prefetch(self, batch, forward_batch): ...
    def _consume_prefetched_embeddings(self, forward_batch): ...


class Qwen4ExpForConditionalGeneration(torch.nn.Module):
    def load_weights(self, weights): ...


class NgramEmbeddingManager:
    def prepare_for_forward(self, batch, *, chunked_req):  # noqa: ARG002
        return batch


class DecodeCudaGraphRunner:
    def capture(self):
        self.seen_while_captured = self.look()


class PrefillCudaGraphRunner(DecodeCudaGraphRunner): ...


class _EagerOnGraph:
    """A method that a captured graph leaves: called as it is, there being no graph."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        def bound(*args: Any) -> Any:
            return self.inner(instance, *args)

        bound.run_eager = bound
        return bound


def install(monkeypatch: pytest.MonkeyPatch, version: str = "0.5.23") -> SimpleNamespace:
    """Puts the modules in place until the test ends; returns the configuration that they publish, to change it."""
    published = SimpleNamespace(
        model=SimpleNamespace(
            load_format="auto", weight_loader_disable_mmap=False, weight_loader_prefetch_checkpoints=False,
            is_startup_weight_load_overlap=False, weight_cache_mode="off",
        ),
        exec=SimpleNamespace(
            kernel=SimpleNamespace(enable_nvidia_megakernel=False), graph=SimpleNamespace(cuda_graph_config=None)
        ),
        parallel=SimpleNamespace(attn_cp_size=1, tp_rank=0),
        observability=SimpleNamespace(enable_metrics=False),
        schedule=SimpleNamespace(chunked_prefill_size=64),
    )  # fmt: skip
    registry = type("HookRegistry", (HookRegistry,), {"_hooks": {}, "apply_hooks": vars(HookRegistry)["apply_hooks"]})
    modules: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": version},
        "sglang.srt.plugins": {"load_plugins": lambda *plugins: load_plugins(registry, *plugins)},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": registry, "HookType": HookType},
        "sglang.srt.layers.engram": _copies(EngramEmbedding, Engram, EngramHasher) | {"engram_gather": None},
        "sglang.srt.layers.engram_staging": _copies(EngramRowStager),
        "sglang.srt.models.qwen4_exp": _copies(
            Qwen4ExpPinnedHostEmbedding, Qwen4ExpNGramEmbedding, Qwen4ExpPLELayer, Qwen4ExpForConditionalGeneration
        )
        | {"get_attn_tp_context": lambda: SimpleNamespace(input_scattered=False)},
        "sglang.srt.runtime_context": {
            "get_exec": lambda: published.exec,
            "get_model": lambda: published.model,
            "get_parallel": lambda: published.parallel,
            "get_observability": lambda: published.observability,
            "get_schedule": lambda: published.schedule,
        },
        MANAGER: _copies(NgramEmbeddingManager),
        f"{RUNNER}.decode_cuda_graph_runner": _copies(DecodeCudaGraphRunner),
        f"{RUNNER}.prefill_cuda_graph_runner": _copies(PrefillCudaGraphRunner),
        f"{BREAKABLE}.breakable_cuda_graph": {"eager_on_graph": _EagerOnGraph},
        f"{BREAKABLE}.context": {"is_in_breakable_cuda_graph": lambda: False},
    }
    for name, contents in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            _module(monkeypatch, ".".join(parts[:end]))
        vars(sys.modules[name]).update(contents)
    return published


def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """For a fixture: installs the fake; the modules of ours that import it are of this test alone."""
    yield install(monkeypatch)
    for name in [name for name in sys.modules if name.startswith(OURS)]:
        del sys.modules[name]


def load(*plugins: Callable[[], None]) -> None:
    """Loads plug-ins as each of SGLang's processes does."""
    vars(sys.modules["sglang.srt.plugins"])["load_plugins"](*plugins)


def load_plugins(registry: type[HookRegistry], *plugins: Callable[[], None]) -> None:
    """Runs plug-ins as SGLang does: what one raises is logged, and then all hooks are applied."""
    for plugin in plugins:
        try:
            plugin()
        except Exception as error:
            print(f"Failed to execute general plugin: {error!r}")
    registry.apply_hooks()


def _module(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if getattr(sys.modules.get(name), "is_fake", False):
        return
    module = ModuleType(name)
    module.__path__, module.is_fake = [], True
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _copies(*classes: type) -> dict[str, type]:
    """Classes of a test's own, which it may change."""
    return {each.__name__: type(each.__name__, (each,), {"__init__": each.__init__}) for each in classes}
