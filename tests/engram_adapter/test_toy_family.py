"""A new family is one file: once registered, synth writes it, build reads it, and a store answers with its rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import toy_family
from tokenizers import Tokenizer

import tierstore
from engram_adapter import HashSpec, TieredEmbedding
from engram_adapter.families import FAMILIES, read_model, register
from tierstore.errors import ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.offline.build import build_store
from tierstore.tools.corpus import train_tokenizer
from tierstore.tools.synth import write_checkpoint

TOKENS = [7, 1, 1, 250, 0, 33]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, toy_family.NAME, toy_family.FAMILY)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Path(__file__)], 300)


@pytest.mark.usefixtures("toy")
def test_a_family_of_one_file_is_written_built_and_looked_up(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_checkpoint(tmp_path / "model", "toy", rows_per_head=101, tokenizer=tokenizer)
    checkpoint = Checkpoint.open(tmp_path / "model")
    model = read_model(checkpoint)  # found by its mark and its tensors' names
    assert (model.family, [source.spec.name for source in model.sources]) == ("toy", ["layers.0", "layers.2"])
    attachments = model.hash_spec.attachments()
    build_store(tmp_path / "store", model.sources, origin=checkpoint.to_dict(), attachments=attachments, jobs=1)
    weights: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        weights |= load_file(file)
    before = [0, *TOKENS[:-1]]  # the pad id stands before the first token
    row_ids = [(3 * token ^ 5 * last) % 101 for token, last in zip(TOKENS, before, strict=True)]
    with tierstore.open(tmp_path / "store", dram="16MiB") as store:
        for layer in (0, 2):
            found = TieredEmbedding(store, layer, HashSpec.from_store(store))(torch.tensor([TOKENS]))
            assert torch.equal(found, weights[f"toy.{layer}.rows"][row_ids].reshape(1, len(TOKENS), 1, 4))


def test_a_family_that_is_not_registered_is_not_known(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="'toy' is not known; there are deepseek_v41, engram, longcat, qwen4_exp"):
        write_checkpoint(tmp_path / "model", "toy", rows_per_head=101, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"engram_layer_ids \(deepseek_v41\), ple_layer_ids \(qwen4_exp\)"):
        HashSpec.from_config({"toy_layers": [0], "toy_rows": 101, "vocab_size": 300})


def test_to_register_a_family_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engram_adapter.family.FAMILIES", registry := dict[str, object]())
    register(toy_family.FAMILY)
    assert registry == {"toy": toy_family.FAMILY}


@pytest.mark.parametrize("module", ["family", "hash_spec", "models", "families"])
def test_every_family_is_known_whichever_module_is_imported_first(module: str) -> None:
    code = f"import engram_adapter.{module}; from engram_adapter.family import FAMILIES; print(*sorted(FAMILIES))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["deepseek_v41", "engram", "longcat", "qwen4_exp"]
