"""DeepSeek-V4.1's Engram layers on the real SGLang: resident against served from a store. Run by `sglang_layers.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import sglang_lab as lab
import torch
from sglang.srt.layers import engram, engram_staging
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import breakable_cuda_graph
from sglang.srt.plugins import load_plugins
from sglang_lab import refused
from transformers import PreTrainedTokenizerFast

LAYERS, DIM, HIDDEN, HC = (1, 3), 64, 128, 4
# SGLang's own class, kept in a tuple: the plug-in's hook rebinds every module's name for it, of this module too.
STOCK = (engram.EngramEmbedding,)


def prepare(folder: Path) -> dict[str, Callable[[], None]]:
    """Builds two checkpoints and their stores, loads the plug-in as SGLang does; returns the cases by name."""
    shape = {"rows_per_head": 500, "layers": LAYERS, "dim": DIM, "hidden": HIDDEN}
    checkpoint, store = lab.built(folder, "deepseek_v41", **shape)
    _, other_store = lab.built(folder, "deepseek_v41", seed=1, tokenizer=checkpoint, **shape)
    with lab.environment(TIERSTORE_STORE=str(store)):
        load_plugins()
    cases = Cases(checkpoint, str(store), str(other_store))
    return {name: getattr(cases, name) for name in dir(cases) if name.startswith(("the_", "a_"))}


class Cases:
    """One checkpoint, the store built from it, and another store of the same shape and hash with other rows."""

    def __init__(self, checkpoint: Path, store: str, other_store: str) -> None:
        self.store, self.other_store = store, other_store
        text = json.loads((checkpoint / "config.json").read_text())["text_config"]
        self.config = SimpleNamespace(**text, rms_norm_eps=1e-6)
        self.layout = engram.EngramLayout.from_config(self.config)
        self.tensors = dict(lab.tensors_of(checkpoint))
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
        self.hasher = engram.EngramHasher(
            self.layout, tokenizer, text["engram_pad_token_id"], text["engram_compressed_vocab_size"]
        )
        self.vocab_size = len(tokenizer)

    def the_class_is_replaced_where_it_is_named(self) -> None:
        assert engram.EngramEmbedding is not STOCK[0]
        assert engram_staging.EngramEmbedding is engram.EngramEmbedding  # a name imported before the plug-in

    def the_rows_are_those_of_the_resident_table(self) -> None:
        for index, layer in enumerate(LAYERS):
            embed, resident = self.model(self.store)[index].embed, self.resident(index, layer)
            assert embed.weight.shape == (0, DIM)
            assert embed.scale.shape == (0, DIM // 32)
            ids = self.row_ids(200)[:, index]
            assert torch.equal(embed(ids).view(torch.int16), resident(ids).view(torch.int16))
            assert embed(ids[:0]).shape == (0, ids.shape[1], DIM)

    def the_layer_computes_the_same_with_a_resident_table(self) -> None:
        for index, layer in enumerate(LAYERS):
            served = self.model(self.store)[index]
            ids, tokens = self.row_ids(50)[:, index], torch.arange(50)
            hidden = torch.randn(50, HC, HIDDEN, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
            found = served(hidden, ids, None, input_ids=tokens)
            served.embed = self.resident(index, layer)
            assert torch.equal(found, served(hidden, ids, None, input_ids=tokens))
            assert not torch.equal(found, hidden)

    def the_rows_of_an_extend_batch_are_staged(self) -> None:
        model = self.model(self.store)
        stager = self.stager(model)
        assert stager is not None
        assert all(layer.embed.staged_by_scheduler for layer in model)
        prompt = torch.randint(0, self.vocab_size, (40,), generator=torch.Generator().manual_seed(5))
        first, second = self.batch(prompt[:25], 0), self.batch(prompt, 25)  # a prompt in two chunks
        for batch, tokens in ((first, slice(0, 25)), (second, slice(25, 40))):
            staged, ids = stager.stage(batch), self.ids_of(prompt)[tokens]
            for index, layer in enumerate(LAYERS):
                padded = torch.Size((len(ids) + 7, ids.shape[2]))  # as a captured graph's bucket pads
                rows = model[index].embed.dequant_staged(*staged[index], padded)
                assert torch.equal(rows[: len(ids)], self.resident(index, layer)(ids[:, index]))
                assert not rows[len(ids) :].any()

    def a_staged_batch_that_another_overtook_gives_its_own_rows(self) -> None:
        model = self.model(self.store)
        stager = self.stager(model)
        prompts = [
            torch.randint(0, self.vocab_size, (12,), generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)
        ]
        staged = [stager.stage(self.batch(prompt, 0)) for prompt in prompts]
        for prompt, steps in zip(prompts, staged, strict=True):
            ids = self.ids_of(prompt)[:, 0]
            for _ in range(2):  # a forward that runs twice, as before a capture
                rows = model[0].embed.dequant_staged(*steps[0], ids.shape)
                assert torch.equal(rows, self.resident(0, LAYERS[0])(ids))

    def a_decode_batch_is_left_to_the_forward(self) -> None:
        stager = self.stager(self.model(self.store))
        batch = self.batch(torch.arange(4), 0)
        batch.forward_mode = SimpleNamespace(is_extend_without_speculative=lambda: False)
        assert stager.stage(batch) is None

    def a_batch_whose_cached_tokens_are_replayed_is_left_to_the_forward(self) -> None:
        stager, batch = self.stager(self.model(self.store)), self.batch(torch.arange(9), 5)
        batch.encoder_swa_reset = [True]
        assert stager.stage(batch) is None
        batch.encoder_swa_reset = [False]
        assert stager.stage(batch) is not None

    def a_breakable_graph_reads_anew_at_every_replay(self) -> None:
        embed, capture = self.model(self.store)[0].embed, FakeCapture()
        ids = self.row_ids(2 * 9)[:, 0].clone()
        buffer = ids[:9].clone()
        token = breakable_cuda_graph._current_capture_var.set(capture)
        try:
            out = embed(buffer)
        finally:
            breakable_cuda_graph._current_capture_var.reset(token)
        assert capture.ended == capture.begun == 1
        buffer.copy_(ids[9:])
        for replay in capture.cuda_graph._break_fns:
            replay()
        assert torch.equal(out, self.resident(0, LAYERS[0])(ids[9:]))

    def the_counters_are_in_the_metrics_endpoint(self) -> None:
        from prometheus_client import CollectorRegistry, generate_latest, multiprocess

        embed = self.model(self.store, enable_metrics=True)[0].embed
        embed(self.row_ids(30)[:, 0])
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        text = generate_latest(registry).decode()
        for line in ('steps_total{layer="layers.1",rank="0"} 1.0', 'tokens_total{layer="layers.1",rank="0"} 30.0'):
            assert f"tierstore_engine_{line}" in text, text
        assert 'tierstore_engine_keys_total{rank="0",tier="' in text, text

    def a_table_of_other_rows_is_refused_while_weights_load(self) -> None:
        refused("is not row", "compared rows differ", lambda: self.model(self.other_store))

    def a_table_of_other_rows_gives_another_layer(self) -> None:
        """The negative control: without the comparison, the layer's output shows that rows are wrong."""
        right, wrong = self.model(self.store)[0], self.model(self.other_store, load=False)[0]
        ids = self.row_ids(20)[:, 0]
        assert not torch.equal(right.embed(ids), wrong.embed(ids))

    def a_hash_that_differs_is_refused(self) -> None:
        model, multipliers = self.model(self.store), self.hasher.multipliers
        self.hasher.multipliers = multipliers + 2
        try:
            refused(
                "hash fingerprint", "layers.1",
                lambda: self.stager(model),
            )  # fmt: skip
        finally:
            self.hasher.multipliers = multipliers

    def a_resident_layer_is_refused_after_construction(self) -> None:
        model = self.model(self.store)
        model[1].embed = self.resident(1, LAYERS[1])
        refused(
            "Engram layer 1", "expected tierstore's",
            lambda: self.stager(model),
        )  # fmt: skip

    def a_weight_with_rows_is_refused(self) -> None:
        embed = self.model(self.store)[0].embed
        embed.weight = torch.nn.Parameter(torch.zeros(3, DIM, dtype=torch.float8_e4m3fn), requires_grad=False)
        refused("weight has 3 rows in memory", "expected none", lambda: embed.finish_load("layer 1"))

    def a_checkpoint_without_the_table_is_refused(self) -> None:
        with lab.published(), lab.environment(TIERSTORE_STORE=self.store):
            embed = engram.Engram(self.config, LAYERS[0], self.layout).embed
            refused("0 rows of table layers.1", "expected 1 at least", lambda: embed.finish_load("layer 1"))

    def a_graph_that_captures_the_lookup_is_refused(self) -> None:
        for phase in ("decode", "prefill"):
            options = {phase: "full"}
            refused(
                f"{phase} graphs are 'full'", f"--cuda-graph-backend-{phase}=breakable",
                lambda options=options: self.model(self.store, **options),
            )  # fmt: skip
        self.model(self.store, decode="breakable", prefill="breakable")

    def a_loader_that_reads_the_table_is_refused(self) -> None:
        for words, options in {
            "--load-format runai_streamer": {"load_format": "runai_streamer"},
            "--weight-loader-disable-mmap": {"weight_loader_disable_mmap": True},
            "--weight-loader-prefetch-checkpoints": {"weight_loader_prefetch_checkpoints": True},
            "--startup-weight-load-mode overlap": {"startup_weight_load_mode": "overlap"},
            "--enable-nvidia-megakernel": {"enable_nvidia_megakernel": True},
        }.items():
            refused(words, "", lambda options=options: self.model(self.store, **options))

    def a_table_of_another_shape_is_refused(self) -> None:
        bounds = self.layout.column_bounds(0)
        with lab.published(), lab.environment(TIERSTORE_STORE=self.store):
            rows = bounds[-1]
            refused("rows of table", "engine expects", lambda: engram.EngramEmbedding(rows + 1, DIM, 1, bounds))
            refused("values a row", "engine expects", lambda: engram.EngramEmbedding(rows, 32, 1, bounds))
            refused("no table layers.2", "layers.1", lambda: engram.EngramEmbedding(rows, DIM, 2, bounds))
            moved = (0, bounds[1] + 2, *bounds[2:])
            refused("hash column 1", "begins at row", lambda: engram.EngramEmbedding(rows, DIM, 1, moved))
            more = (*bounds, rows + 8)
            refused("begins at row None", str(rows + 8), lambda: engram.EngramEmbedding(rows, DIM, 1, more))

    def model(self, store: str, load: bool = True, **options: Any) -> torch.nn.ModuleList:
        """The model's Engram layers, as the engine builds and loads them."""
        options = options if load else {"load_format": "dummy"} | options
        with lab.published(**options), lab.environment(TIERSTORE_STORE=store, TIERSTORE_DRAM="64MiB"):
            layers = torch.nn.ModuleList(engram.Engram(self.config, layer, self.layout) for layer in LAYERS)
            for layer, module in zip(LAYERS, layers, strict=True):
                torch.nn.init.normal_(module.wkv.weight, generator=torch.Generator().manual_seed(layer))
                module.wkv.to(torch.bfloat16)
                for name in ("weight", "scale") if load else ():
                    parameter = getattr(module.embed, name)
                    parameter.weight_loader(parameter, self.tensors[f"layers.{layer}.engram.embed.{name}"])
                module.embed.finish_load(f"layer {layer}")
        return layers

    def stager(self, model: torch.nn.ModuleList) -> Any:
        """What the engine makes for a loaded model."""
        with lab.published():
            return engram_staging.EngramRowStager.from_model(model, self.hasher, torch.device("cpu"))

    def resident(self, index: int, layer: int) -> torch.nn.Module:
        """SGLang's own embedding with the whole table in memory, loaded by its own loader."""
        with lab.published():
            embed = STOCK[0](self.layout.num_embeddings[index], DIM, layer, self.layout.column_bounds(index))
            for name in ("weight", "scale"):
                parameter = getattr(embed, name)
                parameter.weight_loader(parameter, self.tensors[f"layers.{layer}.engram.embed.{name}"])
        return embed

    def row_ids(self, tokens: int) -> torch.Tensor:
        """Row ids of random tokens by the engine's hash, int64 [tokens, layers, columns]."""
        ids = np.random.default_rng(tokens).integers(0, self.vocab_size, tokens)
        return self.ids_of(torch.from_numpy(ids))

    def ids_of(self, tokens: torch.Tensor) -> torch.Tensor:
        order = self.hasher.max_ngram_size
        padded = torch.cat([torch.zeros(order - 1, dtype=torch.int64), tokens.to(torch.int64)])
        windows = torch.stack([padded[order - 1 - back : len(padded) - back] for back in range(order)], dim=1)
        blocked = torch.arange(len(tokens)).unsqueeze(-1) < torch.arange(order)
        return self.hasher.hash_windows(windows, blocked)[0]

    def batch(self, prompt: torch.Tensor, prefix: int) -> SimpleNamespace:
        """A scheduled extend batch of one request: its tokens from `prefix` on."""
        request = SimpleNamespace(full_untruncated_fill_ids=prompt.tolist())
        return SimpleNamespace(
            forward_mode=SimpleNamespace(is_extend_without_speculative=lambda: True),
            reqs=[request], prefix_lens=[prefix], extend_lens=[len(prompt) - prefix], encoder_swa_reset=None,
        )  # fmt: skip


class FakeCapture:
    """What a breakable capture does at a break, without a GPU."""

    def __init__(self) -> None:
        self.cuda_graph = SimpleNamespace(_break_fns=[])
        self._barrier_fn = None
        self.ended = self.begun = 0

    def _end_current_segment(self) -> None:
        self.ended += 1

    def _begin_new_segment(self) -> None:
        self.begun += 1
