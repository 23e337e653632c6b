"""`TrainableEmbedding` beside torch's own dense embedding: values, gradients and steps in bits; pins end.

The training is in memory here (`support.memory_training`); tests over a store on disk are in test_trained_stores.py.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.memory_training import MemoryTraining
from support.tiny_store import DIM, LAYERS, VOCAB_SIZE, build_tiny, decoded, tiny_hash
from torch.utils.checkpoint import checkpoint

import tierstore
from engram_adapter import HashSpec, TableOptimizer, TrainableEmbedding, TrainableRows
from engram_adapter.trainable import prefetch_training
from engram_adapter.trainable_module import Groups
from tierstore.errors import ConfigError, FingerprintMismatchError, StoreNotReadyError

HIDDEN = 16
Made = tuple[Any, HashSpec, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[HashSpec, dict[str, Any], dict[str, torch.Tensor]]:
    spec = tiny_hash()
    path, rows = build_tiny(tmp_path_factory.mktemp("tiny"), spec, "fp8_e4m3_e8m0x32", seed=0)
    with tierstore.open(path) as store:
        specs = {name: table.spec for name, table in store.tables.items()}
    return spec, specs, {name: decoded(each, "fp8_e4m3_e8m0x32").float() for name, each in rows.items()}


@pytest.fixture
def made(tables: tuple[HashSpec, dict[str, Any], dict[str, torch.Tensor]]) -> Made:
    spec, specs, values = tables
    return MemoryTraining(specs, {name: each.numpy() for name, each in values.items()}), spec, values


class Model(torch.nn.Module):
    """Reads rows of two layers into a score of each token: enough for gradients that differ from row to row."""

    def __init__(self, rows: list[Callable[[torch.Tensor], torch.Tensor]], modules: list[torch.nn.Module]) -> None:
        super().__init__()
        self.rows, self.embeddings = rows, torch.nn.ModuleList(modules)
        torch.manual_seed(1)
        self.mix = torch.nn.ModuleList([torch.nn.Linear(8 * DIM, HIDDEN) for _ in rows])
        self.out = torch.nn.Linear(HIDDEN, VOCAB_SIZE)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.stack([
            mix(rows(token_ids).flatten(-2).float()) for mix, rows in zip(self.mix, self.rows, strict=True)
        ])  # fmt: skip
        return torch.nn.functional.cross_entropy(self.out(hidden.sum(0).tanh()).flatten(0, 1), token_ids.flatten())

    def dense(self) -> list[torch.nn.Parameter]:
        return [*self.mix.parameters(), *self.out.parameters()]


def trained(made: Made, dtype: torch.dtype = torch.float32, groups: Groups = "batch") -> Model:
    training, spec, _ = made
    embeddings = [TrainableEmbedding(training, layer, spec, dtype, groups=groups) for layer in LAYERS]
    return Model(list(embeddings), list(embeddings))


def resident(made: Made, dtype: torch.dtype = torch.float32) -> Model:
    """The same model over torch's own embeddings of the same rows."""
    _, spec, values = made
    tables = [torch.nn.Embedding.from_pretrained(values[f"layers.{n}"].clone(), freeze=False) for n in LAYERS]

    def rows_of(table: torch.nn.Embedding, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: table(torch.from_numpy(spec.row_ids(ids.numpy(), layer))).to(dtype)

    return Model([rows_of(table, layer) for table, layer in zip(tables, LAYERS, strict=True)], list(tables))


def batch(seed: int, sequences: int = 4, tokens: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def rows_of(training: MemoryTraining) -> list[torch.Tensor]:
    return [torch.from_numpy(table.values.copy()) for table in training.tables.values()]


def pins_of(training: MemoryTraining) -> int:
    gc.collect()
    return sum(table.num_pinned for table in training.tables.values())


def embeddings_of(model: Model) -> list[TrainableEmbedding]:
    return [each for each in model.embeddings if isinstance(each, TrainableEmbedding)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_group_trains_as_torchs_dense_embedding_in_bits(made: Made, dtype: torch.dtype) -> None:
    ours, theirs = trained(made, dtype), resident(made, dtype)
    tables = TableOptimizer(embeddings_of(ours), lr=0.5)
    dense = torch.optim.SGD(ours.dense(), lr=0.5)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.5)
    first = rows_of(made[0])
    for step in range(50):
        losses = []
        for model, optimizers in ((ours, [tables, dense]), (theirs, [reference])):
            loss = model(batch(step))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        assert torch.equal(*losses), step
    for found, expected, before in zip(rows_of(made[0]), theirs.embeddings, first, strict=True):
        assert torch.equal(found, expected.weight.detach())  # type: ignore[arg-type]
        assert not torch.equal(found, before)


@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [2, 2], [1, 3]])
def test_gradients_of_sequences_have_the_same_bits_however_a_batch_is_divided(made: Made, sizes: list[int]) -> None:
    """Accumulated over several backward passes, each of some sequences, or in one pass over all."""
    training, spec, _ = made
    embedding = TrainableEmbedding(training, LAYERS[0], spec)
    optimizer = TableOptimizer([embedding], lr=0.5)
    weight = torch.randn(DIM, generator=torch.Generator().manual_seed(2)) * 3
    for part in batch(7).split(sizes):
        (embedding(part).tanh() @ weight).square().sum().backward()
    optimizer.step()
    whole = MemoryTraining({n: t.spec for n, t in training.tables.items()}, {n: v.numpy() for n, v in made[2].items()})
    reference = TrainableEmbedding(whole, LAYERS[0], spec)
    (reference(batch(7)).tanh() @ weight).square().sum().backward()
    TableOptimizer([reference], lr=0.5).step()
    assert torch.equal(rows_of(training)[0], rows_of(whole)[0])
    assert training.tables["layers.1"].num_steps == 1


