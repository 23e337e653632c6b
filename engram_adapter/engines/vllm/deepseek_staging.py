"""Where the layers of `deepseek_v41` are put into vLLM: made by the engine's `Engram`, and fed before every forward.

Input: this process's modules of vLLM, the loaded model, the batches of its steps. Output: one method of `Engram` and
the model state's, replaced; rows under way when a step's forward begins. Errors: `EngineMismatchError` for classes that
are not those this was written for, and for a loaded model in which the replacement is not in use.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from ..gate import EngineMismatchError, check_attributes, check_signatures
from ..rows import EngineRows
from .capturing import quiet_captures
from .checks import settings_of
from .deepseek_v41 import TieredEngramEmbedding
from .staging import StagedLayers, stage_steps

_ENGRAM = {
    "__init__": (
        "config", "quant_config", "layout", "layer_hash_index", "use_sequence_parallel", "prefix", "prefetch_stream",
    ),
    "_create_embedding": ("layout", "layer_hash_index"),
    "_init_staging": ("max_tokens", "head_dim"),
    "prepare_embeddings": ("hash_ids",),
    "embed": ("hash_ids",),
}  # fmt: skip
_EMBEDDING = {"lookup": ("indices", "out", "background"), "forward": ("indices",), "collapse_huge_pages": ()}
_HASH = {
    "forward": (
        "input_ids", "positions", "query_start_loc", "dead_mask", "lookback_token_ids", "lookback_dead_mask",
        "slot_mapping", "block_table",
    )
}  # fmt: skip
_LAYOUT = ("layer_ids", "num_embeddings", "head_dim", "primes", "offsets")  # of a layout, which only an object has
_MODULE = "vllm.models.deepseek_v41.common.engram"


def replace(engine: str) -> None:
    """Puts the replacements of this process in place; engine: package and version. Raises `EngineMismatchError`."""
    from vllm.models.deepseek_v41.common import engram
    from vllm.models.deepseek_v41.nvidia import model_state

    stock = engram.Engram._create_embedding
    if not hasattr(stock, "of_tierstore"):
        check_attributes(engram, ("Engram", "EngramLayout", "NgramHashState", "ParallelEngramEmbedding"), engine)
        check_signatures(engram.Engram, _ENGRAM, engine)
        check_signatures(engram.ParallelEngramEmbedding, _EMBEDDING, engine)
        check_signatures(engram.NgramHashState, _HASH, engine)

        @functools.wraps(stock)
        def create(self: Any, layout: Any, layer_hash_index: int) -> torch.nn.Module:
            from vllm.config import get_current_vllm_config

            vllm_config = get_current_vllm_config()
            settings = settings_of(vllm_config)
            if settings is None:
                return stock(self, layout, layer_hash_index)
            check_attributes(layout, _LAYOUT, engine)
            return TieredEngramEmbedding(vllm_config, settings, layout, layer_hash_index)

        create.of_tierstore = stock  # type: ignore[attr-defined]
        engram.Engram._create_embedding = create
    stage_steps(model_state.DeepseekV41ModelState, StagedEngrams, engine)
    quiet_captures(engine)


def restore() -> None:
    """Takes the replacement of this process away, if there is one."""
    engram: Any = sys.modules.get(_MODULE)
    if engram is not None and hasattr(engram.Engram._create_embedding, "of_tierstore"):
        engram.Engram._create_embedding = engram.Engram._create_embedding.of_tierstore


class StagedEngrams(StagedLayers):
    """The Engram layers of a loaded DeepSeek-V4.1 model, and the one module that hashes for all of them."""

    _hashing: Any

    def checked_layers(self, model: torch.nn.Module) -> list[Any]:
        """Returns the layers. Raises `EngineMismatchError` for one that is not in use as it must be."""
        modules: list[Any] = list(model.modules())
        engrams = [each for each in modules if hasattr(each, "embed_tokens") and hasattr(each, "layer_hash_index")]
        hashing = [each for each in modules if hasattr(each, "multipliers") and hasattr(each, "token_map")]
        if not engrams or len(hashing) != 1:
            raise EngineMismatchError(
                f"{type(model).__name__} has {len(engrams)} Engram layers and {len(hashing)} n-gram hashes, expected "
                f"some and one; use a tested version of vLLM"
            )
        self._hashing = hashing[0]
        for each in modules:
            if hasattr(each, "engram_dp_shared_memory"):
                each.engram_dp_shared_memory = True  # a rank looks up its own tokens: no row ids are gathered
        embeddings = [engram.embed_tokens for engram in engrams]
        for embedding in embeddings:
            if not isinstance(embedding, TieredEngramEmbedding) or embedding.weight.shape[0]:
                raise EngineMismatchError(
                    f"{type(model).__name__} has a {type(embedding).__name__} of {embedding.weight.shape[0]} rows, not "
                    f"the class of tierstore without rows; use a tested version of vLLM, without other plug-ins"
                )
            embedding.check_loaded(self._hashing)
        return embeddings

    def row_ids(self, input_batch: Any, model_inputs: dict[str, Any]) -> list[tuple[EngineRows, torch.Tensor]]:
        """Returns a step's row ids, [T, C] for the rows of each layer; none in the profile run, which looks none up."""
        lookback = model_inputs.get("lookback_token_ids")
        if lookback is None or not self._hashing.ensure_cache():
            return []
        tokens = input_batch.num_tokens
        token_ids = input_batch.input_ids[:tokens]
        hashes = self._hashing(
            token_ids, input_batch.positions[:tokens], input_batch.query_start_loc, _is_image(token_ids), lookback,
            _is_image(lookback), None, None,
        )  # fmt: skip
        return [(embedding.rows, hashes[:, embedding.layer_hash_index]) for embedding in self.embeddings]


def _is_image(token_ids: torch.Tensor) -> torch.Tensor:
    from vllm.models.deepseek_v41.common.mm_preprocess import image_sentinel_mask

    mask: torch.Tensor = image_sentinel_mask(token_ids)
    return mask
