"""Which files are a checkpoint: what the index says, what is visible without one,
and what only looks like a whole one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from engram_adapter.families import plain_source
from tierstore import ConfigError, FormatError
from tierstore.formats.checkpoint import Checkpoint

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a" + "\nsize 2206408\n"


def write(file: Path, **tensors: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, file)
    return file


def write_index(folder: Path, **file_of: str) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": file_of}))
    return index


def read(path: Path, name: str = "table") -> bytes:
    return Checkpoint.open(path).tensor(name, ["F32"], 2).read_bytes()


def test_the_index_says_which_of_two_files_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", table=ROWS, other=ROWS)
    write(tmp_path / "b.safetensors", table=ROWS + 1)
    write_index(tmp_path, table="b.safetensors", other="a.safetensors")
    assert read(tmp_path) == (ROWS + 1).tobytes()


def test_without_an_index_the_same_tensor_twice_is_refused_and_nobody_is_told_to_remove_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", table=ROWS)
    write(tmp_path / "b.safetensors", table=ROWS + 1)
    with pytest.raises(FormatError, match=r"table is in a\.safetensors and again in b\.safetensors") as refused:
        Checkpoint.open(tmp_path)
    assert "remove" not in str(refused.value)


def test_a_tensor_that_the_index_does_not_list_is_named_with_its_file(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", other=ROWS, unlisted=ROWS)
    write(tmp_path / "beside.safetensors", table=ROWS)
    write_index(tmp_path, other="a.safetensors", moved="a.safetensors")
    for name, message in {
        "table": r"lies in beside\.safetensors, but model\.safetensors\.index\.json does not list it",
        "unlisted": r"lies in a\.safetensors, but model\.safetensors\.index\.json does not list it",
        "moved": r"is not in a\.safetensors, where model\.safetensors\.index\.json says that it lies",
    }.items():
        with pytest.raises(ConfigError, match=f"{name} {message}"):
            read(tmp_path, name)


@pytest.mark.parametrize("state", ["absent", "pointer", "cut", "aria2", "a broken link"])
def test_a_file_that_holds_nothing_of_what_is_read_may_be_in_any_state(tmp_path: Path, state: str) -> None:
    write(tmp_path / "a.safetensors", table=ROWS)
    other = write(tmp_path / "b.safetensors", other=ROWS)
    write_index(tmp_path, table="a.safetensors", other="b.safetensors")
    if state == "absent":
        other.unlink()
    elif state == "pointer":
        other.write_text(POINTER)
    elif state == "cut":
        os.truncate(other, 100)
    elif state == "aria2":
        (tmp_path / "b.safetensors.aria2").touch()
    else:
        other.unlink()
        other.symlink_to("blobs/123")
    said = {
        "absent": "was not downloaded",
        "pointer": "Git LFS pointer.*git lfs pull",
        "cut": "truncated|cut short",
        "aria2": r"by aria2 has not finished: b\.safetensors\.aria2",
        "a broken link": "a link to blobs/123, which is not there",
    }
    assert read(tmp_path) == ROWS.tobytes()
    with pytest.raises(ConfigError, match=rf"other lies in b\.safetensors.*({said[state]})"):
        read(tmp_path, "other")


def test_hidden_files_are_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", table=ROWS)
    (tmp_path / "._a.safetensors").write_bytes(bytes.fromhex("0005160700020000") + bytes(100))
    (tmp_path / ".tmp.safetensors").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert read(tmp_path) == ROWS.tobytes()


@pytest.mark.parametrize("index_name", ["diffusion.safetensors.index.json", "model.fp16.safetensors.index.json"])
def test_an_index_of_another_name_counts_if_it_is_the_only_one(tmp_path: Path, index_name: str) -> None:
    write(tmp_path / "a.safetensors", table=ROWS)
    write(tmp_path / "b.safetensors", table=ROWS + 1)
    write_index(tmp_path, table="b.safetensors").rename(tmp_path / index_name)
    assert read(tmp_path) == (ROWS + 1).tobytes()


RANKS = {
    "DeepSeek": ["model0-mp2.safetensors", "model1-mp2.safetensors"],
    "Llama": ["consolidated.00.safetensors", "consolidated.01.safetensors"],
    "vLLM": ["model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"],
    "TensorRT-LLM": ["rank0.safetensors", "rank1.safetensors"],
    "Megatron": ["tp_rank_00.safetensors", "tp_rank_01.safetensors"],
    "DeepSpeed": ["mp_rank_00_model_states.safetensors", "mp_rank_01_model_states.safetensors"],
    "Megatron's folders": ["mp_rank_00/model.safetensors", "mp_rank_01/model.safetensors"],
}


@pytest.mark.parametrize("tool", RANKS)
def test_one_rank_s_part_is_never_taken_for_the_whole(tmp_path: Path, tool: str) -> None:
    for rank, name in enumerate(RANKS[tool]):
        write(tmp_path / name, table=ROWS[2 * rank : 2 * rank + 2])
    named = ", ".join(Path(name).parts[0] for name in RANKS[tool]).replace(".", r"\.")
    places = [tmp_path / name for name in RANKS[tool]] + ([] if "/" in RANKS[tool][0] else [tmp_path])
    for place in places:
        with pytest.raises(ConfigError, match=rf"split by rank \({named}\)") as refused:
            Checkpoint.open(place)
        assert "remove" not in str(refused.value)


def test_the_part_of_a_rank_whose_siblings_are_gone_is_still_a_part_and_rank_0_of_one_is_whole(tmp_path: Path) -> None:
    for name in ("model0-mp2.safetensors", "tp_rank_03.safetensors", "table-rank-0-of-4.safetensors"):
        with pytest.raises(ConfigError, match="split by rank"):
            Checkpoint.open(write(tmp_path / name.partition(".")[0] / name, table=ROWS[:2]))
    for name in ("model0-mp1.safetensors", "consolidated.00.safetensors", "frank2.safetensors", "rankings.safetensors"):
        assert read(write(tmp_path / name.partition(".")[0] / name, table=ROWS)) == ROWS.tobytes()


def test_a_torch_distributed_checkpoint_is_named_and_its_folder_asked_for(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ConfigError, match=r"\(DCP\) without \.metadata"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ConfigError, match=rf"\(DCP\), .* give the folder: {tmp_path}$"):
        Checkpoint.open(tmp_path / "__0_0.distcp")


def test_only_tensors_that_lie_whole_in_one_numbered_file_are_read(tmp_path: Path) -> None:
    first, second = (tmp_path / f"model-0000{part}-of-00002.safetensors" for part in (1, 2))
    write(first, table=ROWS[:2], mine=ROWS)
    with pytest.raises(ConfigError, match="no index says that it lies here whole"):
        read(first, "mine")
    write(second, table=ROWS[2:], yours=ROWS)
    assert read(first, "mine") == ROWS.tobytes()
    for name in ("table", "yours"):
        with pytest.raises(ConfigError, match=rf"{name} lies in model-00002-of-00002\.safetensors, one of 2 files"):
            read(first, name)
    second.unlink()
    write_index(tmp_path, table=first.name, yours=second.name)
    assert read(first) == ROWS[:2].tobytes(), "the index says that it is whole"
    with pytest.raises(ConfigError, match=r"yours lies in model-00002-of-00002\.safetensors.*give the folder"):
        read(first, "yours")


def test_the_scale_of_a_tensor_in_a_file_that_was_not_given_is_missed(tmp_path: Path) -> None:
    header = {"t.weight": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    first, second = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"
    first.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ConfigError, match=r"its scale may lie in a file that is not here: model-00002-of-00002"):
        plain_source(Checkpoint.open(tmp_path), "t.weight")
    safetensors.numpy.save_file({"t.weight_scale": np.ones(1, np.float32)}, second)
    with pytest.raises(ConfigError, match=r"t\.weight_scale, the scale of t\.weight, lies in model-00002-of-00002"):
        plain_source(Checkpoint.open(first), "t.weight")
    assert plain_source(Checkpoint.open(tmp_path), "t.weight").spec.codec == "fp8_e4m3*0x1.0000000000000p+0"


def cache(root: Path, *revisions: str, main: str = "") -> Path:
    for revision in revisions:
        write(root / "snapshots" / revision / "model.safetensors", table=ROWS)
    (root / "refs").mkdir(parents=True, exist_ok=True)
    if main:
        (root / "refs" / "main").write_text(main)
    return root


def test_a_repository_of_the_hub_s_cache_is_its_main_snapshot(tmp_path: Path) -> None:
    one = cache(tmp_path / "models--a--one", "111", "222", main="222")
    assert Checkpoint.open(one).path == one / "snapshots" / "222"
    assert Checkpoint.open(cache(tmp_path / "models--a--two", "333")).path.name == "333"
    for root in (cache(tmp_path / "models--a--three", "1", "2"), cache(tmp_path / "models--a--four", "1", main="9")):
        with pytest.raises(ConfigError, match=rf"give {root}/snapshots/REVISION"):
            Checkpoint.open(root)
    with pytest.raises(ConfigError, match=r"Hugging Face cache: give one .*models--a--four"):
        Checkpoint.open(tmp_path)


OTHER_FOLDERS = {
    "a.gguf, b.gguf": r"of GGUF files give one by its own name \(a\.gguf, b\.gguf\)",
    "pytorch_lora.pt": r"give one by its own name \(pytorch_lora\.pt\)",
    "model.safetensors.part": r"unfinished downloads \(model\.safetensors\.part\)",
    "text_encoder/model.safetensors": r"folders text_encoder do: give one",
    "notes.txt": r"give the folder of a checkpoint",
}


@pytest.mark.parametrize("name", OTHER_FOLDERS)
def test_a_folder_without_a_checkpoint_says_what_it_holds(tmp_path: Path, name: str) -> None:
    for each in name.split(", "):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=rf"holds no \*\.safetensors file; .*{OTHER_FOLDERS[name]}"):
        Checkpoint.open(tmp_path)


def test_a_path_whose_download_has_not_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.crdownload").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no checkpoint at .*: its download by Chrome has not finished"):
        Checkpoint.open(tmp_path / "m.safetensors")


def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", table=ROWS).rename(tmp_path / "table.bin")
    assert read(tmp_path / "table.bin") == ROWS.tobytes()
    (tmp_path / "m.safetensors").write_text(POINTER)
    with pytest.raises(ConfigError, match=r"m\.safetensors is a Git LFS pointer.*git lfs pull"):
        Checkpoint.open(tmp_path / "m.safetensors")
