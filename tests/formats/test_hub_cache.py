"""A model's name is looked up in the Hugging Face cache; what is not there is named with the command for it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors.torch import save_file

from tierstore.errors import ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.hub_cache import cache_folder, repository_named
from tierstore.tools.build import command

COMMIT, OTHER = "0" * 39 + "1", "0" * 39 + "2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model of two revisions, as huggingface_hub lays it out; the working folder is another."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cache" / repo_folder_name(repo_id="some-org/Model_1", repo_type="model")
    for commit, value in ((COMMIT, 1.0), (OTHER, 2.0)):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        save_file({"table": torch.full((4, 2), value)}, folder / "blobs" / commit)
        (folder / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{commit}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "refs" / "v2").write_text(OTHER)
    return folder


def value_in(checkpoint: Checkpoint) -> float:
    return float(np.frombuffer(checkpoint.tensors["table"].read_bytes(), "<f4")[0])


def test_a_name_is_the_snapshot_of_its_revision(cache: Path) -> None:
    assert huggingface_hub.try_to_load_from_cache("some-org/Model_1", "model.safetensors", cache.parent) == str(
        cache / "snapshots" / COMMIT / "model.safetensors"
    )
    assert value_in(Checkpoint.open("some-org/Model_1")) == 1.0
    assert (
        value_in(Checkpoint.open("some-org/Model_1@v2"))
        == value_in(Checkpoint.open(f"some-org/Model_1@{OTHER}"))
        == 2.0
    )


@pytest.mark.usefixtures("cache")
def test_a_folder_of_that_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "some-org" / "Model_1").mkdir(parents=True)
    save_file({"table": torch.full((4, 2), 3.0)}, tmp_path / "some-org" / "Model_1" / "model.safetensors")
    assert value_in(Checkpoint.open("some-org/Model_1")) == 3.0


@pytest.mark.usefixtures("cache")
def test_the_command_builds_a_cached_model_by_its_name(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["some-org/Model_1", str(tmp_path / "store"), "--tensor", "table"])
    assert done.exit_code == 0, done.output
    assert "is ready" in done.output


def test_what_was_not_downloaded_is_named_with_the_command_that_does(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model some-org/Other in .*: hf download some-org/Other$"):
        Checkpoint.open("some-org/Other")
    with pytest.raises(
        ConfigError, match=r"revision v3 is not .*0001, .*0002; .* hf download some-org/Model_1 --revision v3$"
    ):
        Checkpoint.open("some-org/Model_1@v3")
    (cache / "refs" / "main").write_text("../../elsewhere")
    with pytest.raises(ConfigError, match=r"revision main is not in the Hugging Face cache"):
        Checkpoint.open("some-org/Model_1")


def test_a_file_that_a_snapshot_lacks_is_named_with_its_command(cache: Path) -> None:
    index = cache / "snapshots" / COMMIT / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"table": "model.safetensors", "other": "b.safetensors"}}')
    with pytest.raises(ConfigError, match=rf"hf download some-org/Model_1 b\.safetensors --revision {COMMIT}"):
        Checkpoint.open("some-org/Model_1").tensor("other", ["F32"], 2)


def test_paths_that_are_no_names_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("model", "a/b/c", "/a/b", "../b", "a/..", ".a/b", "a--b/c", "a/b@"):
        assert repository_named(Path(path)) is None
        with pytest.raises(ConfigError, match="there is no checkpoint at"):
            Checkpoint.open(path)


def test_the_cache_is_where_the_library_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder({"HF_HUB_CACHE": "/x", "HF_HOME": "/y"}) == Path("/x")
    assert cache_folder({"HF_HOME": "/y", "XDG_CACHE_HOME": "/z"}) == Path("/y/hub")
    assert cache_folder({"XDG_CACHE_HOME": "/z"}) == Path("/z/huggingface/hub")
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    assert str(cache_folder()) == constants.HF_HUB_CACHE
