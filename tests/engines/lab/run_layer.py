"""What a step costs in the plug-in's own layer, and how much of its reads other work hides; no engine runs.

Input: a store of one table, rows of it that DRAM will hold. Output: a JSON file of times in microseconds.
Errors: those of vLLM; the exit status is then not 0. Run in the lab's environment, on the real class of the engine.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

TOKENS = (1, 64, 2048)
REPEATS = 200


def main() -> None:
    store_path, config_path, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    config = json.loads(config_path.read_text())
    config = config.get("text_config", config)
    _one_process()
    result: dict[str, Any] = {"hits": [], "staged": []}
    layer = _layer(config, store_path, "2GiB")
    for tokens in TOKENS:
        result["hits"].append(_hits(layer, tokens))
    table_bytes = layer.rows.table.spec.table_bytes
    del layer
    layer = _layer(config, store_path, f"{table_bytes // 10 >> 20}MiB")
    for tokens in (64, 2048):
        result["staged"].append(_staged(layer, tokens))
    out.write_text(json.dumps(result))


def _one_process() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)


def _layer(config: dict[str, Any], store: str, dram: str) -> Any:
    """The engine's embedding with the plug-in in its place, as a worker builds it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.models.qwen4_exp.common import ngram_embedding as common
    from vllm.models.qwen4_exp.nvidia.ngram_embedding import Qwen4ExpNGramEmbedding

    from engram_adapter.engines.vllm import worker

    text = SimpleNamespace(**config, to_dict=lambda: dict(config))
    vllm_config = VllmConfig(additional_config={"tierstore": {"store": store, "dram": dram}})
    object.__setattr__(vllm_config, "model_config", SimpleNamespace(hf_text_config=text, model="tiny"))
    with set_current_vllm_config(vllm_config):
        worker.prepare(vllm_config)
        torch.set_default_dtype(torch.bfloat16)
        hashing = Qwen4ExpNGramEmbedding(
            text, config["ple_embed_dim"], 0, 4096, data_parallel_rank=0, prefix="model.layers.1.ple.ple_embedding"
        )
        torch.set_default_dtype(torch.float32)
    assert type(hashing.ngram_embedding).__name__.startswith("Tiered"), common.__file__
    return hashing.ngram_embedding


def _ids(layer: Any, tokens: int, seed: int) -> torch.Tensor:
    """Row ids of random n-grams: all heads of a token belong together, as an engine gives them."""
    spec = layer.rows.table.spec
    keys = np.random.default_rng(seed).integers(0, 1 << 62, (tokens, len(spec.orders)))
    return torch.from_numpy(spec.row_ids(keys))


def _microseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begun) / 1000


def _hits(layer: Any, tokens: int) -> dict[str, Any]:
    """All rows hit: the layer's start and finalize against `Table.rows` of the same ids, turn about."""
    ids, table = _ids(layer, tokens, 1), layer.rows.table
    plain = ids.numpy()
    out = np.empty((*plain.shape, table.spec.row_bytes), dtype=np.uint8)

    def step() -> None:
        layer.start_prefetch(ids)
        layer.finalize_prefetch(tokens)

    for _ in range(3):
        table.rows(plain, out=out)
        step()
    assert np.array_equal(out, layer.rows.rows[:tokens].numpy())
    times = [(_microseconds(lambda: table.rows(plain, out=out)), _microseconds(step)) for _ in range(REPEATS)]
    rows_us, layer_us = (statistics.median(each) for each in zip(*times, strict=True))
    return {
        "tokens": tokens, "table_rows_us": rows_us, "layer_us": layer_us,
        "target_us": 1.3 * rows_us + 50, "met": layer_us <= 1.3 * rows_us + 50,
    }  # fmt: skip


def _staged(layer: Any, tokens: int) -> dict[str, Any]:
    """A tenth of the rows in DRAM: the wait of a step whose reads were started before work that outlasts them."""
    table, waits, reads = layer.rows.table, [], []
    out = np.empty((tokens, table.spec.num_heads, table.spec.row_bytes), dtype=np.uint8)
    for turn in range(20):
        ids = _ids(layer, tokens, 2 * turn + 10).numpy()
        reads.append(_microseconds(partial(table.rows, ids, out=out)))
    work_s = 2 * max(reads) / 1e6
    for turn in range(20):
        layer.rows.stage(_ids(layer, tokens, 2 * turn + 11))
        time.sleep(work_s)  # the engine's work, on other threads or a GPU
        waits.append(_microseconds(lambda: layer.finalize_prefetch(tokens)))
    read_us, wait_us = statistics.median(reads), statistics.median(waits)
    return {
        "tokens": tokens, "read_us": read_us, "wait_us": wait_us, "fraction": wait_us / read_us,
        "met": wait_us <= 0.1 * read_us,
    }  # fmt: skip


if __name__ == "__main__":
    main()
