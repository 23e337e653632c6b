"""init: tables from scratch. Values are a function of seed, table, row and column; no disk until training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import tierstore
from engram_adapter.checkpoints import build_checkpoint, open_checkpoint
from engram_adapter.exporting import export_checkpoint
from engram_adapter.hash_spec import HashSpec
from engram_adapter.init import init_checkpoint
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.offline.exporting.row_readers import drawn_values
from tierstore.tools.cli import run
from tierstore.tools.synth import write_checkpoint

FAMILIES = ("deepseek_v41", "qwen4_exp", "engram", "longcat")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with config.json and tokenizer.json, and nothing else."""
    folder, made = tmp_path_factory.mktemp("configs"), {}
    tokenizer = None
    for family in FAMILIES:
        made[family] = folder / family
        dim = 32 if family == "deepseek_v41" else 16
        write_checkpoint(made[family], family, rows_per_head=40, hidden=16, dim=dim, tokenizer=tokenizer)
        tokenizer = tokenizer or made[family] / "tokenizer.json"
        for file in made[family].iterdir():
            if file.name not in ("config.json", "tokenizer.json"):
                file.unlink()
    return made


@pytest.mark.parametrize("dtype", ["bf16", "fp32", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_from_scratch_exports_builds_and_verifies_clean(
    configs: dict[str, Path], tmp_path: Path, family: str, dtype: str | None
) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    tables = init_checkpoint(configs[family], store, seed=5, deviation=0.5, dtype=dtype)
    export_checkpoint(store, out, source=configs[family])
    build_checkpoint(out, tmp_path / "built")
    assert not tierstore.verify(tmp_path / "built", open_checkpoint(out)).faults
    with tierstore.open(tmp_path / "built", dram="4MiB") as opened:
        for table in tables:
            assert opened[table.spec.name].spec == table.spec
            if table.spec.codec == "fp32":
                row_ids = np.arange(table.spec.num_rows)
                rows = opened[table.spec.name].rows(row_ids).view(np.float32)
                np.testing.assert_array_equal(rows, drawn_values(table, row_ids))
                assert abs(float(rows.std()) - 0.5) < 0.02
                assert abs(float(rows.mean())) < 0.02


def test_seed_and_table_decide_the_values_and_nothing_else_does(configs: dict[str, Path], tmp_path: Path) -> None:
    first, second = (init_checkpoint(configs["engram"], tmp_path / name, seed=1) for name in ("a", "b"))
    (other, *_) = init_checkpoint(configs["engram"], tmp_path / "c", seed=2)
    ids = np.array([7, 0, 7, 100])
    values = drawn_values(first[0], ids)
    np.testing.assert_array_equal(values, drawn_values(second[0], ids))
    np.testing.assert_array_equal(values[0], values[2])
    np.testing.assert_array_equal(values[3], drawn_values(first[0], ids[3:])[0])
    assert not np.array_equal(values, drawn_values(first[1], ids))
    assert not np.array_equal(values, drawn_values(other, ids))


def test_it_takes_no_disk_and_hashes_as_the_model_will(configs: dict[str, Path], tmp_path: Path) -> None:
    tables = init_checkpoint(configs["deepseek_v41"], tmp_path / "store")
    assert sum(file.stat().st_size for file in (tmp_path / "store").rglob("*")) < 200_000
    image = read_catalog(tmp_path / "store", may_be_initial=True)
    assert HashSpec.from_catalog(image).num_rows(1) == tables[0].spec.num_rows
    assert list(image.tables.values()) == list(tables)
    with tierstore.open_training(tmp_path / "store", tierstore.SGD(lr=1.0), dram="8MiB") as training:
        assert HashSpec.from_store(training).fingerprint(1) == HashSpec.from_catalog(image).fingerprint(1)


@pytest.mark.parametrize("command", [["verify"], ["epochs"], ["build"]])
def test_readers_refuse_it_with_what_helps(
    configs: dict[str, Path], tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    init_checkpoint(configs["engram"], store)
    with pytest.raises(ConfigError, match=f"tierstore export {store}"):
        tierstore.open(store)
    arguments = [*command, str(store), *([str(tmp_path / "other")] if command == ["build"] else [])]
    assert run(arguments) == 1
    assert "made by 'tierstore init'" in capsys.readouterr().err


def test_an_export_without_a_folder_has_the_config_and_loads_with_safetensors(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    init_checkpoint(configs["engram"], tmp_path / "store", layers=[15])
    export_checkpoint(tmp_path / "store", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert list(tensors) == [
        "layers.15.engram.multi_head_embedding.embedding.weight",
        "layers.15.engram.multi_head_embedding.offsets",
    ]


def test_bad_input_is_named(configs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        init_checkpoint(tmp_path, tmp_path / "store")
    with pytest.raises(ConfigError, match=r"layers 3: config\.json has tables for 1, 15"):
        init_checkpoint(configs["engram"], tmp_path / "store", layers=[1, 3])
    with pytest.raises(ConfigError, match="dtype 'fp8': a table of engram from scratch is bf16, fp16, fp32"):
        init_checkpoint(configs["engram"], tmp_path / "store", dtype="fp8")
    with pytest.raises(ConfigError, match="standard deviation -1"):
        init_checkpoint(configs["engram"], tmp_path / "store", deviation=-1)
    assert not (tmp_path / "store").exists()
    init_checkpoint(configs["engram"], tmp_path / "store")
    with pytest.raises(ConfigError, match="holds a store already"):
        init_checkpoint(configs["engram"], tmp_path / "store")
    config = json.loads((configs["longcat"] / "config.json").read_text()) | {"hidden_size": 97}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="hidden_size is 97, not a multiple of 12 heads"):
        init_checkpoint(tmp_path / "odd", tmp_path / "other")


def test_the_command_says_what_was_made(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init", str(configs["qwen4_exp"]), str(tmp_path / "a"), "--std", "0.1", "--seed", "9"]) == 0
    assert "seed 9, standard deviation 0.1" in capsys.readouterr().out
    assert run(["init", str(configs["engram"]), str(tmp_path / "b"), "--layers", "1,15", "--json"]) == 0
    assert [table["name"] for table in json.loads(capsys.readouterr().out)["tables"]] == ["layers.1", "layers.15"]
