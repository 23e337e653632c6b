"""Where LongCat's table is put into vLLM: made in place of the engine's, and asked before every forward.

Input: this process's modules of vLLM, the loaded model. Output: the name that the engine's `NgramEmbedding` makes its
table by, and the method that loads it, replaced. Errors: `EngineMismatchError` for classes that are not those this was
written for, and for a loaded model in which the replacement is not in use.
"""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import torch

from ..gate import EngineMismatchError, check_attributes, check_signatures
from ..rows import EngineRows
from .capturing import quiet_captures
from .checks import settings_of
from .longcat import TieredLongcatEmbedding
from .staging import StagedLayers, stage_steps

_MODULE = "vllm.model_executor.models.longcat_flash_ngram"
_SIGNATURES = {
    "__init__": ("config", "base_embeddings"),
    "_init_ngram_embeddings": (),
    "load_weight": ("weight_name", "loaded_weight"),
    "embed_batched": ("input_ids", "oe_ids"),
}
_HEAD = re.compile(r"ngram_embeddings\.embedders\.(\d+)\.")


def replace(engine: str) -> None:
    """Puts the replacements of this process in place; engine: package and version. Raises `EngineMismatchError`."""
    from vllm.model_executor.models import longcat_flash_ngram as longcat

    stock = longcat.VocabParallelEmbedding
    if not hasattr(stock, "of_tierstore"):
        check_attributes(longcat, ("NgramEmbedding", "LongcatNgramModelState"), engine)
        check_signatures(longcat.NgramEmbedding, _SIGNATURES, engine)
        longcat.VocabParallelEmbedding = _maker(stock)
        longcat.NgramEmbedding.load_weight = _loader(longcat.NgramEmbedding.load_weight)
    stage_steps(longcat.LongcatNgramModelState, StagedLongcat, engine)
    quiet_captures(engine)


def restore() -> None:
    """Takes the replacements of this process away, if there are any."""
    longcat: Any = sys.modules.get(_MODULE)
    if longcat is not None and hasattr(longcat.VocabParallelEmbedding, "of_tierstore"):
        longcat.VocabParallelEmbedding = longcat.VocabParallelEmbedding.of_tierstore
        longcat.NgramEmbedding.load_weight = longcat.NgramEmbedding.load_weight.of_tierstore


def _maker(stock: Any) -> Any:
    """Returns what stands for the class of the engine's table: its own, if tierstore is not configured."""

    @functools.wraps(stock, updated=())
    def make(num_embeddings: int, embedding_dim: int, *more: Any, **named: Any) -> torch.nn.Module:
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        settings = settings_of(vllm_config)
        if settings is None:
            made: torch.nn.Module = stock(num_embeddings, embedding_dim, *more, **named)
            return made
        dtype = named.get("params_dtype") or (more[0] if more else torch.get_default_dtype())
        return TieredLongcatEmbedding(vllm_config, settings, num_embeddings, embedding_dim, dtype)

    make.of_tierstore = stock  # type: ignore[attr-defined]
    return make


def _loader(stock: Any) -> Any:
    @functools.wraps(stock)
    def load_weight(self: Any, weight_name: str, loaded_weight: torch.Tensor) -> str:
        head = _HEAD.search(weight_name)
        if head and isinstance(self.oe_embedder, TieredLongcatEmbedding):
            self.oe_embedder.compare(int(head[1]), loaded_weight)
        name: str = stock(self, weight_name, loaded_weight)
        return name

    load_weight.of_tierstore = stock  # type: ignore[attr-defined]
    return load_weight


class StagedLongcat(StagedLayers):
    """The n-gram table of a loaded LongCat model. The engine's own state looks it up before every forward."""

    def checked_layers(self, model: torch.nn.Module) -> list[Any]:
        """Returns the table, alone in a list. Raises `EngineMismatchError` if it is not in use as it must be."""
        modules: list[Any] = list(model.modules())
        hashings = [each for each in modules if hasattr(each, "oe_embedder") and hasattr(each, "ne_mods")]
        if len(hashings) != 1:
            raise EngineMismatchError(
                f"{type(model).__name__} has {len(hashings)} n-gram embeddings, expected one; use a tested vLLM"
            )
        (hashing,) = hashings
        embedding = hashing.oe_embedder
        if not isinstance(embedding, TieredLongcatEmbedding) or embedding.weight.shape[0]:
            raise EngineMismatchError(
                f"{type(model).__name__} has a {type(embedding).__name__} of {embedding.weight.shape[0]} rows, not the "
                f"class of tierstore without rows; use a tested version of vLLM, without other plug-ins"
            )
        embedding.check_loaded(hashing, int(hashing.eos_token_id))
        return [embedding]

    def row_ids(self, _input_batch: Any, _model_inputs: dict[str, Any]) -> list[tuple[EngineRows, torch.Tensor]]:
        """Returns nothing to start: when a step's inputs are prepared, its rows are there already."""
        return []
