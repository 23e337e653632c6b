"""LongCat's n-gram embedding in vLLM, without the rest of the model: its table from a store, and its hash against ours.

Input: a checkpoint with tables, the store built from it, SGLang's kernel as source. Output: a JSON file: whether the
layer over the store gives the bits of the layer over a resident table, whether rows rotated by one do not, and whether
both engines' row ids are those of `HashSpec`. Errors: those of vLLM; the exit status is then not 0.

The engines' kernels are CUDA's. SGLang's, which vLLM's was made from, is compiled here as C++, one thread.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

TOKENS = (19, 1, 30)  # of three requests; the first goes on in a second step
KERNEL = "ComputeNGramIdsKernel"


def main() -> None:
    checkpoint, store, source, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    config = json.loads((checkpoint / "config.json").read_text())
    run_kernel = compiled(source)
    _one_process()
    resident = _embedding(config, checkpoint, None)
    expected, tokens, row_ids = _steps(resident, config, run_kernel)
    tiered = _embedding(config, checkpoint, {"store": store, "dram": "4MiB"})
    found, _, _ = _steps(tiered, config, run_kernel)
    _rotate()
    rotated, _, _ = _steps(tiered, config, run_kernel)
    ours, is_end = _own_row_ids(config, tokens)
    out.write_text(
        json.dumps(
            {
                "equal": all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)),
                "rotated_differs": not any(torch.equal(a, b) for a, b in zip(expected, rotated, strict=True)),
                "weights": list(tiered.oe_embedder.weight.shape),
                "row_ids_equal": bool(torch.equal(row_ids[~is_end], ours[~is_end])),
                "ends_of_text": int(is_end.sum()),
                "ends_of_text_equal": bool(torch.equal(row_ids[is_end], ours[is_end])),
                "sglang_row_ids_equal": _sglang_equal(resident, config, run_kernel),
            }
        )
    )


def compiled(source: Path) -> Any:
    """Compiles the kernel of a CUDA file for this processor; returns a function of the operator's arguments."""
    text = source.read_text()
    start = text.index(f"__global__ void {KERNEL}(")
    kernel = text[start : text.index("\n}\n", start) + 3]
    folder = Path(tempfile.mkdtemp(prefix="longcat-kernel-"))
    (folder / "kernel.cpp").write_text(
        "#include <cstdint>\nstruct Index { int x; };\nstatic Index blockIdx, threadIdx, blockDim{1};\n"
        f"#define __global__ static\n{kernel}\n"
        'extern "C" void run(int batch, int n, int k, int* weights, int* mods, int* sizes, int* tokens, int* lengths,\n'
        "                    int* table, int width, const int64_t* rows, int* columns, int* ids, int eos) {\n"
        "  for (blockIdx.x = 0; blockIdx.x < batch * (n - 1) * k; ++blockIdx.x)\n"
        f"    {KERNEL}(batch, n, k, weights, mods, sizes, tokens, lengths, table, width, rows, columns, ids, eos);\n"
        "}\n"
    )
    library = folder / "kernel.so"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", library, folder / "kernel.cpp"], check=True)
    run = ctypes.CDLL(str(library)).run

    def call(n: int, k: int, *tensors: torch.Tensor, eos: int) -> None:
        weights, mods, sizes, lengths, table, rows, columns, ids = tensors
        for tensor in tensors:
            assert tensor.is_contiguous()
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weights, mods, sizes, ids, lengths, table)]
        run(len(lengths) - 1, n, k, *addresses, table.shape[1],
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows, columns, ids)), eos)  # fmt: skip

    return call


def _one_process() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)


