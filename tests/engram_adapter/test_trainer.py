"""Tables trained under transformers' own Trainer and its own qwen4_exp model: beside resident tables, and resumed.

With SGD in one group, the Trainer's losses and all weights are those of the model whose tables are parameters, in bits.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tierstore
from engram_adapter import (
    JoinedOptimizer,
    TableOptimizer,
    TrainableRows,
    dense_parameters,
    load_pretrained,
    load_trainable,
    swap_trainable,
    trained_tables,
)
from engram_adapter.engines.transformers.commits import CommitCallback
from tests.engram_adapter.test_swap_qwen4 import VOCAB_SIZE, built, made_model, transformers
from tierstore.errors import ConfigError, FingerprintMismatchError

pytest.importorskip("accelerate", reason="the Trainer needs it; requirements.txt has it")

LAYERS = (1, 2)
SIZES: dict[str, Any] = {
    "ple_layer_ids": [2, 3],
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "ngram_vocab_size_base": 500,
}
LR = 0.5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model, and the store that was built from it, `checkpoint` and `store` in one folder."""
    folder = tmp_path_factory.mktemp("qwen4")
    built(made_model(torch.float32, **SIZES), folder)
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "own")
    return tmp_path / "own"


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.Qwen4ExpForCausalLM.from_pretrained(folder / "checkpoint", dtype=dtype)


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(4, VOCAB_SIZE, (9,), generator=generator) for _ in range(48)]
    return [{"input_ids": each, "labels": each} for each in ids]


def trainer(folder: Path, model: Any, optimizer: Any, callbacks: Any = (), **options: Any) -> Any:
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "max_grad_norm": 1e3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
    } | options
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"), report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        save_strategy="steps", **options,
    )  # fmt: skip
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=texts(),
        eval_dataset=texts()[:2],
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def trained(folder: Path, training: Any, model: Any = None, **options: Any) -> Any:
    """Returns a Trainer of a model whose tables are the training's."""
    if model is None:
        swap_trainable(model := resident(folder), training, groups="batch")
    tables = TableOptimizer(trained_tables(model), lr=LR)
    joined = JoinedOptimizer(tables, torch.optim.SGD(dense_parameters(model), lr=LR))
    return trainer(folder, model, joined, [CommitCallback(joined)], **options)


@pytest.fixture
def training(folder: Path) -> Iterator[Any]:
    with tierstore.open_training(folder / "store", tierstore.SGD(lr=LR), dram="8MiB") as opened:
        yield opened


def table_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].ple.ple_embedding.ngram_embedding


def rows_of(training: Any) -> list[np.ndarray]:
    return [training[f"layers.{n}"].gather(np.arange(training[f"layers.{n}"].spec.num_rows)) for n in LAYERS]


def losses_of(trained: Any) -> list[float]:
    return [float(each["loss"]) for each in trained.state.log_history if "loss" in each]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            id="accumulated",
            marks=pytest.mark.slow,
        ),
        pytest.param({"activation_checkpointing": True}, id="checkpointed", marks=pytest.mark.slow),
    ],
)
def test_the_trainer_ends_with_the_bits_of_a_model_with_resident_tables(
    folder: Path, training: Any, options: dict[str, Any]
) -> None:
    expected = resident(folder)
    before = copy.deepcopy(expected)
    reference = trainer(folder, expected, torch.optim.SGD(expected.parameters(), lr=LR), **options)
    reference.train()
    found = trained(folder, training, **options)
    found.train()
    assert losses_of(found) == losses_of(reference)
    for name, weight in found.model.named_parameters():
        if not name.endswith("gradient_norms"):
            assert torch.equal(weight, expected.get_parameter(name)), name
    for layer, rows in zip(LAYERS, rows_of(training), strict=True):
        assert np.array_equal(rows, table_of(expected, layer).weight.detach().numpy())
        assert not np.array_equal(rows, table_of(before, layer).weight.detach().numpy())


def test_a_killed_trainer_resumes_from_its_checkpoint_to_the_same_bits(folder: Path) -> None:
    shutil.copytree(folder, folder / "undisturbed")
    with tierstore.open_training(folder / "undisturbed" / "store", tierstore.SGD(lr=LR), dram="8MiB") as training:
        whole = trained(folder / "undisturbed", training)
        whole.train()
        expected = rows_of(training)

    with tierstore.open_training(folder / "store", tierstore.SGD(lr=LR), dram="8MiB") as training:
        # Three steps, of which the last is not saved; the learning rate falls as in the whole run.
        cut = trained(folder, training)
        cut.add_callback(_StopAt(3))
        cut.train()
    with tierstore.open_training(folder / "store", dram="8MiB") as training:
        model = load_trainable(folder / "out" / "checkpoint-2", training, groups="batch").train()
        resumed = trained(folder, training, model)
        resumed.train(resume_from_checkpoint=True)
        assert losses_of(resumed)[2:] == losses_of(whole)[2:]
        assert all(np.array_equal(*each) for each in zip(rows_of(training), expected, strict=True))
        for name, weight in whole.model.named_parameters():
            assert torch.equal(weight, resumed.model.get_parameter(name)), name


