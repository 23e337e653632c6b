"""`TableOptimizer`: applies the gradients of trained tables, as a torch.optim.Optimizer.

Input: `TrainableEmbedding`s whose gradients backward has collected. Output: rows that took a step; commits; a state
that names the commit of the tables as they are. Errors: `ValueError` for gradients that are not finite, before any
table is changed; `ConfigError` and `FormatError` for a state whose commit the store has not; `StoreNotReadyError` once
a step was cut between two tables.

The rule is the training's (`open_training(optimizer=...)`); the learning rate is the param group's, so schedulers work.
Over ranks, all construct, step, commit and save together (`rank_agreement`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tierstore.errors import ConfigError
from tierstore.training.ticket import TrainingTicket

from .optimizer_state import (
    check_commit,
    checked_state,
    commit_of,
    committed_state,
    own_state,
)
from .rank_agreement import TableStep, agree_on_commit, agree_on_step, not_finite, resume_together
from .table_gradient import RowGradients
from .trainable import trained_tables
from .trainable_module import TrainableModule

if TYPE_CHECKING:
    from tierstore import Training

    from .exchange import Ranks

FINITE_NORM = 3e38  # a gradient with a smaller norm is finite in float32
Embeddings = Iterable[TrainableModule] | Iterable[dict[str, Any]]


class TableOptimizer(torch.optim.Optimizer):
    """Takes steps of all tables that a model trains: `TableOptimizer([embedding, ...], lr=0.01)`.

    `step` applies what backward has brought: several backward passes before one step accumulate, `zero_grad` (its own,
    or the model's) drops, `GradScaler` and `torch.nn.utils.clip_grad_norm_` scale. Its `state_dict` is small: it names
    a commit. Of one thread, as the model's steps are.
    """

    def __init__(self, embeddings: Embeddings, lr: float | None = None) -> None:
        """Makes an optimizer of tables; reads nothing. Over ranks, goes back to the newest commit that all hold.

        Args:
            embeddings: `TrainableEmbedding`s or `TrainableRows` of one training, or param groups of them,
                {"embeddings": [...], "lr": 0.02}.
            lr: The learning rate of groups that name none; None: the one that the training was opened with.

        Raises:
            ConfigError: No embeddings, of several trainings, or two of one table; or ranks hold no common commit.
        """
        listed = list(embeddings)
        in_groups = [dict(each) for each in listed if isinstance(each, Mapping)]
        groups = in_groups if in_groups else [{"embeddings": listed}]
        self._embeddings: dict[int, TrainableModule] = {}
        given = [each for group in groups for each in list(group["embeddings"])]
        self._training = _one_training(given)
        exchange = given[0].exchange
        self._ranks, self._replicas = None if exchange is None else exchange.ranks, given[0].replicas
        self.num_steps, own_lr = self._on_source("resume of the tables", partial(_resumed, self._ranks, self._training))
        super().__init__(groups, {"lr": own_lr if lr is None else lr})

    def _on_source(self, what: str, call: Callable[[], Any]) -> Any:
        """Calls here, or with replicas on the source, whose result or error comes to all."""
        return call() if self._replicas is None else self._replicas.from_source(what, call)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds embeddings: {"embeddings": [...], "lr": 0.02}."""
        group = dict(param_group)
        embeddings = list(group.pop("embeddings", ()))
        if not embeddings or "params" in group:
            raise ConfigError(f"a param group of a TableOptimizer has embeddings, and no params: {sorted(param_group)}")
        _one_training([*self._embeddings.values(), *embeddings])
        super().add_param_group({**group, "params": [each.gradient_norms for each in embeddings]})
        self._embeddings.update({id(each.gradient_norms): each for each in embeddings})

    @property
    def training_store(self) -> Training:
        """The training whose tables it updates. Raises `ConfigError` on a replica that has none."""
        if self._training is None:
            raise ConfigError("this replica has no training: rank 0 of its replica group has it")
        return self._training

    def mark_broken(self, reason: str) -> None:
        """Allows no step and no commit from now on; a replica without the training exchanges no more."""
        if self._training is not None:
            self._training.mark_broken(reason)
        elif self._replicas is not None:
            self._replicas.ranks.end(reason)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of every table that has a gradient. Blocks on the disk for rows that DRAM no longer holds.

        Over ranks, all call it together: no rank changes a row before all have seen that their gradients are finite.

        Raises:
            ValueError: A gradient is not finite; no table was changed, on no rank. Or a `.grad` was changed by other
                than a factor.
            StoreNotReadyError: The training is broken. It is from now on if an error or an interrupt comes between
                two tables: then open it again, at the newest commit.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = []
        for group in self.param_groups:
            for parameter in group["params"]:
                embedding = self._embeddings[id(parameter)]
                found = embedding.gradient.taken()
                if found is not None:
                    steps.append((embedding, found, float(group["lr"])))
        self._check(steps)
        if self._training is not None:
            self._apply(steps)
        self.num_steps += 1
        return loss

    def _check(self, steps: list[tuple[TrainableModule, RowGradients, float]]) -> None:
        """Raises `ValueError` unless all gradients are finite, on all ranks."""
        checked = [TableStep(each.table_spec.name, lr, found.norms, _bad_row(found)) for each, found, lr in steps]
        if self._replicas is not None:
            self._replicas.agree_on_step(self._ranks, self.num_steps + 1, checked)
        elif self._ranks is not None:
            agree_on_step(self._ranks, self.num_steps + 1, checked)
        for each in checked:
            if each.bad_row is not None:
                raise not_finite(each.table, each.bad_row)

    def _apply(self, steps: list[tuple[TrainableModule, RowGradients, float]]) -> None:
        begun = False
        try:
            for place, (embedding, found, lr) in enumerate(steps):
                begun = place > 0
                embedding.table.apply(found.rows, found.sums, lr=lr)
                begun = True
                embedding.gradient.release_pins()
        except BaseException as error:
            where = "between two of them" if self._ranks is None else "on this rank alone"
            if (begun and len(steps) > 1) or self._ranks is not None:
                names = ", ".join(embedding.table_spec.name for embedding, *_ in steps)
                self.mark_broken(f"a step of the tables {names} was cut {where} by {type(error).__name__}")
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and gives their memory back."""
        super().zero_grad(set_to_none)
        for embedding in self._embeddings.values():
            embedding.gradient.drop()

    def grad_norm_squared(self) -> float:
        """Returns the square of the L2 norm of all tables' gradients together, in float64.

        Within a table it is summed in blocks of rows (a head's), in the order of row ids, so that it depends neither on
        the order of a batch nor on how ranks divide it.
        """
        return sum(embedding.gradient.grad_norm_squared() for embedding in self._embeddings.values())

    def commit(self, step: int | None = None, payload: bytes = b"") -> TrainingTicket:
        """Starts to make all tables durable as they are now; returns a ticket, whose `wait` returns the commit.

        Over ranks, all call it with the same step. It waits until all have the commit before; the ticket is of this
        rank's own part. A replica without the training has no part: its ticket has ended at once, with None, and says
        nothing of the disk (`state_dict` does).

        step: The caller's own number of the step; None: how many steps this optimizer has taken, `num_steps`.
        """
        number = self.num_steps if step is None else step
        tickets: list[TrainingTicket] = []

        def begin() -> None:
            training = self.training_store
            together = None if self._ranks is None else agree_on_commit(self._ranks, training, number)
            tickets.append(training.commit(number, payload, together))

        self._on_source(f"commit of step {number}", begin)
        self.num_steps = number
        if not tickets:  # a replica
            tickets.append(TrainingTicket("a commit of the source"))
            tickets[0].end()
        return tickets[0]

    def state_dict(self) -> dict[str, Any]:
        """Returns which commit holds the tables as they are now, and the param groups. Commits if rows have changed.

        Blocks until that commit is durable. Save it beside the dense weights of the same step, then `pin(state)`: else
        only the newest two commits are kept. Over ranks, all call it; it is the same on all, so that one may save it.
        """
        groups = [{**group, "params": list(range(len(group["params"])))} for group in self.param_groups]

        def committed() -> dict[str, Any]:
            return committed_state(self._ranks, self.training_store, self.num_steps)

        return self._on_source("state of the tables", committed) | {"param_groups": groups}

    def pin(self, state_dict: dict[str, Any]) -> None:
        """Keeps the commit that a state names, this rank's own, until it is unpinned. Blocks on the catalog."""
        checked = checked_state(state_dict, len(self.param_groups))

        def keep() -> None:
            state = own_state(checked, self.training_store, self._ranks)
            if state["commit"]:
                self.training_store.pin(state["commit"])

        self._on_source("pin of the tables", keep)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to the commit that a state names, and drops what came later. Blocks as opening a training does.

        Over ranks, all call it. A state of other ranks fits if the slices were made of theirs (`tierstore reslice`).

        Raises:
            FormatError: It is no state of a `TableOptimizer`.
            ConfigError: The store has no such commit, or another one of its number or step: the dense weights and the
                tables would be of different steps.
        """
        state = checked_state(state_dict, len(self.param_groups))

        def go_back() -> int:
            training, own = self.training_store, own_state(state, self.training_store, self._ranks)
            check_commit(training, own)
            if own["commit"] != training.at or training.has_changes:
                training.rollback(own["commit"])
            return int(own["step"])

        self.num_steps = self._on_source("load of the tables", go_back)
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self.zero_grad()


def dense_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Returns the parameters of a model that another optimizer trains: all but those that stand for tables."""
    tables = {id(each.gradient_norms) for each in trained_tables(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in tables]


def _one_training(embeddings: Sequence[TrainableModule]) -> Training | None:
    """Returns the training of all embeddings; raises `ConfigError` for none, two trainings, or a table given twice."""
    if not embeddings or not all(isinstance(each, TrainableModule) for each in embeddings):
        raise ConfigError(
            f"{[type(each).__name__ for each in embeddings]}: a TableOptimizer takes TrainableEmbeddings or "
            "TrainableRows, at least one; give dense parameters to another optimizer"
        )
    training = embeddings[0]._training
    if any(each._training is not training for each in embeddings):
        raise ConfigError("the embeddings are of two trainings: make a TableOptimizer for each")
    ranks = [None if each.exchange is None else each.exchange.ranks for each in embeddings]
    replicas = [None if each.replicas is None else each.replicas.ranks for each in embeddings]
    if any(each is not ranks[0] for each in ranks) or any(each is not replicas[0] for each in replicas):
        raise ConfigError("the embeddings are of two process groups: give all tables of a training the same")
    names = [each.table_spec.name for each in embeddings]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"table {name} is given twice: a step would apply two gradients to it, one by one")
    return training


def _resumed(ranks: Ranks | None, training: Any) -> list[Any]:
    """Goes back to what all ranks hold; returns how many steps the training has taken, and its learning rate."""
    if ranks is not None:
        resume_together(ranks, training)
    commit = commit_of(training, training.at)
    return [0 if commit is None else commit.step, training.optimizer.lr]


def _bad_row(found: RowGradients) -> int | None:
    """Returns a row of this rank whose gradient is not finite; None if there is not one.

    No number is larger than the norm of its block, so that small norms say enough.
    """
    if (found.norms < FINITE_NORM).all():
        return None
    bad = found.rows[~np.isfinite(found.sums).all(axis=1)]
    return int(bad[0]) if len(bad) else None
