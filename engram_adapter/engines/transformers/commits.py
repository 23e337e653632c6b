"""`CommitCallback`: checkpoints of transformers' Trainer and commits of the tables go together.

Input: the events of a `Trainer`, whose optimizer is a `JoinedOptimizer` or a `TableOptimizer`. Output: for each
checkpoint that the Trainer keeps, a commit that the store keeps. Errors: `ConfigError` for dense weights and tables of
different steps.

The Trainer saves the optimizer's state, and that makes the commit. So a checkpoint is resumed without this callback
too, but the store keeps only the newest two commits, and nobody compares steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tierstore.errors import ConfigError

from ...joined_optimizer import JoinedOptimizer
from ...table_optimizer import TableOptimizer
from .loading import transformers_part

POINTER_FILE = "tables.json"  # in each checkpoint's folder: the commit that goes with it


_TrainerCallback: Any = transformers_part("trainer_callback").TrainerCallback


class CommitCallback(_TrainerCallback):
    """`Trainer(..., optimizers=(optimizer, None), callbacks=[CommitCallback(optimizer)])`.

    Pins the commit of each checkpoint, unpins those whose checkpoint was rotated away, counts steps as the Trainer
    does, and refuses to start from a checkpoint and tables of different steps.
    """

    def __init__(self, optimizer: JoinedOptimizer | TableOptimizer, from_here: bool = False) -> None:
        """from_here: start the Trainer's step 0 with the tables of an earlier training, on purpose."""
        self._tables = optimizer.tables if isinstance(optimizer, JoinedOptimizer) else optimizer
        self._from_here = from_here
        self._pinned: dict[Path, int] = {}  # commit of each checkpoint that this callback has seen

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Compares the steps of dense weights and tables, and finds the checkpoints that are kept."""
        del control
        _check_weights(Path(args.output_dir) / f"checkpoint-{state.global_step}", model)
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end: the Trainer would load the best dense weights, and leave the tables at the "
                f"last step. Leave it out; afterwards open_training(at=...) with the commit in {POINTER_FILE} of the "
                "best checkpoint"
            )
        if self._from_here and state.global_step == 0:
            self._tables.num_steps = 0
        if state.global_step != self._tables.num_steps:
            raise ConfigError(
                f"the Trainer starts at step {state.global_step}, the tables of {self._tables.training_store.path} are "
                f"of step {self._tables.num_steps}: resume from the checkpoint of that step (resume_from_checkpoint=), "
                "open_training(at=...) with the commit of this one, or CommitCallback(..., from_here=True) to start "
                "with these tables"
            )
        for file in Path(args.output_dir).glob(f"checkpoint-*/{POINTER_FILE}"):
            self._pinned[file.parent] = int(json.loads(file.read_text())["commit"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Counts steps as the Trainer does, those that GradScaler skipped too."""
        del args, control
        self._tables.num_steps = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Pins the commit of the checkpoint that was saved, and unpins those of checkpoints that are gone. Blocks."""
        del control
        training, saved = self._tables.training_store, self._tables.state_dict()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if saved["commit"] and folder.is_dir():
            training.pin(saved["commit"])
            self._pinned[folder] = saved["commit"]
            pointer = {"store": str(training.path), **{name: saved[name] for name in ("commit", "digest", "step")}}
            (folder / POINTER_FILE).write_text(json.dumps(pointer, indent=1) + "\n")
        gone = {each: number for each, number in self._pinned.items() if not each.is_dir()}
        for each in gone:
            del self._pinned[each]
        kept = {commit.number for commit in training.commits}
        for number in set(gone.values()) - set(self._pinned.values()):
            if number in kept:
                training.unpin(number)


def _check_weights(folder: Path, model: Any) -> None:
    """Raises `ConfigError` if the Trainer has resumed from `folder` and left weights of `model` as they were.

    `save_pretrained` may write weights under other names than the model's, such as each expert's by themselves. The
    Trainer reads them by the model's names, and warns; `from_pretrained` reads them all.
    """
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        saved = set(json.loads(index.read_text())["weight_map"])
    elif file.is_file():
        with safe_open(file, "numpy") as tensors:
            saved = set(tensors.keys())
    else:
        return
    unread = sorted(saved - set(model.state_dict()))
    if unread and Path(getattr(model, "name_or_path", "")).resolve() != folder.resolve():
        raise ConfigError(
            f"{folder} has {len(unread)} weights under other names than the model's, {unread[0]} first, and the "
            "Trainer, which reads them by name, left those of the model as they were: load the model from that folder "
            "(load_trainable, from_pretrained) before you resume"
        )
