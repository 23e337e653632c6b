"""PyTorch files: the bytes that are read are the tensors' values, or the file is refused by what is wrong with it."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_adapter.families import plain_source
from tierstore import ConfigError, FormatError
from tierstore.formats.checkpoint import Checkpoint

BYTES = torch.randint(0, 256, (100, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def rewritten(path: Path, change: Callable[[str, bytes], bytes] = lambda _name, data: data, how: int = 0) -> Path:
    """The same archive, its records changed or stored in another way."""
    other = path.with_name("other.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", how) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return other


@pytest.mark.parametrize(
    "how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["deflate", "bzip2", "lzma"]
)
def test_an_archive_whose_records_are_compressed_is_refused_as_such(tmp_path: Path, how: int) -> None:
    torch.save({"table": BYTES}, tmp_path / "t.pt")
    with pytest.raises(FormatError, match=r"record .* is compressed"):
        Checkpoint.open(rewritten(tmp_path / "t.pt", how=how))


def test_an_archive_that_a_zip_tool_stored_again_is_read_where_its_records_lie_now(tmp_path: Path) -> None:
    torch.save({"first": BYTES + 1, "table": BYTES}, tmp_path / "t.pt")
    other = rewritten(tmp_path / "t.pt")
    for path in (tmp_path / "t.pt", other):
        assert Checkpoint.open(path).tensors["table"].read_bytes() == BYTES.numpy().tobytes()


def test_an_archive_that_a_zip_tool_made_anew_with_its_folder_first_is_still_one_of_torch(tmp_path: Path) -> None:
    torch.save({"table": BYTES}, tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as old, zipfile.ZipFile(tmp_path / "zipped.pt", "w") as new:
        new.writestr("t/", b"")
        for record in sorted(old.infolist(), key=lambda record: record.filename):
            new.writestr(record.filename, old.read(record))
    assert Checkpoint.open(tmp_path / "zipped.pt").tensors["table"].read_bytes() == BYTES.numpy().tobytes()


def test_an_archive_of_another_byte_order_is_refused_as_such(tmp_path: Path) -> None:
    torch.save({"table": torch.arange(6.0).reshape(2, 3)}, tmp_path / "t.pt")
    other = rewritten(tmp_path / "t.pt", lambda name, data: b"big" if name.endswith("/byteorder") else data)
    with pytest.raises(FormatError, match="b'big'-endian"):
        Checkpoint.open(other)


@pytest.mark.parametrize("num_bytes", [100, 5000, -1, -30])
def test_an_archive_that_was_cut_is_refused(tmp_path: Path, num_bytes: int) -> None:
    torch.save({"table": BYTES}, tmp_path / "t.pt")
    (tmp_path / "t.pt").write_bytes((tmp_path / "t.pt").read_bytes()[:num_bytes])
    with pytest.raises(FormatError, match=r"t\.pt: it is not a whole zip archive"):
        Checkpoint.open(tmp_path / "t.pt")


def test_a_record_that_is_shorter_than_its_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"table": BYTES, "more": BYTES.clone()}, tmp_path / "t.pt")
    other = rewritten(tmp_path / "t.pt", lambda name, data: data[:50] if name.endswith("/data/0") else data)
    with pytest.raises(FormatError, match=r"other\.pt"):
        Checkpoint.open(other)


SMALL = ["uint16", "uint32", "uint64", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2"]


@pytest.mark.parametrize("dtype", SMALL)
def test_a_table_of_a_small_type_is_the_same_as_from_safetensors(tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import save_file

    tensors = {"table": BYTES.view(getattr(torch, dtype))}
    save_file(tensors, tmp_path / "t.safetensors")
    torch.save(tensors, tmp_path / "t.pt")
    one, other = (plain_source(Checkpoint.open(tmp_path / f"t{suffix}"), "table") for suffix in (".safetensors", ".pt"))
    assert one.spec == other.spec
    assert one.tensors[0].read_bytes() == other.tensors[0].read_bytes() == BYTES.numpy().tobytes()


def test_tensors_in_inner_dicts_are_found_by_either_name(tmp_path: Path) -> None:
    torch.save(
        {"checkpoint": {"state_dict": {"embed.weight": BYTES}}, "epoch": 3, "lr": torch.ones(1)}, tmp_path / "t.pt"
    )
    checkpoint = Checkpoint.open(tmp_path / "t.pt")
    for name in ("embed.weight", "state_dict.embed.weight", "checkpoint.state_dict.embed.weight"):
        source = plain_source(checkpoint, name)
        assert source.spec.name == name
        assert source.tensors[0].read_bytes() == BYTES.numpy().tobytes()


def test_a_name_that_several_inner_dicts_have_is_refused_with_all(tmp_path: Path) -> None:
    torch.save({"model": {"embed.weight": BYTES}, "ema": {"embed.weight": BYTES.clone()}}, tmp_path / "t.pt")
    checkpoint = Checkpoint.open(tmp_path / "t.pt")
    with pytest.raises(ConfigError, match=r"2 times: model\.embed\.weight, ema\.embed\.weight"):
        plain_source(checkpoint, "embed.weight")
    assert plain_source(checkpoint, "ema.embed.weight").spec.num_rows == 100


def test_other_objects_beside_the_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": BYTES}, "args": argparse.Namespace(lr=1)}, tmp_path / "t.pt")
    with pytest.raises(FormatError, match=r"holds objects of argparse\.Namespace.*save its tensors alone"):
        Checkpoint.open(tmp_path / "t.pt")


def test_what_is_no_archive_of_torch_is_named_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"a": np.zeros(50), "b": [1, 2]}))
    torch.save({"a": BYTES}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("model/config.json", "{}")
    for name, message in {
        "bare": "bare Python pickle",
        "old": "format before 1.6",
        "zip": "a zip archive without",
    }.items():
        with pytest.raises((FormatError, ConfigError), match=rf"{name}\.pt is .*{message}"):
            Checkpoint.open(tmp_path / f"{name}.pt")


def test_sharded_pytorch_files_are_read_by_their_index(tmp_path: Path) -> None:
    import json

    torch.save({"a": BYTES}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": BYTES + 1}, tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save({"lr": argparse.Namespace()}, tmp_path / "training_args.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint.open(tmp_path).tensors["b"].read_bytes() == (BYTES + 1).numpy().tobytes()
