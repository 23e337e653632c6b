"""A trainer of tables in NumPy, a dict of rows: the oracle of the compiled kernels, and of all that is built on them.

Input: row ids, gradients and groups, as `kernels.apply_gradients` takes them; numbers of an optimizer, as `to_dict` of
tierstore.training.optimizers gives them. Output: the same bits as the kernels give, float32. Errors: `ValueError` for a
sum that is not finite; no row is changed then.

Shapes: N references, D distinct rows, R rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PARTS = 16  # of a sum over a row
F4 = np.float32


def fma(a: np.ndarray | F4, b: np.ndarray | F4, c: np.ndarray | F4) -> np.ndarray:
    """Returns a * b + c of float32s, rounded once.

    The product is exact in float64. The sum is rounded to odd there: what float32 drops then decides right.
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, dtype=np.float64)
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    even = np.asarray(total).view(np.int64) & 1 == 0
    away = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & np.isfinite(total) & even, np.nextafter(total, away), total).astype(F4)


def power(base: float, exponent: int) -> float:
    """Returns base^exponent by squaring, as the kernel does."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def mean_square(gradients: np.ndarray) -> np.ndarray:
    """Returns the mean of squares of each row, [R, dim] -> [R]: PARTS partial sums, then halves on halves."""
    dim = gradients.shape[1]
    parts = np.zeros((len(gradients), PARTS), F4)
    for start in range(0, dim, PARTS):
        some = gradients[:, start : start + PARTS]
        parts[:, : some.shape[1]] = fma(some, some, parts[:, : some.shape[1]])
    while parts.shape[1] > 1:
        half = parts.shape[1] // 2
        parts = parts[:, :half] + parts[:, half:]
    return np.asarray(parts[:, 0] / F4(dim))


def sums_of(row_ids: np.ndarray, gradients: np.ndarray, groups: np.ndarray | None = None) -> dict[int, np.ndarray]:
    """Returns the sum of each row's gradients, float32 [dim], by row id in the order of first reference."""
    of_groups: dict[int, dict[int, np.ndarray]] = {}
    for place, row_id in enumerate(row_ids.tolist()):
        if row_id >= 0:
            group = 0 if groups is None else int(groups[place])
            parts = of_groups.setdefault(row_id, {})
            parts[group] = parts.get(group, np.zeros(gradients.shape[1], F4)) + gradients[place]
    sums = {}
    for row_id, parts in of_groups.items():
        sums[row_id] = np.zeros(gradients.shape[1], F4)
        for group in sorted(parts):
            sums[row_id] = sums[row_id] + parts[group]
    return sums


@dataclass
class Rows:
    """Rows and their state, as an optimizer changes them: values float32 [R, dim], and what the rule keeps."""

    values: np.ndarray
    state: np.ndarray  # float32 [R, S]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns views of the first and second moments."""
        dim = self.values.shape[1]
        return self.state[:, :dim], self.state[:, dim : 2 * dim]


def state_floats(rule: str, dim: int) -> int:
    """Returns how many floats of state a row has."""
    return {"sgd": 0, "row_wise_adagrad": 1, "lazy_adam": 2 * dim, "dense_adam": 2 * dim + 1}[rule]


def _sgd(numbers: Mapping[str, Any], rows: Rows, gradients: np.ndarray, rates: list[float]) -> None:
    del numbers
    rows.values[:] = fma(gradients, F4(-rates[-1]), rows.values)


def _row_wise_adagrad(numbers: Mapping[str, Any], rows: Rows, gradients: np.ndarray, rates: list[float]) -> None:
    rows.state[:, 0] = F4(numbers["decay"]) * rows.state[:, 0] + mean_square(gradients)
    root = np.sqrt(rows.state[:, 0]) + F4(numbers["eps"])
    rows.values += F4(-rates[-1]) * gradients / root[:, None]


def _lazy_adam(numbers: Mapping[str, Any], rows: Rows, gradients: np.ndarray, rates: list[float]) -> None:
    first, second = rows.moments()
    step, beta1, beta2 = len(rates), numbers["beta1"], numbers["beta2"]
    first += (gradients - first) * F4(1 - beta1)
    second += (gradients * gradients - second) * F4(1 - beta2)
    rate = F4(-(rates[-1] * np.sqrt(1 - power(beta2, step)) / (1 - power(beta1, step))))
    rows.values += rate * (first / (np.sqrt(second) + F4(numbers["eps"])))


def _dense_adam_step(numbers: Mapping[str, Any], rows: Rows, gradients: np.ndarray, step: int, lr: float) -> None:
    first, second = rows.moments()
    beta1, beta2 = numbers["beta1"], numbers["beta2"]
    rest1, rest2 = F4(1 - beta1), F4(1 - beta2)
    way = gradients - first
    first[:] = fma(rest1, way, first) if rest1 < 0.5 else fma(rest1 - F4(1), way, gradients)
    second[:] = fma(rest2 * gradients, gradients, second * F4(beta2))
    rate, root = F4(-(lr / (1 - power(beta1, step)))), F4(np.sqrt(1 - power(beta2, step)))
    rows.values += rate * first / (np.sqrt(second) / root + F4(numbers["eps"]))


