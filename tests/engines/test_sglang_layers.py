"""The layers that the plug-in puts into SGLang: rows as stored, no row in memory, refusals; on names and signatures."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY
from support import fake_sglang
from support.device import DEVICE
from support.served import serving
from support.tiny_store import DIM, LAYERS, build_tiny, decoded, tiny_hash

import engram_adapter.engines.sglang as plugin
from engram_adapter.codecs import decode_rows
from engram_adapter.engines.gate import EngineMismatchError
from engram_adapter.hash_spec import HashSpec

CODEC = "fp8_e4m3_e8m0x32"
ENGRAM, QWEN = "sglang.srt.layers.engram", "sglang.srt.models.qwen4_exp"
PLE = {
    "ple_layer_ids": [2, 5], "ngram_size": 3, "heads_per_ngram": 4, "ngram_vocab_size_base": 300, "vocab_size": 61,
    "make_ngram_vocab_size_divisible_by": 8, "eos_token_id": 3,
}  # fmt: skip


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A fake SGLang; the modules of ours that import it are of this test alone."""
    yield from fake_sglang.fresh(monkeypatch)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A store of V4.1's kind, which the environment names; returns its tables' rows."""
    path, rows = build_tiny(tmp_path, tiny_hash(), CODEC, seed=7)
    monkeypatch.setenv("TIERSTORE_STORE", str(path))
    monkeypatch.setenv("TIERSTORE_DRAM", "16MiB")
    return rows


def start() -> None:
    fake_sglang.load(plugin.register)


def engine(name: str = ENGRAM) -> Any:
    return importlib.import_module(name)


def expected_table(layer: int) -> tuple[int, int, int, tuple[int, ...]]:
    spec = tiny_hash()
    rows = spec.num_rows(layer)
    return rows, DIM, layer, (*spec.offsets(layer), rows)


@pytest.mark.usefixtures("sglang")
def test_the_embedding_gives_the_stored_rows_as_the_engine_dequantizes_them(store: dict[str, np.ndarray]) -> None:
    start()
    for layer in LAYERS:
        embed = engine().EngramEmbedding(*expected_table(layer))
        rows = decoded(store[f"layers.{layer}"], CODEC)
        ids = torch.from_numpy(np.random.default_rng(layer).integers(0, len(rows), (70, tiny_hash().heads * 2)))
        assert torch.equal(embed(ids), rows[ids])
        assert embed.weight.shape[0] == embed.scale.shape[0] == 0
        stale = ids.clone()
        stale[3, 2], stale[5, 0] = len(rows) + 5, -9  # what padded tokens of a graph may hold
        found = embed(stale)
        assert not found[3, 2].any()
        assert not found[5, 0].any()
        assert torch.equal(found[6:], rows[ids[6:]])


@pytest.mark.usefixtures("store")
def test_a_layers_counters_are_among_the_engines_metrics(sglang: SimpleNamespace) -> None:
    sglang.observability.enable_metrics = True
    start()
    embed = engine().EngramEmbedding(*expected_table(1))
    ids = torch.zeros((5, tiny_hash().heads * 2), dtype=torch.int64)
    embed(ids)
    labels = {"rank": "0", "layer": "layers.1"}
    for name, count in (("steps", 1), ("tokens", 5), ("rows", ids.numel())):
        assert REGISTRY.get_sample_value(f"tierstore_engine_{name}_total", labels) == count
    embed(ids)  # within the period: counted, and published with a later step
    embed._now._metrics._due_s = 0.0
    embed(ids)
    assert REGISTRY.get_sample_value("tierstore_engine_steps_total", labels) == 3


@pytest.mark.usefixtures("sglang")
def test_weights_that_load_are_compared_and_not_kept(store: dict[str, np.ndarray]) -> None:
    start()
    rows = torch.from_numpy(store["layers.1"])
    embed = engine().EngramEmbedding(*expected_table(1))
    values, scales = rows[:, :DIM].contiguous(), rows[:, DIM:].contiguous()
    embed.weight.weight_loader(embed.weight, values.view(torch.float8_e4m3fn))
    embed.scale.weight_loader(embed.scale, scales.view(torch.float8_e8m0fnu))
    embed.finish_load("layer 1")
    assert embed.weight.shape[0] == 0
    with pytest.raises(EngineMismatchError, match="is not row"):
        embed.weight.weight_loader(embed.weight, values.roll(1, 0).view(torch.float8_e4m3fn))
    with pytest.raises(EngineMismatchError, match=f"of {DIM // 2} bytes"):
        embed.weight.weight_loader(embed.weight, values[:, : DIM // 2].view(torch.float8_e4m3fn))


@pytest.mark.usefixtures("store")
def test_a_checkpoint_without_the_table_is_refused_unless_weights_are_dummies(sglang: SimpleNamespace) -> None:
    start()
    embed = engine().EngramEmbedding(*expected_table(1))
    with pytest.raises(EngineMismatchError, match=r"layers\.1\.engram\.embed: 0 rows .* expected 1 at least"):
        embed.finish_load("layer 1")
    sglang.model.load_format = "dummy"
    engine().EngramEmbedding(*expected_table(1)).finish_load("layer 1")


@pytest.mark.usefixtures("sglang")
def test_a_store_of_another_family_is_refused_when_the_layer_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = build_tiny(tmp_path, HashSpec.from_config({"model_type": "qwen4_exp", **PLE}), "bf16", seed=8)
    monkeypatch.setenv("TIERSTORE_STORE", str(path))
    start()
    with pytest.raises(EngineMismatchError, match=r"layers\.1\.engram\.embed: .* the engine expects"):
        engine().EngramEmbedding(*expected_table(1))


@pytest.mark.usefixtures("store")
def test_options_that_cannot_work_are_refused_when_the_layer_is_built(sglang: SimpleNamespace) -> None:
    start()
    build = engine().EngramEmbedding
    full = SimpleNamespace(decode=SimpleNamespace(backend="full"), prefill=SimpleNamespace(backend="breakable"))
    for owner, name, value, words in (
        (sglang.model, "load_format", "fastsafetensors", "--load-format fastsafetensors reads the whole"),
        (sglang.model, "weight_loader_disable_mmap", True, "--weight-loader-disable-mmap reads the whole"),
        (sglang.model, "weight_loader_prefetch_checkpoints", True, "--weight-loader-prefetch-checkpoints reads"),
        (sglang.model, "is_startup_weight_load_overlap", True, "--startup-weight-load-mode overlap reads"),
        (sglang.model, "weight_cache_mode", "client", "--weight-cache-mode client reads"),
        (sglang.exec.kernel, "enable_nvidia_megakernel", True, "--enable-nvidia-megakernel"),
        (sglang.exec.graph, "cuda_graph_config", full, "--cuda-graph-backend-decode=breakable"),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        with pytest.raises(EngineMismatchError, match=words):
            build(*expected_table(1))
        setattr(owner, name, before)
    build(*expected_table(1))


@pytest.mark.usefixtures("sglang")
def test_a_daemon_serves_the_rows_to_an_engine_that_has_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows = build_tiny(tmp_path, tiny_hash(), CODEC, seed=7)
    socket = tmp_path / "daemon.sock"
    monkeypatch.setenv("TIERSTORE_STORE", str(socket))
    with serving(path, socket, 32 << 20):
        start()
        embed = engine().EngramEmbedding(*expected_table(1))
        ids = torch.from_numpy(np.random.default_rng(2).integers(0, len(rows["layers.1"]), (30, 8)))
        assert torch.equal(embed(ids), decoded(rows["layers.1"], CODEC)[ids])
        embed.tiered.store.close()


@pytest.mark.gpu
@pytest.mark.usefixtures("sglang")
def test_in_device_mode_kernels_look_the_rows_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_hash(heads=8)
    path, rows = build_tiny(tmp_path, spec, CODEC, seed=9)
    for name, value in {"STORE": str(path), "DRAM": "16MiB", "MODE": "device", "HBM": "256KiB"}.items():
        monkeypatch.setenv(f"TIERSTORE_{name}", value)
    start()
    layer = importlib.import_module("engram_adapter.engines.sglang.layer")
    monkeypatch.setattr(layer, "_device_name", lambda: DEVICE)
    bounds = (*spec.offsets(4), spec.num_rows(4))
    embed = engine().EngramEmbedding(bounds[-1], DIM, 4, bounds)
    monkeypatch.setattr(embed, "_dequantized", lambda stored, _out: decode_rows(stored.cpu(), CODEC, DIM))
    keys = np.random.default_rng(1).integers(0, 1 << 62, (90, len(spec.orders)))  # more tokens than a part has
    ids = torch.from_numpy(embed.tiered.table.spec.row_ids(keys)).to(DEVICE)
    assert torch.equal(embed(ids), decoded(rows["layers.4"], CODEC)[ids.cpu()])


def ple_embedding(path: Path, monkeypatch: pytest.MonkeyPatch, index: int = 0) -> tuple[Any, torch.Tensor]:
    """The replaced embedding of a Qwen4-Exp layer in the fake engine, and the table that it serves."""
    spec = HashSpec.from_config({"model_type": "qwen4_exp", **PLE})
    store, rows = build_tiny(path, spec, "bf16", seed=8)
    monkeypatch.setenv("TIERSTORE_STORE", str(store))
    monkeypatch.setenv("TIERSTORE_DRAM", "16MiB")
    layer = spec.layers[index]
    stock = engine(QWEN).Qwen4ExpNGramEmbedding

    def built(self: Any, config: Any, embedding_dim: int, ple_layer_index: int = 0, quant_config: Any = None,
              prefix: str = "") -> None:  # fmt: skip
        """What SGLang's constructor does that matters here."""
        del ple_layer_index, quant_config, prefix
        torch.nn.Module.__init__(self)
        self.layer_multipliers = torch.tensor(spec.multipliers(layer))
        self.ngram_heads_vocab_sizes = torch.tensor(spec.moduli(layer))
        self.eos_token_id, self.ngram_size, self.heads_per_ngram = 3, 3, 4
        self.unigram_vocab_size = config.vocab_size
        shard = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=spec.num_rows(layer))
        source = SimpleNamespace(
            tp_size=1, org_vocab_size=spec.num_rows(layer), shard_indices=shard, embedding_dim=embedding_dim,
            num_added_embeddings=0, weight=torch.empty(0, embedding_dim, dtype=torch.bfloat16, device="meta"),
            weight_scale=torch.ones(1, dtype=torch.bfloat16),
        )  # fmt: skip
        self.ngram_embedding = engine(QWEN).Qwen4ExpPinnedHostEmbedding(source, backend=config.backend)

    monkeypatch.setattr(stock, "__init__", built)
    start()
    config = SimpleNamespace(**PLE, ple_offload_embedding=True, backend="pinned")
    module = engine(QWEN).Qwen4ExpNGramEmbedding(config, DIM, index)
    return module.ngram_embedding, decoded(rows[f"layers.{layer}"], "bf16")


