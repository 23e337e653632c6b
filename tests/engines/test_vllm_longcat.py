"""LongCat's table in vLLM: no row of it loads, and a step's rows are the checkpoint's."""

from __future__ import annotations

import json
import logging
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engram_adapter import HashSpec, build_checkpoint
from engram_adapter.engines.gate import EngineMismatchError
from tests.engines.conftest import vllm_config
from tests.engines.test_vllm_start import start
from tierstore.tools.corpus import train_tokenizer
from tierstore.tools.synth import write_checkpoint

MODULE = "vllm.model_executor.models.longcat_flash_ngram"
HEADS, DIM = 12, 8


class Model(NamedTuple):
    """A checkpoint, its store, its configuration and tensors."""

    store: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def spec(self) -> HashSpec:
        return HashSpec.from_config(self.config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("longcat")
    tokenizer: Tokenizer = train_tokenizer([Path(__file__)], 300)
    write_checkpoint(folder / "model", "longcat", rows_per_head=500, dim=DIM, tokenizer=tokenizer)
    build_checkpoint(folder / "model", folder / "store")
    tensors: dict[str, torch.Tensor] = {}
    for file in (folder / "model").glob("*.safetensors"):
        tensors |= load_file(file)
    return Model(folder / "store", json.loads((folder / "model" / "config.json").read_text()), tensors)


def embedding(config: Any, text: dict[str, Any]) -> Any:
    """The engine's n-gram embedding, as a worker of this configuration builds it."""
    start(config)
    import_module("vllm.config").current[0] = config
    return import_module(MODULE).NgramEmbedding(SimpleNamespace(**text, dtype=torch.bfloat16), None)


def load(hashing: Any, tensors: dict[str, torch.Tensor]) -> None:
    for head in range(HEADS):
        name = f"ngram_embeddings.embedders.{head}.weight"
        assert hashing.load_weight(name, tensors[f"model.{name}"]) == "ngram_embeddings.oe_embedder.weight"


def some_ids(model: Model, tokens: int, seed: int = 0) -> torch.Tensor:
    ids = np.random.default_rng(seed).integers(0, model.config["vocab_size"], (1, tokens))
    return torch.from_numpy(model.spec.row_ids(ids, 0)[0])


def state_of(config: Any, hashing: Any) -> Any:
    return import_module(MODULE).LongcatNgramModelState(
        config, torch.nn.ModuleList([hashing]), None, torch.device("cpu")
    )


@pytest.mark.usefixtures("vllm")
def test_steps_have_the_rows_of_a_resident_table(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    resident = embedding(vllm_config(model.config, None), model.config)
    load(resident, model.tensors)
    config = vllm_config(model.config, model.store)
    tiered = embedding(config, model.config)
    load(tiered, model.tensors)
    assert (resident.oe_embedder.weight.shape[0], tiered.oe_embedder.weight.shape[0]) == (model.spec.num_rows(0), 0)
    with caplog.at_level(logging.INFO, "vllm.tierstore"):
        state = state_of(config, tiered)
    assert "tierstore serves model.ngram_embeddings: table layers.0" in caplog.text
    for tokens in (1, 64, 7):
        ids = some_ids(model, tokens, tokens)
        batch = SimpleNamespace(input_ids=torch.zeros(tokens, dtype=torch.int64), oe_ids=ids, num_tokens=tokens)
        found = state.prepare_inputs(batch, None)["inputs_embeds"]
        assert torch.equal(found, resident.embed_batched(batch.input_ids, ids))
    assert state.of_tierstore.embeddings[0].rows.stats()["rows"] == (1 + 64 + 7) * HEADS


@pytest.mark.usefixtures("vllm")
def test_without_settings_after_a_worker_with_them_the_engine_has_its_own_table(model: Model) -> None:
    module = import_module(MODULE)
    stock = module.VocabParallelEmbedding, module.NgramEmbedding.load_weight
    start(vllm_config(model.config, model.store))
    assert module.VocabParallelEmbedding is not stock[0]
    assert type(embedding(vllm_config(model.config, None), model.config).oe_embedder) is stock[0]
    assert (module.VocabParallelEmbedding, module.NgramEmbedding.load_weight) == stock


@pytest.mark.usefixtures("vllm")
def test_a_checkpoint_of_other_weights_is_refused(model: Model) -> None:
    hashing = embedding(vllm_config(model.config, model.store), model.config)
    with pytest.raises(EngineMismatchError, match=r"rows differ\): the weights are others"):
        load(hashing, {name: tensor.flip(0) for name, tensor in model.tensors.items()})
    with pytest.raises(EngineMismatchError, match=r"head 0 of the checkpoint is torch\.float32 of 8 values"):
        load(hashing, {name: tensor.float() for name, tensor in model.tensors.items()})


@pytest.mark.usefixtures("vllm")
def test_a_model_whose_rows_were_never_compared_is_refused(model: Model) -> None:
    config = vllm_config(model.config, model.store)
    with pytest.raises(EngineMismatchError, match=r"no row of table layers\.0 to compare"):
        state_of(config, embedding(config, model.config))


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"ngram_vocab_size_ratio": 2}, "rows of table layers.0 in .*the engine expects"),
    ({"eos_token_id": 7}, "hash fingerprint of table layers.0"),
    ({"emb_split_num": 2}, "rows of table layers.0"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS, ids=[next(iter(change)) for change, _ in OTHERS])
@pytest.mark.usefixtures("vllm")
def test_a_store_of_another_hash_is_refused(model: Model, change: dict[str, Any], message: str) -> None:
    text = model.config | change
    with pytest.raises(EngineMismatchError, match=message):
        embedding(vllm_config(text, model.store), text)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [("ne_mods", "heads' rows"), ("exclusive_sizes", "heads' first rows"), ("ne_weights", "weights")],
)
@pytest.mark.usefixtures("vllm")
def test_an_engine_that_hashes_otherwise_is_refused(model: Model, buffer: str, message: str) -> None:
    config = vllm_config(model.config, model.store)
    hashing = embedding(config, model.config)
    load(hashing, model.tensors)
    state_of(config, hashing)
    getattr(hashing, buffer).view(-1)[-1 if buffer == "ne_weights" else 3] += 1
    with pytest.raises(EngineMismatchError, match=f"{message} of the engine's hash are"):
        state_of(config, hashing)


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        ("NgramEmbedding", "embed_batched"),
        ("NgramEmbedding", "load_weight"),
        ("LongcatNgramModelState", "prepare_inputs"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_every_method_that_is_relied_on_is_checked(model: Model, owner: str, method: str) -> None:
    setattr(getattr(import_module(MODULE), owner), method, lambda self, something_new: None)  # noqa: ARG005
    with pytest.raises(EngineMismatchError, match=rf"{owner}\.{method} takes \(something_new\)"):
        start(vllm_config(model.config, model.store))


@pytest.mark.usefixtures("vllm")
def test_a_model_with_the_engines_own_table_is_refused(model: Model) -> None:
    resident = embedding(vllm_config(model.config, None), model.config)
    config = vllm_config(model.config, model.store)
    start(config)
    with pytest.raises(EngineMismatchError, match=r"has a VocabParallelEmbedding of \d+ rows, not the class"):
        state_of(config, resident)
    with pytest.raises(EngineMismatchError, match="has 0 n-gram embeddings, expected one"):
        import_module("engram_adapter.engines.vllm.longcat_staging").StagedLongcat(config, torch.nn.Linear(1, 1))
