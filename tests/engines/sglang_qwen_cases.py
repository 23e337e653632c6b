"""Qwen4-Exp's n-gram tables on the real SGLang: resident against served from a store. Run by `sglang_layers.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sglang_lab as lab
import torch
from sglang.srt.configs.qwen4_exp import Qwen4ExpTextConfig
from sglang.srt.models import qwen4_exp
from sglang.srt.plugins import load_plugins
from sglang_lab import refused

LAYERS, DIM, PARTS = (1, 2), 32, 4
# SGLang's own classes, in a tuple: the plug-in's hook rebinds every module's name for them, of this module too.
STOCK = (qwen4_exp.Qwen4ExpPinnedHostEmbedding, qwen4_exp.Qwen4ExpNGramEmbedding)


def prepare(folder: Path) -> dict[str, Callable[[], None]]:
    """Builds checkpoints of both dtypes and their stores, loads the plug-in as SGLang does; returns the cases."""
    shape = {"rows_per_head": 400, "layers": LAYERS, "dim": DIM, "hidden": 64, "parts": PARTS}
    bf16 = lab.built(folder, "qwen4_exp", dtype="bf16", **shape)
    fp8 = lab.built(folder, "qwen4_exp", seed=1, dtype="fp8", tokenizer=bf16[0], **shape)
    _, other = lab.built(folder, "qwen4_exp", seed=2, dtype="bf16", tokenizer=bf16[0], **shape)
    with lab.environment(TIERSTORE_STORE=str(bf16[1])):
        load_plugins()
    cases = Cases({"bf16": bf16, "fp8": fp8}, str(other))
    return {name: getattr(cases, name) for name in dir(cases) if name.startswith(("the_", "a_"))}


class Cases:
    """A checkpoint of each dtype and its store; another store of the same shape and hash with other rows."""

    def __init__(self, built: dict[str, tuple[Path, Path]], other_store: str) -> None:
        self.built, self.other_store = built, other_store

    def the_rows_are_those_of_the_resident_table(self) -> None:
        for dtype in self.built:
            served, resident = self.model(dtype), self.resident(dtype)
            for index in range(len(LAYERS)):
                ids = self.row_ids(served[index], 300)
                for module in (served[index], resident[index]):
                    assert isinstance(module, STOCK[1])
                found = looked_up(served[index], ids)
                assert torch.equal(bits(found), bits(looked_up(resident[index], ids)))
                assert found.dtype == torch.bfloat16
                assert served[index].ngram_embedding.weight.shape == (0, DIM)
                assert served[index].ngram_embedding(ids[:0]).shape == (0, ids.shape[1], DIM)

    def the_rows_are_started_a_layer_ahead_and_taken_later(self) -> None:
        """As `start_prefetch` and `_consume_prefetched_embeddings` do, whose streams need a GPU."""
        served, resident = self.model("fp8")[0], self.resident("fp8")[0]
        embedding = served.ngram_embedding
        for tokens in (7, 90, 3):
            ids = self.row_ids(served, tokens)
            buffer = embedding.allocate_output((tokens, DIM * ids.shape[1]), ids.device)
            embedding.gather(ids, out=buffer.view(tokens, ids.shape[1], -1))
            taken = embedding.reduce(buffer)
            assert taken is buffer
            expected = looked_up(resident, ids).flatten(1)
            assert torch.equal(bits(taken * embedding.weight_scale), bits(expected))

    def the_loader_of_weights_takes_no_row(self) -> None:
        for dtype in self.built:
            asked: list[str] = []
            model = self.model(dtype, watch=asked)
            assert not any("shard_" in name for name in asked), asked
            assert asked, "the engine's own loader was given nothing"
            for module in model:
                assert module.ngram_embedding.tiered.rows_compared >= len(LAYERS)

    def a_rank_gives_its_own_rows_if_the_engine_adds_up_later(self) -> None:
        served = self.model("bf16")[0]
        embedding = served.ngram_embedding
        ids = self.row_ids(served, 40)
        whole = looked_up(self.resident("bf16")[0], ids)
        shard = embedding.shard_indices
        shard.org_vocab_start_index, shard.org_vocab_end_index = 300, 1500
        embedding.tp_size, embedding._is_added_later = 2, lambda: True
        with lab.environment(TIERSTORE_STORE=str(self.built["bf16"][1])), lab.published():
            embedding.bind(LAYERS[0], hash_of(served))
        own = ((ids >= 300) & (ids < 1500)).unsqueeze(-1)
        assert own.any()
        assert not own.all()
        with lab.published():
            assert torch.equal(embedding(ids), torch.where(own, whole, 0))

    def a_table_of_other_rows_is_refused_while_weights_load(self) -> None:
        refused("is not row", "compared rows differ", lambda: self.model("bf16", store=self.other_store))

    def a_table_of_other_rows_gives_another_layer(self) -> None:
        """The negative control: without the comparison, the layer's output shows that rows are wrong."""
        right, wrong = self.model("bf16")[0], self.model("bf16", store=self.other_store, load=False)[0]
        ids = self.row_ids(right, 20)
        assert not torch.equal(right.ngram_embedding(ids), wrong.ngram_embedding(ids))

    def a_table_of_another_dtype_is_refused(self) -> None:
        store = str(self.built["fp8"][1])
        refused("bytes a row", "the engine expects", lambda: self.model("bf16", store=store))

    def a_checkpoint_of_another_dtype_is_refused(self) -> None:
        refused(
            "the checkpoint's rows are torch.bfloat16", "ple_embedding_dtype",
            lambda: self.model("fp8", weights_of="bf16"),
        )  # fmt: skip

    def a_hash_that_differs_is_refused(self) -> None:
        refused("hash fingerprint", "the engine expects", lambda: self.model("bf16", seed=99))

    def a_table_on_the_gpu_is_refused(self) -> None:
        refused("--ple-offload-embedding", "layers.1", lambda: self.model("bf16", ple_offload_embedding=False))

    def a_table_in_a_file_of_the_engine_is_refused(self) -> None:
        refused("--ple-offload-backend file", "leave", lambda: self.model("bf16", ple_offload_backend="file"))

    def a_graph_that_captures_the_lookup_is_refused(self) -> None:
        for phase, backend in (("decode", "full"), ("decode", "breakable"), ("prefill", "full")):
            options = {phase: backend}
            refused(
                f"{phase} graphs are '{backend}'", "--cuda-graph-backend",
                lambda options=options: self.model("bf16", published=options),
            )  # fmt: skip
        self.model("bf16", published={"prefill": "breakable"})

    def a_weight_with_rows_is_refused(self) -> None:
        embedding = self.model("bf16")[0].ngram_embedding
        embedding.weight = torch.nn.Parameter(torch.zeros(3, DIM, dtype=torch.bfloat16), requires_grad=False)
        refused("weight has 3 rows in memory", "expected none", embedding.finish_load)

    def a_scale_that_differs_is_refused(self) -> None:
        embedding = self.model("fp8")[0].ngram_embedding
        embedding.weight_scale.fill_(0.5)
        refused("weight_scale is [0.5]", "in the store", embedding.finish_load)

    def model(
        self, dtype: str, *, store: str | None = None, load: bool = True, weights_of: str | None = None,
        watch: list[str] | None = None, published: dict[str, str] | None = None, **changed: Any,
    ) -> torch.nn.ModuleList:  # fmt: skip
        """The n-gram modules of a model, as the engine builds and loads them."""
        given = {"ple_offload_embedding": True} | changed
        store = str(self.built[dtype][1]) if store is None else store
        with lab.published(**(published or {})), lab.environment(TIERSTORE_STORE=store, TIERSTORE_DRAM="64MiB"):
            modules = torch.nn.ModuleList(self.module(dtype, index, given) for index in range(len(LAYERS)))
            if load:
                weights = weights_of_checkpoint(self.built[weights_of or dtype][0])
                qwen4_exp.Qwen4ExpForConditionalGeneration.load_weights(
                    loadable(modules, self.config(dtype, given)), weights if watch is None else watched(weights, watch)
                )
        return modules

    def resident(self, dtype: str) -> torch.nn.ModuleList:
        """SGLang's own modules with the whole table in memory, loaded by its own loader."""
        given, ours = {"ple_offload_embedding": False}, qwen4_exp.Qwen4ExpNGramEmbedding
        qwen4_exp.Qwen4ExpNGramEmbedding = STOCK[1]  # by this name its loader knows the modules
        try:
            with lab.published():
                modules = torch.nn.ModuleList(self.module(dtype, index, given) for index in range(len(LAYERS)))
                qwen4_exp.Qwen4ExpForConditionalGeneration.load_weights(
                    loadable(modules, self.config(dtype, given)), weights_of_checkpoint(self.built[dtype][0])
                )
        finally:
            qwen4_exp.Qwen4ExpNGramEmbedding = ours
        return modules

    def module(self, dtype: str, index: int, changed: dict[str, Any]) -> torch.nn.Module:
        config = self.config(dtype, changed)
        return qwen4_exp.Qwen4ExpNGramEmbedding(config, config.ple_embed_dim, ple_layer_index=index)

    def config(self, dtype: str, changed: dict[str, Any]) -> Qwen4ExpTextConfig:
        text = json.loads((self.built[dtype][0] / "config.json").read_text())["text_config"]
        return Qwen4ExpTextConfig(**(text | changed))

    def row_ids(self, module: Any, tokens: int) -> torch.Tensor:
        """Row ids of random tokens by the engine's hash, int64 [tokens, heads]."""
        generator = torch.Generator().manual_seed(tokens)
        windows = torch.randint(0, module.unigram_vocab_size, (tokens, module.ngram_size), generator=generator)
        pool, before = SimpleNamespace(ple_window_cache=None), qwen4_exp.get_req_to_token_pool
        qwen4_exp.get_req_to_token_pool = lambda: pool
        try:
            return module._hash_contexts(windows)
        finally:
            qwen4_exp.get_req_to_token_pool = before