def catch_up(numbers: Mapping[str, Any], rows: Rows, rates: list[float], last: int) -> None:
    """Replays the steps up to `last` that each row of "dense_adam" missed, without a gradient."""
    seen = rows.state[:, -1].view(np.int32)
    for row in range(len(rows.values)):
        one = Rows(rows.values[row : row + 1], rows.state[row : row + 1])
        if one.state[:, :-1].view(np.int32).any():
            for step in range(int(seen[row]) + 1, last + 1):
                _dense_adam_step(numbers, one, np.zeros_like(one.values), step, rates[step - 1])
        seen[row] = max(int(seen[row]), last)


def _dense_adam(numbers: Mapping[str, Any], rows: Rows, gradients: np.ndarray, rates: list[float]) -> None:
    catch_up(numbers, rows, rates, len(rates) - 1)
    _dense_adam_step(numbers, rows, gradients, len(rates), rates[-1])
    rows.state[:, -1].view(np.int32)[:] = len(rates)


RULES: dict[str, Callable[[Mapping[str, Any], Rows, np.ndarray, list[float]], None]] = {
    "sgd": _sgd,
    "row_wise_adagrad": _row_wise_adagrad,
    "lazy_adam": _lazy_adam,
    "dense_adam": _dense_adam,
}


def update_rows(
    numbers: Mapping[str, Any], rows: Rows, sums: np.ndarray, rates: list[float], scale: float = 1.0
) -> None:
    """Makes step len(rates) of rows, in place; `rates` are those of all steps, of which "dense_adam" needs each."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        RULES[numbers["rule"]](numbers, rows, (sums + F4(0)) * F4(scale), rates)


@dataclass
class ReferenceTable:
    """A table that trains: rows that no step touched are asked of `base`, the others are in the dict.

    base: float32 [dim] of a row id. numbers: of the optimizer, as `to_dict` gives them.
    """

    base: Callable[[int], np.ndarray]
    dim: int
    numbers: Mapping[str, Any]
    rows: dict[int, Rows] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    commits: dict[int, tuple[dict[int, Rows], list[float]]] = field(default_factory=dict)

    def gather(self, row_ids: np.ndarray) -> np.ndarray:
        """Returns values, float32 [..., dim]; zeros for -1."""
        found = np.zeros((row_ids.size, self.dim), F4)
        for place, row_id in enumerate(row_ids.reshape(-1).tolist()):
            if row_id >= 0:
                found[place] = self._row(row_id).values[0]
        return found.reshape(*row_ids.shape, self.dim)

    def apply(
        self,
        row_ids: np.ndarray,
        gradients: np.ndarray,
        groups: np.ndarray | None = None,
        lr: float | None = None,
        scale: float = 1.0,
    ) -> None:
        """Makes one step. Raises `ValueError` for a sum that is not finite, before any row is changed."""
        flat = gradients.reshape(-1, self.dim)
        with np.errstate(over="ignore", invalid="ignore"):
            sums = sums_of(row_ids.reshape(-1), flat, None if groups is None else groups.reshape(-1))
            for row_id, total in sums.items():
                if not np.isfinite(total * F4(scale)).all():
                    raise ValueError(f"the gradient of row {row_id} is not finite")
        rates = [*self.rates, self.numbers["lr"] if lr is None else lr]
        for row_id, total in sums.items():
            self.rows[row_id] = copy.deepcopy(self._row(row_id))
            update_rows(self.numbers, self.rows[row_id], total[None], rates, scale)
        self.rates = rates

    def commit(self, step: int) -> None:
        """Keeps all rows and rates, under a number."""
        self.commits[step] = (copy.deepcopy(self.rows), list(self.rates))

    def rollback(self, step: int) -> None:
        """Goes back to a commit; later ones are forgotten."""
        rows, rates = self.commits[step]
        self.rows, self.rates = copy.deepcopy(rows), list(rates)
        self.commits = {number: kept for number, kept in self.commits.items() if number <= step}

    def _row(self, row_id: int) -> Rows:
        """Returns a row as of now: of "dense_adam" after the steps that it missed."""
        if row_id in self.rows:
            row = self.rows[row_id]
        else:
            state = np.zeros((1, state_floats(self.numbers["rule"], self.dim)), F4)
            if self.numbers["rule"] == "row_wise_adagrad":
                state[:] = self.numbers["initial"]
            row = Rows(np.array(self.base(row_id), F4).reshape(1, self.dim), state)
        if self.numbers["rule"] == "dense_adam":
            row = copy.deepcopy(row)
            catch_up(self.numbers, row, self.rates, len(self.rates))
        return row
