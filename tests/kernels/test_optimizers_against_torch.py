"""The optimizers beside those that people know: torch.optim on a dense nn.Embedding, and FBGEMM's row-wise Adagrad.

torch.sqrt on CPUs is not rounded correctly: in torch 2.13, one element in six is one unit in the last place off. So the
Adams are compared twice: in bits, with torch's root made right, and within two units a step as torch is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tierstore import kernels
from tierstore.training.optimizers import SGD, DenseAdam, LazyAdam, Optimizer, RowWiseAdagrad

STEPS = 50
ULPS = 2  # of a step


class Ours:
    """A table in memory, beside torch's; `state` says which of torch's tensors lie in its records, in their order."""

    def __init__(self, optimizer: Optimizer, weight: torch.Tensor, *state: str) -> None:
        self.optimizer, self.weight, self.state = optimizer, weight, state
        self.dim = weight.shape[1]
        self.history = kernels.StepHistory(kernels.Optimizer(**optimizer.to_dict()))
        self.records = np.zeros((len(weight), self.dim + optimizer.state_floats(self.dim)), np.float32)
        self.values[:] = weight.detach().numpy()

    @property
    def values(self) -> np.ndarray:
        return self.records[:, : self.dim]

    def step(self, row_ids: np.ndarray, gradients: np.ndarray, lr: float) -> None:
        self.history.append(lr)
        assert kernels.apply_gradients(self.history, row_ids, gradients, self.records) == -1

    def take(self, state: dict[str, Any]) -> None:
        """Takes torch's weight and state, so that the next step starts from the same."""
        self.values[:] = self.weight.detach().numpy()
        for number, name in enumerate(self.state):
            tensor = state[name].detach().numpy()
            width = 1 if self.optimizer.state_floats(self.dim) == 1 else self.dim
            start = self.dim + number * width
            self.records[:, start : start + width] = tensor[:, :width]


def ulps(found: np.ndarray, expected: np.ndarray, before: np.ndarray) -> float:
    """The largest difference, in units in the last place of a value before or after, or of twice its step.

    Twice: where torch's root is one unit off, the step itself is up to two of its units off.
    """
    size = np.maximum.reduce([np.abs(expected), np.abs(before), 2 * np.abs(expected - before)])
    return float((np.abs(found.astype(np.float64) - expected) / np.spacing(size)).max())


@pytest.fixture(params=["as torch is", "with the right root"])
def exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch's root is rounded correctly, and bits are to be equal."""
    if request.param == "as torch is":
        return False
    root = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda tensor: root(tensor.double()).float())
    monkeypatch.setattr(torch.Tensor, "sqrt_", lambda tensor: tensor.copy_(root(tensor.double()).float()))
    return True


def assert_near(found: np.ndarray, embedding: torch.nn.Embedding, before: np.ndarray, *, exact: bool) -> None:
    expected = embedding.weight.detach().numpy()
    if exact:
        assert np.array_equal(np.ascontiguousarray(found).view(np.int32), expected.view(np.int32))
    assert ulps(found, expected, before) <= ULPS