@pytest.mark.usefixtures("sglang")
def test_qwens_rows_are_started_a_layer_ahead_and_are_those_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding, rows = ple_embedding(tmp_path, monkeypatch, index=1)
    assert embedding.weight.shape == (0, DIM)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, len(rows), (20, 8)))
    assert torch.equal(embedding(ids), rows[ids])
    buffer = torch.zeros(20, 8 * DIM, dtype=torch.bfloat16)
    assert embedding.gather(ids.flip(0), out=buffer.view(20, 8, DIM)).data_ptr() == buffer.data_ptr()
    assert torch.equal(embedding.reduce(buffer).view(20, 8, DIM), rows[ids.flip(0)])


@pytest.mark.usefixtures("sglang")
def test_qwens_loader_gets_the_weights_without_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    kind = engine(QWEN).Qwen4ExpForConditionalGeneration

    def load_weights(self: Any, weights: Any) -> None:  # noqa: ARG001
        given.extend(name for name, _ in weights)

    monkeypatch.setattr(kind, "load_weights", load_weights)
    embedding, rows = ple_embedding(tmp_path, monkeypatch)
    model, parts = kind(), 4
    model.embedding, model.config = embedding, SimpleNamespace(split_ngram_parts=parts)
    prefix, size = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding", -(-len(rows) // parts)
    weights = [(f"{prefix}.shard_{part}.weight", rows[part * size : (part + 1) * size]) for part in range(parts)]
    other = ("model.layers.1.ple.key_proj.weight", torch.zeros(1))
    model.load_weights([weights[0], other, *weights[1:]])
    assert given == [other[0]]
    wrong = (weights[1][0], weights[1][1].roll(1, 0))
    with pytest.raises(EngineMismatchError, match="is not row"):
        model.load_weights([weights[0], wrong])


@pytest.mark.usefixtures("sglang")
def test_qwens_weights_without_the_table_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, _ = ple_embedding(tmp_path, monkeypatch)
    model = engine(QWEN).Qwen4ExpForConditionalGeneration()
    model.embedding, model.config = embedding, SimpleNamespace(split_ngram_parts=4)
    with pytest.raises(EngineMismatchError, match=r"layers\.1\.ple.*: 0 rows .* expected 1 at least"):
        model.load_weights([("model.layers.1.ple.key_proj.weight", torch.zeros(1))])
