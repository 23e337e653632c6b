"""Training over stores on disk, through the adapter: beside torch, beside readers, over any store."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.marks import slow_but
from support.served import serving
from support.tiny_store import DIM, LAYERS, VOCAB_SIZE, build_tiny, decoded, tiny_hash

import tierstore
from engram_adapter import HashSpec, TableOptimizer, TieredEmbedding, TrainableEmbedding, build_checkpoint
from tierstore.errors import ConfigError
from tierstore.tools.corpus import python_text_files, train_tokenizer
from tierstore.tools.synth import write_checkpoint

STEPS = 50


def batch(seed: int, sequences: int = 3, tokens: int = 10) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


class Scores(torch.nn.Module):
    """A score of each token, from one layer's rows."""

    def __init__(self, rows: Callable[[torch.Tensor], torch.Tensor], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rows, self.out = rows, torch.nn.Linear(8 * DIM, VOCAB_SIZE)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        logits = self.out(self.rows(token_ids).flatten(-2).float())
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids.flatten())


def dense_adagrad_of_rows(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    return _RowWiseAdagrad([weight], {"lr": 0.05})


class _RowWiseAdagrad(torch.optim.Optimizer):
    """FBGEMM's rule on a dense table, in torch."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for weight in self.param_groups[0]["params"]:
            sums = self.state[weight].setdefault("sum", torch.zeros(len(weight), 1))
            sums += weight.grad.square().mean(dim=1, keepdim=True)
            weight -= 0.05 / (sums.sqrt() + 1e-8) * weight.grad


RULES: dict[str, tuple[Any, Callable[[torch.nn.Parameter], torch.optim.Optimizer]]] = {
    "sgd": (tierstore.SGD(lr=0.5), lambda weight: torch.optim.SGD([weight], lr=0.5)),
    "row-wise adagrad": (tierstore.RowWiseAdagrad(lr=0.05), dense_adagrad_of_rows),
    "dense adam": (tierstore.DenseAdam(lr=0.01), lambda weight: torch.optim.Adam([weight], lr=0.01)),
}


@pytest.mark.parametrize(
    ("rule", "dtype"),
    slow_but(
        [("sgd", torch.bfloat16), ("dense adam", torch.float32)],
        [(rule, dtype) for rule in RULES for dtype in (torch.float32, torch.bfloat16)],
        several=True,
    ),
)
def test_each_of_fifty_steps_of_a_model_is_that_of_torchs_dense_table(
    tmp_path: Path, rule: str, dtype: torch.dtype
) -> None:
    """SGD in bits. The others within 1e-6, each step from equal rows: gradients come from rows, and rows in bfloat16
    turn a last place into a 256th of a gradient.

    tests/training compares steps of equal gradients, in units in the last place.
    """
    spec, optimizer = tiny_hash(), RULES[rule][0]
    path, rows = build_tiny(tmp_path, spec, "fp8_e4m3_e8m0x32", seed=1)
    weight = torch.nn.Parameter(decoded(rows["layers.1"], "fp8_e4m3_e8m0x32").float())

    def dense_rows(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(torch.from_numpy(spec.row_ids(ids.numpy(), 1)), weight).to(dtype)

    with tierstore.open_training(path, optimizer, dram="8MiB") as training:
        embedding = TrainableEmbedding(training, LAYERS[0], spec, dtype, groups="batch")
        ours, theirs = Scores(embedding), Scores(dense_rows)
        tables, dense = TableOptimizer([embedding]), RULES[rule][1](weight)
        for step in range(STEPS):
            for model, each in ((ours, tables), (theirs, dense)):
                model(batch(step)).backward()
                each.step()
                each.zero_grad()
            after = training["layers.1"].gather(np.arange(len(weight)))
            expected = weight.detach().numpy()
            if rule == "sgd":
                assert np.array_equal(after, expected), step
            assert np.allclose(after, expected, rtol=1e-6, atol=1e-6), step
            expected[...] = after  # the same memory as the weight's
        assert not np.array_equal(after, decoded(rows["layers.1"], "fp8_e4m3_e8m0x32").float().numpy())
        training.commit(STEPS).wait()
    with tierstore.open_training(path, dram="8MiB") as training:
        assert np.array_equal(training["layers.1"].gather(np.arange(len(weight))), after)
        assert TableOptimizer([TrainableEmbedding(training, 1, spec)]).num_steps == STEPS


def test_a_store_trains_the_same_built_or_in_place(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(python_text_files(documentation=())[:20], 300, text_bytes=1 << 16)
    write_checkpoint(
        tmp_path / "model", "deepseek_v41", rows_per_head=200, dim=32, hidden=32, layers=(1,), tokenizer=tokenizer
    )
    values = []
    for name, place in (("built", False), ("in place", True)):
        build_checkpoint(tmp_path / "model", tmp_path / name, in_place=place)
        with tierstore.open(tmp_path / name, dram="8MiB") as store:
            spec = HashSpec.from_store(store)
        with tierstore.open_training(tmp_path / name, tierstore.LazyAdam(lr=0.1), dram="8MiB") as training:
            embedding = TrainableEmbedding(training, 1, spec)
            optimizer = TableOptimizer([embedding])
            for step in range(5):
                embedding(batch(step)).tanh().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            training.commit(5).wait()
            values.append(training["layers.1"].gather(np.arange(embedding.num_embeddings)))
    assert np.array_equal(*values)


def test_readers_of_a_daemon_see_the_rows_as_built_while_the_store_is_trained(tmp_path: Path) -> None:
    spec = tiny_hash()
    path, rows = build_tiny(tmp_path, spec, "bf16", seed=2)
    expected = decoded(rows["layers.1"], "bf16")[torch.from_numpy(spec.row_ids(batch(0).numpy(), 1))]
    with serving(path, tmp_path / "s", 400 << 10), tierstore.connect(tmp_path / "s") as client:
        reader = TieredEmbedding(client, 1, spec)
        with tierstore.open_training(path, tierstore.SGD(lr=1.0), dram="8MiB") as training:
            embedding = TrainableEmbedding(training, 1, spec)
            optimizer = TableOptimizer([embedding])
            for step in range(6):
                embedding(batch(0)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                optimizer.commit().wait()
                assert torch.equal(reader(batch(0)), expected), step
            assert not torch.equal(embedding(batch(0)).detach(), expected.float())


def test_pins_end_with_their_graph_and_a_tiny_cache_trains_to_the_same_rows(tmp_path: Path) -> None:
    spec = tiny_hash()
    path, _ = build_tiny(tmp_path, spec, "fp32", seed=3)
    values = []
    for dram in ("4MiB", "64MiB"):
        with tierstore.open_training(path, tierstore.RowWiseAdagrad(lr=0.1), dram=dram, at=None) as training:
            embedding = TrainableEmbedding(training, 1, spec)
            optimizer = TableOptimizer([embedding])
            pinned = lambda training=training: training["layers.1"].stats()["num_pinned"]  # noqa: E731
            unused = embedding(batch(99))
            assert pinned() > 0
            del unused
            gc.collect()
            assert pinned() == 0
            for step in range(8):
                embedding.prefetch(batch(step + 1))
                embedding(batch(step)).square().sum().backward()
                optimizer.step()
                assert pinned() == 0
                optimizer.zero_grad()
            values.append(training["layers.1"].gather(np.arange(embedding.num_embeddings)))
    assert np.array_equal(*values)


def test_a_training_that_is_broken_says_so_to_the_model(tmp_path: Path) -> None:
    spec = tiny_hash()
    path, _ = build_tiny(tmp_path, spec, "bf16", seed=4)
    with tierstore.open_training(path, tierstore.SGD(lr=0.1), dram="8MiB") as training:
        embedding = TrainableEmbedding(training, 1, spec)
        with pytest.raises(ConfigError, match="process"):
            tierstore.open_training(path, tierstore.SGD(lr=0.1), dram="8MiB")
        training.mark_broken("a test")
        with pytest.raises(tierstore.StoreNotReadyError, match="a test"):
            embedding(batch(1))


@pytest.mark.parametrize("codec", ["fp8_e4m3_e8m0x32", "bf16", "fp32"])
def test_a_quantized_forward_hands_out_what_will_be_served_and_trains_the_values_beneath(
    tmp_path: Path, codec: str
) -> None:
    spec = tiny_hash()
    path, _ = build_tiny(tmp_path, spec, codec, seed=5)
    with tierstore.open_training(path, tierstore.RowWiseAdagrad(lr=0.02), dram="8MiB") as training:
        dtype = torch.float32 if codec == "fp32" else torch.bfloat16
        embedding = TrainableEmbedding(training, 1, spec, dtype, quantized=True)
        plain = TrainableEmbedding(training, 1, spec, dtype)
        optimizer = TableOptimizer([embedding])
        weight = torch.randn(DIM, generator=torch.Generator().manual_seed(0))
        for step in range(6):
            (embedding(batch(step)).float().tanh() @ weight).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found, beneath = embedding(batch(3)).detach(), plain(batch(3)).detach()
        assert torch.equal(found, beneath) == (codec != "fp8_e4m3_e8m0x32")
        optimizer.commit().wait()
        training.publish()
    with tierstore.open(path) as store:
        assert torch.equal(TieredEmbedding(store, 1, spec)(batch(3)), found)