class _StopAt(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """Ends the training as a kill would: without a checkpoint of the last steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        control.should_training_stop = state.global_step >= self.step
        control.should_save = False if state.global_step == self.step else control.should_save


def test_commits_of_kept_checkpoints_are_pinned_and_of_rotated_ones_let_go(folder: Path, training: Any) -> None:
    trained(folder, training, max_steps=4, save_steps=1, save_total_limit=2).train()
    kept = sorted((folder / "out").glob("checkpoint-*/tables.json"))
    assert [each.parent.name for each in kept] == ["checkpoint-3", "checkpoint-4"]
    pointers = [json.loads(each.read_text()) for each in kept]
    assert [each["step"] for each in pointers] == [3, 4]
    by_number = {commit.number: commit for commit in training.commits}
    assert [by_number[each["commit"]].digest for each in pointers] == [each["digest"] for each in pointers]
    for step in (5, 6):
        training.commit(step).wait()
    assert [commit.step for commit in training.commits] == [3, 4, 5, 6]
    training.commit(7).wait()
    assert [commit.step for commit in training.commits] == [3, 4, 6, 7]


def test_a_checkpoint_and_tables_of_different_steps_are_refused(folder: Path, training: Any) -> None:
    trained(folder, training).train()
    with pytest.raises(ConfigError, match=r"starts at step 0, the tables of .* are of step 4: resume from"):
        trained(folder, training).train()
    with pytest.raises(
        ConfigError, match=r"weights under other names .* left those of the model as they were: load the"
    ):
        trained(folder, training).train(resume_from_checkpoint=True)
    state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    state["global_step"] = 3
    (folder / "out" / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    of_step_2 = folder / "out" / "checkpoint-2"
    resumed = trained(folder, training, load_trainable(of_step_2, training))
    with pytest.raises(ConfigError, match=r"starts at step 3, the tables of .* are of step 2"):
        resumed.train(resume_from_checkpoint=str(of_step_2))
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        trained(folder, training, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2).train()


def test_tables_are_trained_under_a_model_that_never_loaded_them(folder: Path, training: Any) -> None:
    whole = swapped_loss(resident(folder), training)
    with tierstore.open(folder / "store", dram="8MiB") as store:
        model = load_pretrained(folder / "checkpoint", store)
        assert torch.equal(swapped_loss(model, training), whole)
    assert all(isinstance(table_of(model, layer), TrainableRows) for layer in LAYERS)
    loaded = load_trainable(folder / "checkpoint", training)
    batch = texts()[0]["input_ids"].unsqueeze(0)
    assert torch.equal(loaded(batch, labels=batch).loss, whole)
    model.save_pretrained(folder / "saved")
    assert not any("ngram_embedding" in name for name in model.state_dict())


def swapped_loss(model: Any, training: Any) -> torch.Tensor:
    assert len(swap_trainable(model, training)) == 2
    batch = texts()[0]["input_ids"].unsqueeze(0)
    loss: torch.Tensor = model(batch, labels=batch).loss
    loss.backward()
    return loss.detach()


def test_a_bfloat16_model_gets_rows_in_bfloat16(folder: Path, training: Any) -> None:
    model = resident(folder, torch.bfloat16)
    swapped = swap_trainable(model, training)
    assert [each.dtype for each in swapped] == [torch.bfloat16] * 2
    assert swapped[0].weight.dtype == torch.bfloat16


def test_models_that_do_not_fit_are_refused_and_stay_as_they_were(folder: Path, training: Any) -> None:
    other = made_model(torch.float32, **SIZES | {"seed": 7})
    with pytest.raises(FingerprintMismatchError, match="this model's hash is"):
        swap_trainable(other, training)
    narrow = made_model(torch.float32, **SIZES | {"ple_embed_dim": 32})
    with pytest.raises((ConfigError, FingerprintMismatchError), match="values"):
        swap_trainable(narrow, training)
    assert isinstance(table_of(narrow, 1), torch.nn.Embedding)
    model = resident(folder)
    swap_trainable(model, training)
    with pytest.raises(ConfigError, match="trained already"):
        swap_trainable(model, training)