def _embedding(config: dict[str, Any], checkpoint: Path, settings: dict[str, Any] | None) -> Any:
    """Builds and loads the engine's n-gram embedding; prepares this process as a worker does."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.models import longcat_flash_ngram as longcat

    from engram_adapter.engines.vllm import longcat_staging, worker

    text = SimpleNamespace(**config, pad_token_id=3, dtype=torch.bfloat16, to_dict=lambda: dict(config))
    vllm_config = VllmConfig(additional_config={} if settings is None else {"tierstore": settings})
    object.__setattr__(vllm_config, "model_config", SimpleNamespace(hf_text_config=text, model="tiny"))
    with set_current_vllm_config(vllm_config):
        worker.prepare(vllm_config)
        torch.manual_seed(0)
        words = torch.nn.Embedding(config["vocab_size"], config["hidden_size"], dtype=torch.bfloat16)
        made = longcat.NgramEmbedding(text, words)
        for file in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    made.load_weight(name.removeprefix("model."), opened.get_tensor(name))
        if settings is not None:
            longcat_staging.StagedLongcat(vllm_config, torch.nn.ModuleList([made]))
    return made


def _texts(config: dict[str, Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    texts = [
        torch.randint(3, config["vocab_size"], (count,), generator=generator) for count in (TOKENS[0] + 5, *TOKENS[1:])
    ]
    for text, places in zip(texts, ((0, 7, 8, 21), (), (29,)), strict=True):
        text[list(places)] = config["eos_token_id"]
    return texts


def _steps(
    embedding: Any, config: dict[str, Any], run_kernel: Any
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two steps through the engine's own state: returns what they embed, the texts' tokens, and the row ids."""
    from vllm.model_executor.models import longcat_flash_ngram as longcat

    longcat.ops.ngram_compute_n_gram_ids = lambda n, k, *tensors: run_kernel(n, k, *tensors, eos=-1)
    state: Any = object.__new__(longcat.LongcatNgramModelState)
    state.ngram, state.n, state.ctx_len = embedding, config["emb_neighbor_num"], config["emb_neighbor_num"] - 1
    state.eos_id = config["eos_token_id"]
    state.token_context = torch.full((4, state.ctx_len), -1, dtype=torch.int32)
    texts = _texts(config)
    outputs, ids_of = [], []
    for parts, slots in (([texts[0][: TOKENS[0]], *texts[1:]], [2, 0, 1]), ([texts[0][TOKENS[0] :]], [2])):
        starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).to(torch.int32)
        batch = SimpleNamespace(
            num_tokens=int(starts[-1]), num_reqs=len(parts), idx_mapping=torch.tensor(slots), query_start_loc=starts,
            input_ids=torch.cat(parts),
        )  # fmt: skip
        ids = state._compute_oe_ids(batch)
        ids_of.append(ids)
        outputs.append(embedding.embed_batched(batch.input_ids, ids))
    first, second = ids_of
    return outputs, torch.cat(texts), torch.cat([first[: TOKENS[0]], second, first[TOKENS[0] :]])


def _own_row_ids(config: dict[str, Any], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from engram_adapter import HashSpec

    spec = HashSpec.from_config(config)
    texts = _texts(config)
    rows = torch.cat([torch.from_numpy(spec.row_ids(text[None].numpy(), 0)[0]) for text in texts])
    return rows, tokens == config["eos_token_id"]


def _sglang_equal(embedding: Any, config: dict[str, Any], run_kernel: Any) -> bool:
    """Holds SGLang's row ids of whole texts, with its own rule for ends of text, against ours."""
    from engram_adapter import HashSpec

    spec, n, k = HashSpec.from_config(config), config["emb_neighbor_num"], config["emb_split_num"]
    equal = True
    for text in _texts(config):
        ids = torch.empty(len(text), (n - 1) * k, dtype=torch.int32)
        tensors = (torch.tensor([0, len(text)], dtype=torch.int32), text[None].to(torch.int32).contiguous(),
                   torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), ids)  # fmt: skip
        buffers = (embedding.ne_weights, embedding.ne_mods, embedding.exclusive_sizes)
        run_kernel(n, k, *buffers, *tensors, eos=config["eos_token_id"])
        equal &= torch.equal(ids.long(), torch.from_numpy(spec.row_ids(text[None].numpy(), 0)[0]))
    return equal


def _rotate() -> None:
    """The negative control: from now on every row is its neighbour's."""
    from tierstore.store.table import Table

    submit = Table.submit_rows

    def rotated(self: Any, row_ids: Any, out: Any, **named: Any) -> Any:
        return submit(self, (row_ids + 1) % self.spec.num_rows, out, **named)

    Table.submit_rows = rotated  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
