"""`TableOptimizer` as torch's tools use an optimizer: groups, schedulers, states, checkpoints, joined.

The training is in memory (`support.memory_training`), as in test_trainable.py.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.memory_training import MemoryTraining
from support.tiny_store import LAYERS, VOCAB_SIZE, build_tiny, decoded, tiny_hash
from torch.distributed.checkpoint.stateful import Stateful

import tierstore
from engram_adapter import HashSpec, JoinedOptimizer, TableOptimizer, TrainableEmbedding, dense_parameters
from tierstore.errors import ConfigError, FormatError, StoreNotReadyError


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[HashSpec, dict[str, Any], dict[str, np.ndarray]]:
    spec = tiny_hash()
    path, rows = build_tiny(tmp_path_factory.mktemp("tiny"), spec, "bf16", seed=0)
    with tierstore.open(path) as store:
        specs = {name: table.spec for name, table in store.tables.items()}
    return spec, specs, {name: decoded(each, "bf16").float().numpy() for name, each in rows.items()}


class Trained:
    """A training in memory, its two embeddings, and steps on random tokens."""

    def __init__(self, tables: tuple[HashSpec, dict[str, Any], dict[str, np.ndarray]]) -> None:
        self.spec, specs, self.values = tables
        self.training: Any = MemoryTraining(specs, self.values)
        self.embeddings = [TrainableEmbedding(self.training, layer, self.spec) for layer in LAYERS]

    def backward(self, seed: int) -> None:
        ids = torch.randint(0, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(seed))
        sum(each(ids).tanh().sum() for each in self.embeddings).backward()  # type: ignore[union-attr]

    def step(self, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.backward(seed)
        optimizer.step()
        optimizer.zero_grad()

    def rows(self) -> list[np.ndarray]:
        return [table.values.copy() for table in self.training.tables.values()]


@pytest.fixture
def trained(tables: tuple[HashSpec, dict[str, Any], dict[str, np.ndarray]]) -> Trained:
    return Trained(tables)


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> list[bool]:
    return [np.array_equal(*each) for each in zip(found, expected, strict=True)]


def test_param_groups_have_learning_rates_of_their_own(trained: Trained) -> None:
    first, second = trained.embeddings
    optimizer = TableOptimizer([{"embeddings": [first]}, {"embeddings": [second], "lr": 0.0}], lr=0.5)
    before = trained.rows()
    trained.step(optimizer, 1)
    assert same(trained.rows(), before) == [False, True]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_the_default_learning_rate_is_the_trainings(trained: Trained) -> None:
    assert TableOptimizer(trained.embeddings).param_groups[0]["lr"] == trained.training.optimizer.lr == 0.1


def test_schedulers_set_the_rate_of_the_next_step(trained: Trained) -> None:
    optimizer = TableOptimizer(trained.embeddings, lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    trained.step(optimizer, 1)
    scheduler.step()
    before = trained.rows()
    trained.step(optimizer, 2)
    assert same(trained.rows(), before) == [True, True]
    assert optimizer.num_steps == 2


def test_a_closure_is_evaluated_with_gradient(trained: Trained) -> None:
    optimizer = TableOptimizer(trained.embeddings, lr=0.5)
    before = trained.rows()

    def closure() -> float:
        optimizer.zero_grad()
        trained.backward(1)
        return 7.0

    assert optimizer.step(closure) == 7
    assert same(trained.rows(), before) == [False, False]


def test_a_step_without_gradients_changes_no_row(trained: Trained) -> None:
    optimizer = TableOptimizer(trained.embeddings, lr=0.5)
    before = trained.rows()
    optimizer.step()
    assert same(trained.rows(), before) == [True, True]
    assert optimizer.grad_norm_squared() == 0


def test_a_state_names_a_commit_of_the_tables_as_they_are(trained: Trained) -> None:
    optimizer = TableOptimizer(trained.embeddings, lr=0.5)
    assert optimizer.state_dict()["commit"] == 0
    trained.step(optimizer, 1)
    state = optimizer.state_dict()
    commit = trained.training.commits[-1]
    assert (state["commit"], state["digest"], state["step"]) == (1, commit.digest, 1)
    assert optimizer.state_dict() == state
    assert len(trained.training.commits) == 1
    at_first = trained.rows()
    trained.step(optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.25
    assert optimizer.state_dict()["commit"] == 2
    trained.step(optimizer, 3)

    optimizer.load_state_dict(state)
    assert same(trained.rows(), at_first) == [True, True]
    assert (optimizer.num_steps, optimizer.param_groups[0]["lr"]) == (1, 0.5)
    assert trained.training.at == 1


def test_a_state_goes_through_torch_save_and_stays_small(trained: Trained) -> None:
    optimizer = TableOptimizer(trained.embeddings, lr=0.5)
    trained.step(optimizer, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() < 4096
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def test_the_commit_has_the_callers_step_and_payload(trained: Trained) -> None:
    optimizer = TableOptimizer(trained.embeddings, lr=0.5)
    trained.step(optimizer, 1)
    commit = optimizer.commit(step=70, payload=b"loader at 560").wait()
    assert (commit.step, commit.payload) == (70, b"loader at 560")
    assert optimizer.state_dict()["step"] == 70


def test_a_skipped_step_is_counted_by_a_commit_of_its_own(trained: Trained) -> None:
    """GradScaler skips a step, the Trainer counts it all the same: no row has changed, and the step has."""
    optimizer = TableOptimizer(trained.embeddings, lr=0.5)
    trained.step(optimizer, 1)
    assert optimizer.state_dict()["step"] == 1
    optimizer.num_steps = 2
    state = optimizer.state_dict()
    assert (state["commit"], state["step"]) == (2, 2)


def test_dcp_saves_and_loads_it_as_a_stateful(trained: Trained, tmp_path: Path) -> None:
    optimizer = TableOptimizer(trained.embeddings, lr=0.5)
    assert isinstance(optimizer, Stateful)
    trained.step(optimizer, 1)
    dcp.save({"tables": optimizer}, checkpoint_id=tmp_path / "saved", no_dist=True)
    saved = trained.rows()
    trained.step(optimizer, 2)
    dcp.load({"tables": optimizer}, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert same(trained.rows(), saved) == [True, True]
    assert optimizer.num_steps == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"commit": 9}, ConfigError, r"commit 9 of memory, step 1; the store keeps commits 1: "),
        ({"digest": "0" * 64}, ConfigError, r"commit 1 of memory has digest [0-9a-f]{16}, the checkpoint names 0000"),
        ({"step": 4}, ConfigError, r"of step 4, commit 1 of memory of step 1: dense weights and tables would be of"),
        ({"format": 3}, FormatError, r"of format 3; this version reads 1 and 2"),
        ({"format": 2}, FormatError, r"of ranks without their commits"),
        ({"commit": "1"}, FormatError, r"is no state of a TableOptimizer"),
        ({"param_groups": []}, FormatError, r"0 param groups for an optimizer of 1"),
    ],
)
def test_a_state_that_the_store_does_not_have_is_refused_and_nothing_changes(
    trained: Trained, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = TableOptimizer(trained.embeddings, lr=0.5)
    trained.step(optimizer, 1)
    state = optimizer.state_dict()
    trained.step(optimizer, 2)
    before = trained.rows()
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state | change)
    assert same(trained.rows(), before) == [True, True]
    with pytest.raises(FormatError, match="is no state of a TableOptimizer"):
        optimizer.load_state_dict(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).state_dict())


def test_wrong_embeddings_are_refused_by_name(trained: Trained, tables: Any) -> None:
    first, second = trained.embeddings
    with pytest.raises(ConfigError, match=r"table layers\.1 is given twice"):
        TableOptimizer([first, TrainableEmbedding(trained.training, LAYERS[0], trained.spec)])
    with pytest.raises(ConfigError, match="at least one"):
        TableOptimizer([])
    with pytest.raises(ConfigError, match="give dense parameters to another optimizer"):
        TableOptimizer([torch.nn.Embedding(3, 4)])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="of two trainings"):
        TableOptimizer([first, Trained(tables).embeddings[1]])
    optimizer = TableOptimizer([first])
    with pytest.raises(ConfigError, match="has embeddings, and no params"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    optimizer.add_param_group({"embeddings": [second], "lr": 0.3})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


class _Head(torch.nn.Module):
    def __init__(self, trained: Trained) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = torch.nn.ModuleList(trained.embeddings)
        self.out = torch.nn.Linear(trained.embeddings[0].features, 1)


def joined_step(trained: Trained, head: _Head, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(0, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(seed))
    losses = [head.out(each(ids).flatten(-2)).tanh().sum() for each in trained.embeddings]
    torch.stack(losses).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_joined_with_a_dense_optimizer_it_is_one_optimizer(trained: Trained) -> None:
    head = _Head(trained)
    assert [each.shape for each in dense_parameters(head)] == [head.out.weight.shape, head.out.bias.shape]
    joined = JoinedOptimizer(
        TableOptimizer(trained.embeddings, lr=0.5), torch.optim.AdamW(dense_parameters(head), lr=0.1)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(joined, lambda step: 1 / (1 + step))
    joined_step(trained, head, joined, 1)
    scheduler.step()
    state = joined.state_dict()
    at_first, weight = trained.rows(), head.out.weight.detach().clone()
    joined_step(trained, head, joined, 2)
    assert same(trained.rows(), at_first) == [False, False]
    after, changed = trained.rows(), head.out.weight.detach().clone()
    assert not torch.equal(changed, weight)

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    joined.load_state_dict(torch.load(file, weights_only=True))
    assert same(trained.rows(), at_first) == [True, True]
    assert [group["lr"] for group in joined.param_groups] == [0.25, 0.05]
    scheduler.base_lrs = [0.0, 0.0]
    scheduler.step()
    assert [group["lr"] for each in joined.optimizers for group in each.param_groups] == [0.0, 0.0]
    assert not same(after, at_first)[0]
    with pytest.raises(FormatError, match="is not of 2 joined optimizers"):
        joined.load_state_dict({"state": {}, "param_groups": []})


class _Interrupted(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        raise KeyboardInterrupt


def test_an_interrupt_between_tables_and_dense_weights_breaks_the_training_by_name(trained: Trained) -> None:
    head = _Head(trained)
    joined = JoinedOptimizer(TableOptimizer(trained.embeddings, lr=0.5), _Interrupted(dense_parameters(head), lr=0.1))
    with pytest.raises(KeyboardInterrupt):
        joined_step(trained, head, joined, 1)
    with pytest.raises(StoreNotReadyError, match="tables and dense weights was cut between them by KeyboardInterrupt"):
        trained.training["layers.1"].gather(np.zeros(1, dtype=np.int64))
