"""The optimizers of tables: what they are called, their numbers, and the state that each row carries.

Input: numbers of a call or of a commit (`from_dict`). Output: frozen values, `to_dict` for the commit, and how many
float32s of state a row has. Errors: `ConfigError` for numbers with which no optimizer works, and for unknown names.

The arithmetic is in kernels/cpu/optimizer.h, and in NumPy in kernels/reference_training.py.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from ..errors import ConfigError


@dataclass(frozen=True)
class Optimizer:
    """What all rules share. Instances are made of the subclasses, and validated when made.

    lr: the learning rate of steps that are given none. It may be 0; a step's own rate takes its place.
    """

    rule: ClassVar[str] = ""
    lr: float

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{type(self).__name__}: {each.name} is {value!r}, must be a finite number")
            object.__setattr__(self, each.name, float(value))
            if value < 0:
                raise ConfigError(f"{type(self).__name__}: {each.name} is {value}, must be at least 0")

    def state_floats(self, dim: int) -> int:
        """Returns how many float32s of state follow the `dim` values of a row."""
        return max((part.stop for part in self.state_layout(dim).values()), default=0)

    def state_layout(self, dim: int) -> dict[str, slice]:
        """Returns where each part of the state lies among the float32s that follow a row's values."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Returns the rule's name and numbers, for JSON."""
        return {"rule": self.rule, **asdict(self)}


def _below_one(optimizer: Optimizer, *names: str) -> None:
    for name in names:
        if getattr(optimizer, name) >= 1:
            raise ConfigError(f"{type(optimizer).__name__}: {name} is {getattr(optimizer, name)}, must be below 1")


@dataclass(frozen=True)
class SGD(Optimizer):
    """w -= lr * g. No state. Equal to torch.optim.SGD in bits."""

    rule: ClassVar[str] = "sgd"

    def state_layout(self, dim: int) -> dict[str, slice]:
        """Returns {}."""
        del dim
        return {}


@dataclass(frozen=True)
class RowWiseAdagrad(Optimizer):
    """m = decay * m + mean(g * g); w -= lr / (sqrt(m) + eps) * g. One number of state a row.

    decay: 1.0 is FBGEMM's EXACT_ROWWISE_ADAGRAD. initial: m of a row that no step has touched.
    """

    rule: ClassVar[str] = "row_wise_adagrad"
    eps: float = 1e-8
    decay: float = 1.0
    initial: float = 0.0

    def __post_init__(self) -> None:
        """Refuses numbers that make no optimizer."""
        super().__post_init__()
        if self.decay > 1:
            raise ConfigError(f"RowWiseAdagrad: decay is {self.decay}, must be at most 1")
        if self.eps == 0 and self.initial == 0:
            raise ConfigError("RowWiseAdagrad: eps and initial are both 0, so a zero gradient would divide by zero")

    def state_layout(self, dim: int) -> dict[str, slice]:
        """Returns {"sum": ...}, one float: the mean squares so far."""
        del dim
        return {"sum": slice(0, 1)}


@dataclass(frozen=True)
class _Adam(Optimizer):
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_one(self, "beta1", "beta2")
        if self.eps == 0:
            raise ConfigError(f"{type(self).__name__}: eps is 0, so a row without a second moment would divide by zero")

    def state_layout(self, dim: int) -> dict[str, slice]:
        return {"exp_avg": slice(0, dim), "exp_avg_sq": slice(dim, 2 * dim)}


@dataclass(frozen=True)
class LazyAdam(_Adam):
    """Adam of the rows that a step touches; the others stay as they are. The rule of torch.optim.SparseAdam, in bits.

    On rows that are seldom touched it moves much less than Adam does: momentum acts only when the row comes.
    """

    rule: ClassVar[str] = "lazy_adam"


@dataclass(frozen=True)
class DenseAdam(_Adam):
    """torch.optim.Adam of the whole table. A row that comes back replays the steps it missed, with their rates.

    The state's "last_step" is the bits of an int32: the last step that the record has seen.
    """

    rule: ClassVar[str] = "dense_adam"

    def state_layout(self, dim: int) -> dict[str, slice]:
        """Returns "exp_avg" and "exp_avg_sq", `dim` floats each, and "last_step", one."""
        return {**super().state_layout(dim), "last_step": slice(2 * dim, 2 * dim + 1)}


RULES: dict[str, type[Optimizer]] = {each.rule: each for each in (SGD, RowWiseAdagrad, LazyAdam, DenseAdam)}


def from_dict(numbers: dict[str, Any]) -> Optimizer:
    """Returns what `to_dict` made a dictionary of. Raises `ConfigError` for a rule or number that it does not know."""
    named = RULES.get(str(numbers.get("rule")))
    if named is None:
        known = ", ".join(RULES)
        raise ConfigError(f"optimizer {numbers.get('rule')!r} is not known to this version; it knows {known}")
    given = {name: value for name, value in numbers.items() if name != "rule"}
    expected = {each.name for each in fields(named)}
    if given.keys() != expected:
        different = sorted(given.keys() ^ expected)
        raise ConfigError(f"optimizer {named.rule!r}: {', '.join(different)} missing or not known to this version")
    return named(**given)