def weights_of_checkpoint(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors; SGLang takes a scale of one value, [1], and the synthetic checkpoint has it as a scalar."""
    for name, tensor in lab.tensors_of(folder):
        yield name, tensor.reshape(1) if name.endswith("weight_scale") else tensor


def hash_of(module: Any) -> Any:
    from engram_adapter.engines.sglang.qwen4_exp import hash_of

    return hash_of(module, LAYERS[module.ple_layer_index])


def watched(weights: Any, names: list[str]) -> Any:
    """Weights that note what the engine's own loader was asked to look at."""
    from engram_adapter.engines.sglang import qwen4_exp as ours

    before = ours._without_tables

    def noting(*arguments: Any) -> Any:
        ours._without_tables = before
        for name, tensor in before(*arguments):
            names.append(name)
            yield name, tensor

    ours._without_tables = noting
    return weights


def loadable(modules: torch.nn.ModuleList, config: Any) -> torch.nn.Module:
    """A model with nothing but n-gram modules, where SGLang's loader looks for them."""
    layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(max(LAYERS) + 1))
    for layer, module in zip(LAYERS, modules, strict=True):
        layers[layer].ple = torch.nn.Module()
        layers[layer].ple.ple_embedding = module
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = layers
    model.config, model.start_layer, model.end_layer = config, 0, len(layers)
    model.language_model_only, model.pp_group = False, SimpleNamespace(is_last_rank=True)
    kind = qwen4_exp.Qwen4ExpForConditionalGeneration
    model._load_qwen4_exp_ple_buffer = kind._load_qwen4_exp_ple_buffer.__get__(model)
    return model


def looked_up(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the engine's own forward makes of ids: rows times scale, [T, H, D]."""
    with lab.published():
        return module._embed_ngram_ids(ids, None, len(ids))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int16)
