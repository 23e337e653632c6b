"""DeepSeek-V4.1's Engram layers in vLLM, without the rest of the model, whose attention is CUDA's alone.

Input: a checkpoint with tables, the store built from it. Output: a JSON file: whether the layers over the store give
the bits of the layers over resident tables, whether rows rotated by one do not, and what loading read.
Errors: those of vLLM; the exit status is then not 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

TOKENS, REQUESTS = 40, 3


def main() -> None:
    checkpoint, store, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    config = SimpleNamespace(**json.loads((checkpoint / "config.json").read_text())["text_config"], rms_norm_eps=1e-6)
    _without_gpu(checkpoint)
    resident, hashing = _model(config, checkpoint, None)
    expected = _outputs(resident, hashing, config)
    read_before = _read_bytes()
    tiered, _ = _model(config, checkpoint, {"store": store, "dram": "4MiB"})
    read = _read_bytes() - read_before
    staged = _outputs(tiered, hashing, config, staged=True)
    lazily = _outputs(tiered, hashing, config)
    packed = _packed_equal(tiered, resident, hashing)
    _rotate()
    rotated = _outputs(tiered, hashing, config)
    result = {
        "layers": len(expected),
        "equal_staged": all(torch.equal(a, b) for a, b in zip(expected, staged, strict=True)),
        "equal_in_forward": all(torch.equal(a, b) for a, b in zip(expected, lazily, strict=True)),
        "equal_packed": packed,
        "rotated_differs": not any(torch.equal(a, b) for a, b in zip(expected, rotated, strict=True)),
        "bytes_read_at_load": read,
        "weights": [list(layer.embed_tokens.weight.shape) for layer in tiered],
    }
    out.write_text(json.dumps(result))


def _without_gpu(checkpoint: Path) -> None:
    """Answers what the engine asks of a GPU when it builds the layers, and loads the tokenizer by its file."""
    import transformers
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=4)  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.accelerator.current_device_index = lambda: 0
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: tokenizer
    with _configured(None, None):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)


def _configured(config: Any, settings: dict[str, Any] | None) -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config

    vllm_config = VllmConfig(additional_config={} if settings is None else {"tierstore": settings})
    vllm_config.scheduler_config.max_num_batched_tokens = 64
    if config is not None:
        text = SimpleNamespace(**vars(config), to_dict=lambda: dict(vars(config)))
        object.__setattr__(vllm_config, "model_config", SimpleNamespace(
            hf_text_config=text, tokenizer="-", trust_remote_code=False, revision=None, model="tiny",
        ))  # fmt: skip
        from vllm.config.engram import EngramConfig

        object.__setattr__(vllm_config, "engram_config", EngramConfig(cpu_offload=False))
    return set_current_vllm_config(vllm_config)


def _model(config: Any, checkpoint: Path, settings: dict[str, Any] | None) -> tuple[list[Any], Any]:
    """Builds and loads the Engram layers, and the n-gram hash; prepares this process as a worker does."""
    from vllm.config import get_current_vllm_config
    from vllm.models.deepseek_v41.common.engram import Engram, EngramLayout, NgramHashState

    from engram_adapter.engines.vllm import deepseek_staging, worker

    with _configured(config, settings):
        vllm_config = get_current_vllm_config()
        torch.set_default_dtype(torch.bfloat16)
        worker.prepare(vllm_config)
        layout = EngramLayout(config)
        hashing = NgramHashState(vllm_config, layout, SimpleNamespace(block_size=16, kv_cache=torch.zeros(1)))
        hashing.use_slot_cache = False
        layers = []
        for index, layer in enumerate(layout.layer_ids):
            torch.manual_seed(index)
            engram = Engram(config, None, layout, index, False, f"layers.{layer}.engram")
            _load(engram, checkpoint, layer)
            layers.append(engram)
        torch.set_default_dtype(torch.float32)
        if settings is not None:
            model = torch.nn.ModuleList([*layers, hashing])
            layers[0].of_test = deepseek_staging.StagedEngrams(vllm_config, model)
    return layers, hashing


def _load(engram: Any, checkpoint: Path, layer: int) -> None:
    """Loads a layer's table by the engine's loaders, from lazily opened files; other weights are random."""
    names = {"embed.weight": "weight", "embed.scale": "weight_scale_inv"}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name, parameter in names.items():
                full = f"layers.{layer}.engram.{name}"
                if full in opened.keys():  # noqa: SIM118
                    found = getattr(engram.embed_tokens, parameter)
                    found.weight_loader(found, opened.get_tensor(full))
    for name, parameter in engram.named_parameters():
        if not name.startswith("embed_tokens"):
            parameter.data.normal_(std=0.05)
    engram.wkv.quant_method.process_weights_after_loading(engram.wkv)


def _hashes(hashing: Any) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    """Returns ids of three requests that are in the middle of their texts, and the batch they make."""
    generator = torch.Generator().manual_seed(3)
    vocab_size = len(hashing.token_map)
    token_ids = torch.randint(0, vocab_size, (TOKENS,), generator=generator, dtype=torch.int32)
    lookback = torch.randint(0, vocab_size, (REQUESTS, hashing.lookback_depth), generator=generator, dtype=torch.int32)
    starts = torch.tensor([0, 7, 8, TOKENS], dtype=torch.int32)
    positions = torch.cat([torch.arange(5, 12), torch.arange(9, 10), torch.arange(4, 36)])
    batch = SimpleNamespace(num_tokens=TOKENS, input_ids=token_ids, positions=positions, query_start_loc=starts)
    none = torch.zeros(TOKENS, dtype=torch.bool)
    dead = torch.zeros(lookback.shape, dtype=torch.bool)
    hashes = hashing(token_ids, positions, starts, none, lookback, dead, None, None)
    return hashes, batch, {"lookback_token_ids": lookback}


def _outputs(layers: list[Any], hashing: Any, config: Any, *, staged: bool = False) -> list[torch.Tensor]:
    hashes, batch, inputs = _hashes(hashing)
    if staged:
        layers[0].of_test.stage(batch, inputs)
    for layer in layers:
        layer.prepare_embeddings(hashes[:, layer.layer_hash_index])
    states = torch.randn(
        TOKENS, config.hc_mult, config.hidden_size, generator=torch.Generator().manual_seed(4)
    ).bfloat16()
    keep = torch.arange(TOKENS) != 11
    return [layer(states, hashes[:, layer.layer_hash_index], keep) for layer in layers]


def _packed_equal(tiered: list[Any], resident: list[Any], hashing: Any) -> bool:
    """Compares rows as stored, with ids outside of the table among them, as padded tokens carry."""
    hashes, _, _ = _hashes(hashing)
    equal = True
    for ours, stock in zip(tiered, resident, strict=True):
        ids = hashes[:, ours.layer_hash_index].clone()
        ids[3] = -1
        ids[4, :5] = ours.embed_tokens.num_embeddings + 9
        table = stock.embed_tokens
        rows = torch.cat([table.weight.data.view(torch.uint8), table.weight_scale_inv.data], dim=1)
        inside = (ids >= 0) & (ids < len(rows))
        expected = torch.where(inside.unsqueeze(-1), rows[ids.clamp(0, len(rows) - 1).long()], 0)
        out = torch.full((len(ids), ids.shape[1], rows.shape[1]), 7, dtype=torch.uint8)
        ours.embed_tokens.lookup(ids, out)
        equal &= torch.equal(out, expected.to(torch.uint8))
    return equal


def _rotate() -> None:
    """The negative control: from now on every row is its neighbour's."""
    from tierstore.store.table import Table

    submit = Table.submit_rows

    def rotated(self: Any, row_ids: Any, out: Any, **named: Any) -> Any:
        return submit(self, (row_ids + 1) % self.spec.num_rows, out, **named)

    Table.submit_rows = rotated  # type: ignore[method-assign]


def _read_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


if __name__ == "__main__":
    main()