def test_a_lookup_used_twice_and_a_graph_run_twice_add_up(made: Made) -> None:
    training, spec, values = made
    embedding = TrainableEmbedding(training, LAYERS[0], spec, groups="batch")
    loss = embedding(batch(1)).sum() + 2 * embedding(batch(2)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    expected = torch.zeros_like(values["layers.1"])
    for seed, factor in ((1, 2.0), (2, 4.0)):
        ids = torch.from_numpy(spec.row_ids(batch(seed).numpy(), LAYERS[0])).flatten()
        expected.index_add_(0, ids, torch.full((len(ids), DIM), factor))
    found = embedding.gradient.taken()
    assert found is not None
    assert np.array_equal(np.sort(found.rows), expected.any(dim=1).nonzero().flatten().numpy())
    assert torch.equal(torch.from_numpy(found.sums), expected[found.rows])
    assert embedding.gradient.grad_norm_squared() == pytest.approx(float(expected.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("whose", ["optimizer", "model", "in place", "none"])
def test_zero_grad_drops_the_gradient_whoever_calls_it(made: Made, whose: str) -> None:
    training = made[0]
    model = trained(made)
    optimizer = TableOptimizer(embeddings_of(model), lr=0.5)
    model(batch(1)).backward()
    if whose == "optimizer":
        optimizer.zero_grad()
    elif whose == "none":
        for parameter in model.parameters():
            parameter.grad = None
    else:
        model.zero_grad(set_to_none=whose == "model")
    before = rows_of(training)
    optimizer.step()
    assert all(torch.equal(*each) for each in zip(rows_of(training), before, strict=True))
    model(batch(2)).backward()
    optimizer.step()
    assert pins_of(training) == 0
    other = trained(clean := (MemoryTraining({n: t.spec for n, t in training.tables.items()},
                                             {n: v.numpy() for n, v in made[2].items()}), *made[1:]))  # fmt: skip
    other(batch(2)).backward()
    TableOptimizer(embeddings_of(other), lr=0.5).step()
    assert all(torch.equal(*each) for each in zip(rows_of(training), rows_of(clean[0]), strict=True))


def test_pins_last_from_forward_to_step_and_no_longer(made: Made) -> None:
    training = made[0]
    model = trained(made)
    optimizer = TableOptimizer(embeddings_of(model), lr=0.5)
    loss = model(batch(1))
    references = 2 * batch(1).numel() * 8
    assert pins_of(training) == references
    loss.backward()
    del loss
    assert pins_of(training) == references
    optimizer.step()
    assert pins_of(training) == 0


def failing(values: torch.Tensor) -> torch.Tensor:
    values.register_hook(lambda _: 1 / 0)
    return values


@pytest.mark.parametrize(
    "forward",
    [
        lambda model: model(batch(1)),
        lambda model: torch.no_grad()(model)(batch(1)),
        lambda model: torch.inference_mode()(model)(batch(1)),
        lambda model: model.requires_grad_(False)(batch(1)),
        lambda model: torch.autograd.grad(model(batch(1)), list(model.parameters())),
        lambda model: failing(model(batch(1))).backward(),
    ],
    ids=["no backward", "no_grad", "inference_mode", "frozen", "autograd.grad", "backward fails"],
)
def test_a_forward_without_an_accumulated_backward_leaves_no_pin_and_no_gradient(
    made: Made, forward: Callable[[Model], Any]
) -> None:
    training = made[0]
    model = trained(made)
    with contextlib.suppress(ZeroDivisionError):
        forward(model)
    assert pins_of(training) == 0
    model.requires_grad_(True)
    model.zero_grad()
    model(batch(2)).backward()
    found = [each.gradient.taken() for each in embeddings_of(model)]
    expected = [np.unique(made[1].row_ids(batch(2).numpy(), layer)) for layer in LAYERS]
    assert all(
        each is not None and np.array_equal(np.sort(each.rows), rows)
        for each, rows in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradient_and_leaves_no_pin(made: Made, use_reentrant: bool) -> None:
    training, spec, _ = made
    gradients = []
    for wrapped in (False, True):
        embedding = TrainableEmbedding(training, LAYERS[0], spec)
        scale = torch.ones(DIM, requires_grad=True)

        def layer(scale: torch.Tensor, embedding: TrainableEmbedding = embedding) -> torch.Tensor:
            return (embedding(batch(1)) * scale).tanh().sum()

        loss = checkpoint(layer, scale, use_reentrant=use_reentrant) if wrapped else layer(scale)
        (loss * 3 + embedding(batch(2)).sum()).backward()
        del loss
        found = embedding.gradient.taken()
        assert found is not None
        order = np.argsort(found.rows)
        gradients.append((found.rows[order], found.sums[order]))
        assert pins_of(training) == 2 * batch(1).numel() * 8
        embedding.gradient.drop()
        assert pins_of(training) == 0
    assert np.array_equal(gradients[0][0], gradients[1][0])
    assert np.allclose(gradients[0][1], gradients[1][1], rtol=1e-6)


def test_clipping_by_the_global_norm_is_of_tables_and_dense_weights_together(made: Made) -> None:
    ours, theirs = trained(made), resident(made)
    tables = TableOptimizer(embeddings_of(ours), lr=0.5)
    for model in (ours, theirs):
        model(batch(1)).backward()
    gradients = [each.weight.grad.double() for each in theirs.embeddings]  # type: ignore[union-attr]
    of_tables = sum(float(each.square().sum()) for each in gradients)
    assert tables.grad_norm_squared() == pytest.approx(of_tables, rel=1e-12)
    expected = math.sqrt(of_tables + sum(float(each.grad.double().square().sum()) for each in theirs.dense()))
    max_norm = expected / 3
    found = torch.nn.utils.clip_grad_norm_(ours.parameters(), max_norm)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    factor = np.float32(max_norm / (float(found) + 1e-6))
    for each, gradient in zip(embeddings_of(ours), theirs.embeddings, strict=True):
        taken = each.gradient.taken()
        assert taken is not None
        assert np.array_equal(taken.sums, gradient.weight.grad.numpy()[taken.rows] * factor)  # type: ignore[union-attr]
    assert tables.grad_norm_squared() == pytest.approx(of_tables / 9, rel=1e-5)


def test_a_change_of_the_norms_that_is_no_factor_is_refused_by_name(made: Made) -> None:
    model = trained(made)
    optimizer = TableOptimizer(embeddings_of(model), lr=0.5)
    model(batch(1)).backward()
    before = rows_of(made[0])
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match="clip by norm, not by value"):
        optimizer.step()
    assert all(torch.equal(*each) for each in zip(rows_of(made[0]), before, strict=True))


def test_grad_scaler_scales_back_and_skips_a_step_that_overflows(made: Made) -> None:
    ours = trained(made)
    tables = TableOptimizer(embeddings_of(ours), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(ours(batch(1))).backward()
    scaler.unscale_(tables)
    torch.nn.utils.clip_grad_norm_(ours.parameters(), 1e9)
    scaler.step(tables)
    scaler.update()
    tables.zero_grad()
    plain = trained(fresh := (MemoryTraining({n: t.spec for n, t in made[0].tables.items()},
                                             {n: v.numpy() for n, v in made[2].items()}), *made[1:]))  # fmt: skip
    plain(batch(1)).backward()
    TableOptimizer(embeddings_of(plain), lr=0.5).step()
    assert all(torch.equal(*each) for each in zip(rows_of(made[0]), rows_of(fresh[0]), strict=True))
    assert all(each.num_steps == 1 for each in made[0].tables.values())

    before = rows_of(made[0])
    (scaler.scale(ours(batch(2))) * math.inf).backward()
    scaler.step(tables)
    scaler.update()
    assert scaler.get_scale() == 512
    assert all(torch.equal(*each) for each in zip(rows_of(made[0]), before, strict=True))
    assert all(each.num_steps == 1 for each in made[0].tables.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_refuses_the_step_before_any_table_changes(made: Made, bad: float) -> None:
    model = trained(made)
    optimizer = TableOptimizer(embeddings_of(model), lr=0.5)
    second = embeddings_of(model)[1]
    model(batch(1)).backward()
    (second(batch(1))[1, 3, 2] * bad).sum().backward()
    before, row = rows_of(made[0]), made[1].row_ids(batch(1).numpy(), LAYERS[1])[1, 3, 2]
    with pytest.raises(ValueError, match=rf"layers\.4: the gradient of row {row} is not finite; no table was changed"):
        optimizer.step()
    assert all(torch.equal(*each) for each in zip(rows_of(made[0]), before, strict=True))
    optimizer.zero_grad()
    model(batch(1)).backward()
    optimizer.step()
    assert not torch.equal(rows_of(made[0])[0], before[0])


def test_an_interrupt_between_two_tables_breaks_the_training_by_name(made: Made) -> None:
    training = made[0]
    model = trained(made)
    optimizer = TableOptimizer(embeddings_of(model), lr=0.5)
    model(batch(1)).backward()
    training["layers.4"].fail_next = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert training.is_broken
    with pytest.raises(StoreNotReadyError, match=r"layers\.1, layers\.4 was cut between two of them by KeyboardInterr"):
        optimizer.step()


def test_an_interrupt_before_the_first_table_breaks_nothing(made: Made) -> None:
    training = made[0]
    model = trained(made)
    optimizer = TableOptimizer(embeddings_of(model), lr=0.5)
    model(batch(1)).backward()
    training["layers.1"].fail_next = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert not training.is_broken
    optimizer.step()
    assert [each.num_steps for each in training.tables.values()] == [1, 1]


def test_rows_that_were_looked_up_by_row_id_train_the_same(made: Made) -> None:
    training, spec, _ = made
    by_token, by_row = TrainableEmbedding(training, LAYERS[0], spec), TrainableRows(training, LAYERS[0])
    row_ids = torch.from_numpy(spec.row_ids(batch(3).numpy(), LAYERS[0]))
    values = by_row(row_ids)
    assert torch.equal(values, by_token(batch(3)))
    weight = torch.randn(DIM)
    (by_token(batch(3)) @ weight).square().sum().backward()
    (values @ weight).square().sum().backward()
    found, expected = by_row.gradient.taken(), by_token.gradient.taken()
    assert found is not None
    assert expected is not None
    assert np.array_equal(found.rows, expected.rows)
    assert np.array_equal(found.sums, expected.sums)
    nothing = by_row(torch.full((2, 3), -1))
    assert not nothing.any()
    by_row.zero_grad()
    nothing.sum().backward()
    taken = by_row.gradient.taken()
    assert taken is not None
    assert len(taken.rows) == 0


def test_a_module_is_moved_cast_saved_and_copied_without_its_rows(made: Made) -> None:
    training = made[0]
    model = trained(made)
    state = model.state_dict()
    assert not any("embeddings" in name for name in state)
    model.load_state_dict(state)
    model.to(torch.bfloat16).half().double()
    assert embeddings_of(model)[0].gradient_norms.dtype == torch.float64
    assert embeddings_of(model)[0](batch(1)).dtype == torch.float32
    copied = copy.deepcopy(embeddings_of(model)[0])
    copied(batch(1)).sum().backward()
    assert copied.gradient.taken() is not None
    assert embeddings_of(model)[0].gradient.taken() is None
    assert copied.training_store is training
    with pytest.raises(TypeError, match=r"layers\.1 cannot be pickled: a training is of one process"):
        pickle.dumps(copied)


def test_a_compiled_model_trains_the_same(made: Made) -> None:
    model = trained(made)
    model(batch(1)).backward()
    expected = [each.gradient.taken() for each in embeddings_of(model)]
    model.zero_grad()
    torch.compile(model, backend="eager")(batch(1)).backward()
    for each, before in zip(embeddings_of(model), expected, strict=True):
        found = each.gradient.taken()
        assert found is not None
        assert before is not None
        assert np.array_equal(found.sums, before.sums)


def test_prefetch_asks_for_the_rows_of_all_layers_at_once(made: Made) -> None:
    training, spec, _ = made
    embeddings = embeddings_of(trained(made))
    prefetch_training(embeddings, batch(1)).wait()
    embeddings[0].prefetch(batch(2)).wait()
    first, second = training.prefetched
    assert list(first) == ["layers.1", "layers.4"]
    assert list(second) == ["layers.1"]
    assert np.array_equal(second["layers.1"], spec.row_ids(batch(2).numpy(), 1))
    with pytest.raises(ValueError, match="one training"):
        prefetch_training([], batch(1))


def test_wrong_arguments_are_refused_by_name(made: Made) -> None:
    training, spec, _ = made
    with pytest.raises(ConfigError, match="no table for layer 7"):
        TrainableEmbedding(training, 7, spec)
    with pytest.raises(FingerprintMismatchError, match="this model's hash is"):
        TrainableEmbedding(training, 1, tiny_hash(max_order=4))
    with pytest.raises(ConfigError, match=r"dtype torch\.float16"):
        TrainableEmbedding(training, 1, spec, torch.float16)
    with pytest.raises(ConfigError, match="groups 'rank'"):
        TrainableEmbedding(training, 1, spec, groups="rank")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no table layers\.9"):
        TrainableRows(training, 9)
    with pytest.raises(TypeError, match="integers"):
        TrainableRows(training, 1)(torch.zeros(2))
