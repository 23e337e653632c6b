"""`JoinedOptimizer`: the tables' optimizer and the dense weights' as one, for trainers that take one optimizer.

Input: a `TableOptimizer` and other optimizers of torch. Output: one whose param groups are all of theirs, and whose
state has the states of all. Errors: theirs. The tables step first, because they may refuse a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tierstore.errors import FormatError

from .table_optimizer import TableOptimizer


class JoinedOptimizer(torch.optim.Optimizer):
    """`JoinedOptimizer(tables, torch.optim.AdamW(dense_parameters(model)))`, as `Trainer(optimizers=(joined, None))`.

    Schedulers, `GradScaler` and clipping see all param groups. One step is one step of each.
    """

    def __init__(self, tables: TableOptimizer, *others: torch.optim.Optimizer) -> None:
        """tables: steps first. others: of dense weights. Raises `ValueError` if two have one parameter."""
        self.tables, self.optimizers = tables, (tables, *others)
        super().__init__([group for each in self.optimizers for group in each.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of each optimizer. If one fails after the tables were stepped, the training is broken."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.tables.step()
        try:
            for each in self.optimizers[1:]:
                each.step()
        except BaseException as error:
            self.tables.mark_broken(
                f"a step of tables and dense weights was cut between them by {type(error).__name__}"
            )
            raise
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of all."""
        for each in self.optimizers:
            each.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all, by place. Commits the tables if rows have changed."""
        return {"joined": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the states of all, the tables first. Raises `FormatError` for a state of other optimizers."""
        states = state_dict.get("joined")
        if not isinstance(states, list) or len(states) != len(self.optimizers):
            raise FormatError(
                f"a state with {', '.join(map(str, state_dict))} is not of {len(self.optimizers)} joined optimizers"
            )
        for each, state in zip(self.optimizers, states, strict=True):
            each.load_state_dict(state)
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]
