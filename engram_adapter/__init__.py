"""The model's side of tierstore: token map, hashing, prefetch, drop-in modules.

Input: token ids, or the row ids that a model already has. Output: rows in the table's float type, from `tierstore`
lookups. Errors: `ImportError` for what needs torch, if it is not installed.

What needs torch is imported when it is first used, so that hashing, building and serving do without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tierstore.extras import missing

from . import families as families  # registers every family, whichever module is imported first
from .hash_spec import HashSpec
from .token_map import build_token_map

if TYPE_CHECKING:
    from .checkpoints import build_checkpoint, open_checkpoint
    from .embedding import TieredEmbedding
    from .engines.transformers.loading import load_pretrained, load_trainable
    from .engines.transformers.swap import swap_embedding
    from .engines.transformers.trainable import swap_trainable
    from .engram_layer import EngramLayer
    from .exporting import export_checkpoint
    from .init import init_checkpoint
    from .joined_optimizer import JoinedOptimizer
    from .profiles import open_profile, replan, token_profile
    from .row_id_embedding import RowIdEmbedding
    from .table_optimizer import TableOptimizer, dense_parameters
    from .trainable import TrainableEmbedding, TrainableRows, trained_tables
    from .training_plans import plan_training

__all__ = [
    "EngramLayer",
    "HashSpec",
    "JoinedOptimizer",
    "RowIdEmbedding",
    "TableOptimizer",
    "TieredEmbedding",
    "TrainableEmbedding",
    "TrainableRows",
    "build_checkpoint",
    "build_token_map",
    "dense_parameters",
    "export_checkpoint",
    "init_checkpoint",
    "load_pretrained",
    "load_trainable",
    "open_checkpoint",
    "open_profile",
    "plan_training",
    "replan",
    "swap_embedding",
    "swap_trainable",
    "token_profile",
    "trained_tables",
]

_NEEDS_TORCH = {
    "CommitCallback": "engines.transformers.commits",  # not in __all__: it needs transformers
    "EngramLayer": "engram_layer",
    "JoinedOptimizer": "joined_optimizer",
    "RowIdEmbedding": "row_id_embedding",
    "TableOptimizer": "table_optimizer",
    "TieredEmbedding": "embedding",
    "TrainableEmbedding": "trainable",
    "TrainableRows": "trainable",
    "dense_parameters": "table_optimizer",
    "load_pretrained": "engines.transformers.loading",
    "load_trainable": "engines.transformers.loading",
    "swap_embedding": "engines.transformers.swap",
    "swap_trainable": "engines.transformers.trainable",
    "trained_tables": "trainable",
}
# The jobs behind the commands, which lookups do without.
_JOBS = {
    "build_checkpoint": "checkpoints",
    "export_checkpoint": "exporting",
    "init_checkpoint": "init",
    "open_checkpoint": "checkpoints",
    "open_profile": "profiles",
    "plan_training": "training_plans",
    "replan": "profiles",
    "token_profile": "profiles",
}


def __getattr__(name: str) -> Any:
    if name in _JOBS:
        return getattr(importlib.import_module(f".{_JOBS[name]}", __name__), name)
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_NEEDS_TORCH[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name == __name__ or str(error.name).startswith(f"{__name__}."):
            raise
        raise ImportError(str(missing(f"engram_adapter.{name}", "torch", error))) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NEEDS_TORCH})