def batch(generator: np.random.Generator, num_rows: int, dim: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    row_ids = generator.integers(0, num_rows, size)
    return row_ids, generator.normal(size=(size, dim)).astype(np.float32)


def backward(embedding: torch.nn.Embedding, row_ids: np.ndarray, gradients: np.ndarray) -> None:
    embedding.weight.grad = None
    embedding(torch.from_numpy(row_ids)).backward(torch.from_numpy(gradients))


def test_sgd_equals_torch_in_bits_over_fifty_steps() -> None:
    generator = np.random.default_rng(1)
    embedding = torch.nn.Embedding(80, 37)
    theirs = torch.optim.SGD(embedding.parameters(), lr=0.1)
    ours = Ours(SGD(0.1), embedding.weight)
    for step in range(STEPS):
        row_ids, gradients = batch(generator, 80, 37, 200)
        theirs.param_groups[0]["lr"] = 0.1 / (step + 1)
        backward(embedding, row_ids, gradients)
        theirs.step()
        ours.step(row_ids, gradients, 0.1 / (step + 1))
        assert np.array_equal(ours.values.view(np.int32), embedding.weight.detach().numpy().view(np.int32))


# Gradients of which element-wise and row-wise Adagrad make the same: rows of one value, or of one magnitude.
def of_one_value(generator: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray]:
    return 1, *batch(generator, 80, 1, 200)


def of_one_magnitude(generator: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray]:
    row_ids = generator.permutation(80)[:60]
    magnitudes = np.abs(generator.normal(size=(60, 1)))
    return 16, row_ids, (magnitudes * generator.choice([-1, 1], (60, 16))).astype(np.float32)


@pytest.mark.parametrize("draw", [of_one_value, of_one_magnitude])
def test_row_wise_adagrad_is_within_two_ulp_of_torch_a_step(draw: Callable[..., Any]) -> None:
    generator = np.random.default_rng(2)
    embedding = torch.nn.Embedding(80, draw(generator)[0])
    theirs = torch.optim.Adagrad(embedding.parameters(), lr=0.1, eps=1e-8)
    ours, alone = (Ours(RowWiseAdagrad(0.1, eps=1e-8), embedding.weight, "sum") for _ in range(2))
    for _ in range(STEPS):
        _, row_ids, gradients = draw(generator)
        ours.take(theirs.state[embedding.weight])
        before = ours.values.copy()
        backward(embedding, row_ids, gradients)
        theirs.step()
        ours.step(row_ids, gradients, 0.1)
        alone.step(row_ids, gradients, 0.1)
        assert_near(ours.values, embedding, before, exact=False)  # the mean is rounded once more
    assert np.allclose(alone.values, embedding.weight.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_lazy_adam_is_within_two_ulp_of_sparse_adam_a_step(beta1: float, *, exact: bool) -> None:
    generator = np.random.default_rng(3)
    embedding = torch.nn.Embedding(80, 33, sparse=True)
    theirs = torch.optim.SparseAdam(embedding.parameters(), lr=0.01, betas=(beta1, 0.999))
    ours, alone = (Ours(LazyAdam(0.01, beta1=beta1), embedding.weight, "exp_avg", "exp_avg_sq") for _ in range(2))
    for step in range(STEPS):
        row_ids = generator.permutation(80)[:30]  # once each: torch sums sparse gradients in another order
        gradients = generator.normal(size=(30, 33)).astype(np.float32)
        if step:
            ours.take(theirs.state[embedding.weight])
        before = ours.values.copy()
        backward(embedding, row_ids, gradients)
        theirs.step()
        ours.step(row_ids, gradients, 0.01)
        alone.step(row_ids, gradients, 0.01)
        assert_near(ours.values, embedding, before, exact=exact)
    assert np.allclose(alone.values, embedding.weight.detach().numpy(), rtol=0, atol=1e-6)


def test_a_row_that_lazy_adam_meets_late_moves_by_more_than_three_rates() -> None:
    """As torch 2.13's SparseAdam does: findings/torch_sparse_adam_leaps_late.sh."""
    ours = Ours(LazyAdam(0.01), torch.zeros(2, 1), "exp_avg", "exp_avg_sq")
    gradient = np.full((1, 1), 0.5, np.float32)
    for _ in range(5000):
        ours.step(np.array([1]), gradient, 0.01)
    ours.step(np.array([0]), gradient, 0.01)
    assert -ours.values[0, 0] / 0.01 == pytest.approx(0.1 / 0.001**0.5, rel=0.01)


def rate_of(step: int) -> float:
    return 0.01 * (1 + step % 7)


@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_dense_adam_equals_torch_on_rows_that_come_back_after_gaps(beta1: float, *, exact: bool) -> None:
    generator = np.random.default_rng(5)
    embedding = torch.nn.Embedding(80, 33)
    theirs = torch.optim.Adam(embedding.parameters(), lr=0.01, betas=(beta1, 0.999))
    ours = Ours(DenseAdam(0.01, beta1=beta1), embedding.weight)
    for step in range(STEPS):
        row_ids, gradients = batch(generator, 80 if step < 5 else 20, 33, 25)  # 60 rows are not seen again
        theirs.param_groups[0]["lr"] = rate_of(step)
        backward(embedding, row_ids, gradients)
        theirs.step()
        ours.step(row_ids, gradients, rate_of(step))
        if exact or step + 1 == STEPS:
            seen = ours.records.copy()
            kernels.catch_up_rows(ours.history, 33, seen)
            expected = embedding.weight.detach().numpy()
            assert np.allclose(seen[:, :33], expected, rtol=0, atol=0 if exact else ULPS * STEPS * 2**-24)


@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_a_step_of_dense_adam_is_within_two_ulp_of_torchs(beta1: float, *, exact: bool) -> None:
    generator = np.random.default_rng(6)
    embedding = torch.nn.Embedding(80, 33)
    theirs = torch.optim.Adam(embedding.parameters(), lr=0.01, betas=(beta1, 0.999))
    ours = Ours(DenseAdam(0.01, beta1=beta1), embedding.weight, "exp_avg", "exp_avg_sq")
    for step in range(STEPS):
        row_ids, gradients = batch(generator, 80, 33, 25)
        if step:
            ours.take(theirs.state[embedding.weight])
        ours.records[:, -1].view(np.int32)[:] = step
        before = ours.values.copy()
        backward(embedding, row_ids, gradients)
        theirs.step()
        ours.step(row_ids, gradients, 0.01)
        kernels.catch_up_rows(ours.history, 33, ours.records)
        assert_near(ours.values, embedding, before, exact=exact)


def test_row_wise_adagrad_is_fbgemms() -> None:
    pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu-cpu is not installed")
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    generator = np.random.default_rng(7)
    theirs = SplitTableBatchedEmbeddingBagsCodegen(
        [(80, 64, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
        eps=1e-8,
        weights_precision=SparseType.FP32,
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.NONE,
    )
    (weight,) = theirs.split_embedding_weights()
    weight.data.copy_(torch.from_numpy(generator.normal(size=(80, 64)).astype(np.float32)))
    ours = Ours(RowWiseAdagrad(0.1, eps=1e-8), weight)
    for _ in range(STEPS):
        row_ids, gradients = batch(generator, 80, 64, 200)
        out = theirs(torch.from_numpy(row_ids), torch.tensor([0, len(row_ids)]))
        out.backward(torch.from_numpy(gradients))
        ours.step(row_ids, gradients, 0.1)
    assert np.allclose(ours.values, weight.detach().numpy(), rtol=1e-5, atol=1e-5)
