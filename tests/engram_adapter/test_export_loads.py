"""An export loads in the libraries that load checkpoints, with the rows that were trained in their places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tierstore
from engram_adapter import build_checkpoint, export_checkpoint
from tests.engram_adapter.test_swap_qwen4 import made_model, transformers


@pytest.mark.long
def test_a_transformers_model_with_trained_tables_comes_from_its_export(tmp_path: Path) -> None:
    checkpoint, store, out = tmp_path / "checkpoint", tmp_path / "store", tmp_path / "out"
    made_model(torch.bfloat16, 1, ple_layer_ids=[2]).save_pretrained(checkpoint)
    build_checkpoint(checkpoint, store, jobs=1)
    rng = np.random.default_rng(0)
    with tierstore.open_training(store, tierstore.SGD(lr=1.0), dram="4MiB") as training:
        (name,) = training.tables
        spec = training[name].spec
        row_ids = np.unique(rng.integers(0, spec.num_rows, 50))
        training[name].apply(row_ids, rng.standard_normal((len(row_ids), spec.dim), dtype=np.float32))
        training.commit(1).wait()
        trained = torch.from_numpy(training[name].gather(np.arange(spec.num_rows))).to(torch.bfloat16)
    report = export_checkpoint(store, out, source=checkpoint)
    assert report.touched_rows == {name: len(row_ids)}
    model = transformers.Qwen4ExpForCausalLM.from_pretrained(out)
    before = transformers.Qwen4ExpForCausalLM.from_pretrained(checkpoint)
    tables = {key: value for key, value in model.state_dict().items() if "ngram_embedding" in key}
    rows = torch.cat([value for key, value in sorted(tables.items(), key=lambda pair: len(pair[0]))])
    assert torch.equal(rows[: spec.num_rows].float(), trained.float())
    for key, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]) == (key not in tables)
    assert load_file(next(out.glob("*.safetensors"))).keys() == load_file(next(checkpoint.glob("*.safetensors"))).keys()
