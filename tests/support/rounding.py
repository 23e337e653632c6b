"""Numbers that know how far float32 may be from them: the tolerance of a test follows from the terms it sums.

A `Rounded` is a float64 value and a bound on the error of the same expression in float32, whatever the order in which a
processor, or another shape of batch, sums. A sum of n products is off by at most about LAMBDA * sqrt(n) * u times the
sum of the products' magnitudes (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019,
theorem 2.4; the bound that never fails has n for LAMBDA * sqrt(n)). What comes in exactly has an error of 0.
First-order: products of two errors are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

UNIT = 2.0**-24  # half a unit in the last place of float32
LAMBDA = 4.0  # measured: actual errors stay below a twentieth of the bound
FUNCTION_UNITS = 4  # exp, sqrt, rsqrt, sigmoid and division of libraries are off by no more units


def gamma(num_terms: int) -> float:
    """The bound on a sum of so many products, as a part of the sum of their magnitudes."""
    return LAMBDA * math.sqrt(num_terms) * UNIT


class Rounded:
    """A float64 array `value` and, of the same shape, the most that float32 may be off: `error`."""

    def __init__(self, value: np.ndarray | float, error: np.ndarray | float = 0.0) -> None:
        self.value = np.asarray(value, dtype=np.float64)
        self.error = np.broadcast_to(np.asarray(error, dtype=np.float64), self.value.shape)

    def __getitem__(self, index: object) -> Rounded:
        return Rounded(self.value[index], self.error[index])  # type: ignore[index]

    def __add__(self, other: Rounded) -> Rounded:
        total = self.value + other.value
        return Rounded(total, self.error + other.error + UNIT * np.abs(total))

    def __mul__(self, other: Rounded) -> Rounded:
        product = self.value * other.value
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        return Rounded(product, error + UNIT * np.abs(product))

    def dot(self, other: Rounded, axis: int = -1) -> Rounded:
        """The sum of products along an axis."""
        product = self.value * other.value
        carried = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        error = carried.sum(axis) + gamma(product.shape[axis]) * np.abs(product).sum(axis)
        return Rounded(product.sum(axis), error)

    def monotone(self, function: Callable[[np.ndarray], np.ndarray]) -> Rounded:
        """A function that only rises, or only falls: off by what its argument's ends make of it,
        and its own rounding."""
        value = function(self.value)
        ends = np.abs(function(self.value - self.error) - value), np.abs(function(self.value + self.error) - value)
        return Rounded(value, np.maximum(*ends) + FUNCTION_UNITS * UNIT * np.abs(value))

    def lipschitz(self, function: Callable[[np.ndarray], np.ndarray], slope: float) -> Rounded:
        """Any function whose slope is nowhere steeper than `slope`."""
        value = function(self.value)
        size = np.abs(value) + np.abs(self.value)  # of what it computes with on the way
        return Rounded(value, slope * self.error + FUNCTION_UNITS * UNIT * size)

    def scaled(self, factor: float) -> Rounded:
        """Times a number that is rounded itself."""
        return Rounded(self.value * factor, self.error * abs(factor) + 2 * UNIT * np.abs(self.value * factor))


def stack(parts: list[Rounded]) -> Rounded:
    """Rounded numbers along a new first axis."""
    return Rounded(np.stack([part.value for part in parts]), np.stack([part.error for part in parts]))


def rms_norm(vector: Rounded, weight: Rounded, eps: float) -> Rounded:
    """vector / sqrt(mean(vector^2) + eps) * weight, over the last axis."""
    mean = vector.dot(vector).scaled(1 / vector.value.shape[-1]) + Rounded(eps)
    inverse = mean.monotone(lambda square: 1 / np.sqrt(np.maximum(square, eps / 2)))
    return vector * inverse[..., None] * weight


def check_within(found: np.ndarray, expected: Rounded, tightness: float = 1e-4) -> None:
    """Fails unless each of `found` is as near as float32 must be.

    tightness: the bounds' median, as a part of the largest value, is below it:
    wide bounds would let everything through.
    """
    assert found.shape == expected.value.shape
    assert np.median(expected.error) < tightness * np.abs(expected.value).max()
    off = np.abs(found - expected.value)
    worst = np.unravel_index(np.argmax(off - expected.error), off.shape)
    assert (off <= expected.error).all(), (
        f"at {worst}: {found[worst]} instead of {expected.value[worst]}, off by {off[worst]:.3g}; "
        f"float32 may be off by {expected.error[worst]:.3g}"
    )


def sigmoid(values: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-values)))


def signed_root(values: np.ndarray, floor: float) -> np.ndarray:
    """sign(v) * sqrt(max(|v|, floor)); it only rises."""
    return np.asarray(np.copysign(np.sqrt(np.maximum(np.abs(values), floor)), values))
