"""Folders that torch.distributed.checkpoint writes from two ranks are read as torch reads them, or refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from support.repository import SUPPORT

import tierstore
from engram_adapter import build_checkpoint, open_checkpoint
from tierstore.errors import ConfigError, FormatError, TierStoreError
from tierstore.formats import distributed_checkpoint, pickle_checks, restricted_pickle
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.restricted_pickle import PickleError, Record

ROWS, DIM = 101, 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks' folders `dcp` and `shared`, and the whole state in table.pt."""
    folder = tmp_path_factory.mktemp("distributed")
    ranks = [sys.executable, str(SUPPORT / "distributed_ranks.py"), str(folder), "2", str(ROWS), str(DIM)]
    subprocess.run(ranks, check=True, timeout=240)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def state_of(saved: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(saved / "table.pt", weights_only=True)
    return state


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_tensors_are_those_that_torch_reads(saved: Path) -> None:
    checkpoint, state = Checkpoint.open(saved / "dcp"), state_of(saved)
    loaded: dict[str, Any] = {
        "model": {
            "embed.weight": torch.empty(ROWS, DIM, dtype=torch.bfloat16),
            "buffer": torch.empty(3, dtype=torch.int64),
        }
    }
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(loaded, checkpoint_id=saved / "dcp", no_dist=True)
    embed = checkpoint.tensors["model.embed.weight"]
    assert (embed.dtype, embed.shape, [piece.shape[0] for piece in embed.pieces]) == ("BF16", (ROWS, DIM), [51, 50])
    assert embed.read_bytes() == bytes_of(loaded["model"]["embed.weight"]) == bytes_of(state["bf16"])
    assert checkpoint.tensors["model.fp8.weight"].read_bytes() == bytes_of(state["fp8"])
    assert checkpoint.tensors["model.buffer"].read_bytes() == bytes_of(loaded["model"]["buffer"])
    assert checkpoint.tensors["optimizer.lr"].shape == ()
    assert checkpoint.full_name("embed.weight") == "model.embed.weight"
    assert "split by columns over ranks" in checkpoint.unusable["model.columns"]
    assert "step" not in checkpoint.names


@pytest.mark.parametrize(
    ("folder", "name"), [("dcp", "model.embed.weight"), ("dcp", "embed.weight"), ("shared", "embed.weight")]
)
def test_a_table_in_row_shards_becomes_a_store(saved: Path, tmp_path: Path, folder: str, name: str) -> None:
    build_checkpoint(saved / folder, tmp_path / "store", tensor=name)
    with tierstore.open(tmp_path / "store", dram="4MiB") as store:
        rows = store[name].rows(np.arange(ROWS))
    assert rows.tobytes() == bytes_of(state_of(saved)["bf16"])
    report = tierstore.verify(tmp_path / "store", source=open_checkpoint(saved / folder))
    assert (report.faults, report.rows_compared) == ([], ROWS)


def test_safetensors_of_ranks_are_put_together(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved / "shared")
    assert len(checkpoint.tensors["embed.weight"].pieces) == 2
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        "embed.weight": (ROWS, DIM), "whole": (ROWS, DIM), "odd": (3,),
    }  # fmt: skip
    first = sorted((saved / "shared").glob("*.safetensors"))[0]
    with pytest.raises(ConfigError, match=r"one rank's part of it; give the folder"):
        Checkpoint.open(first).tensor("embed.weight", ["BF16"], 2)


def test_consolidated_files_whose_tensors_are_not_aligned_are_read(saved: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    (tmp_path / "ranks").mkdir()
    (tmp_path / "one").mkdir()
    table = state_of(saved)["bf16"]
    info = '{"a": {"saved_offsets": [%d, 0]}, "b.weight": {"saved_offsets": [%d, 0]}}'
    for rank, (start, end) in enumerate([(0, 3), (3, 6)]):  # the header of the result ends at an odd byte, or a[] does
        tensors = {"a": table[start:end, :1].contiguous(), "b.weight": table[start:end].contiguous()}
        save_file(
            tensors, tmp_path / "ranks" / f"shard-{rank}.safetensors", {"DCP_SHARDING_INFO": info % (start, start)}
        )
    consolidate_safetensors_files(tmp_path / "ranks", tmp_path / "one", {"a": 1, "b.weight": 1})
    found = Checkpoint.open(tmp_path / "one").tensors["b.weight"]
    assert found.byte_start % 8 != 0
    assert found.read_bytes() == bytes_of(table[:6])
    assert Checkpoint.open(tmp_path / "ranks").tensors["b.weight"].read_bytes() == bytes_of(table[:6])


def test_a_rank_that_is_missing_is_named(copied: Path) -> None:
    (copied / "dcp" / "__1_0.distcp").unlink()
    checkpoint = Checkpoint.open(copied / "dcp")
    with pytest.raises(ConfigError, match=r"embed\.weight lies in __1_0\.distcp, which is not there: .*download it"):
        checkpoint.tensor("model.embed.weight", ["BF16"], 2)
    next(iter(sorted((copied / "shared").glob("shard-00001*")))).unlink()
    with pytest.raises(ConfigError, match=r"rows up to 0, then a part from row 51 on .* rank's file is missing"):
        Checkpoint.open(copied / "shared").tensor("embed.weight", ["BF16"], 2)


def test_a_folder_whose_save_did_not_finish_is_named(copied: Path) -> None:
    (copied / "dcp" / ".metadata").unlink()
    with pytest.raises(ConfigError, match=r"\(DCP\) without \.metadata, which the save writes last: it did not finish"):
        Checkpoint.open(copied / "dcp")
    with pytest.raises(ConfigError, match=r"one rank's file .*give the folder: .*/dcp"):
        Checkpoint.open(copied / "dcp" / "__0_0.distcp")


def changed_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    """Writes .metadata as torch would write a changed one."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def storage_of(metadata: Any, name: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def lose_a_chunk(metadata: Any) -> None:
    del metadata.state_dict_metadata["model.embed.weight"].chunks[0]


def lose_a_storage(metadata: Any) -> None:
    del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == "model.embed.weight")]


def point_elsewhere(metadata: Any) -> None:
    storage_of(metadata, "model.embed.weight").offset = storage_of(metadata, "model.columns").offset


def point_behind_the_end(metadata: Any) -> None:
    storage_of(metadata, "model.embed.weight").length = 1 << 40


def leave_the_folder(metadata: Any) -> None:
    storage_of(metadata, "model.embed.weight").relative_path = "../dcp/__0_0.distcp"


def transform(metadata: Any) -> None:
    storage_of(metadata, "model.embed.weight").transform_descriptors = ["zstd"]


def grow(metadata: Any) -> None:
    metadata.state_dict_metadata["model.embed.weight"].size = torch.Size([ROWS + 1, DIM])


CHANGES: list[tuple[Callable[[Any], None], str]] = [
    (lose_a_chunk, "rows up to 0, then a chunk from row 51 on: a rank's part is missing"),
    (lose_a_storage, "no storage for its chunk at .0, 0.: a rank's part is missing"),
    (point_elsewhere, r"bfloat16 \[51, 8\] .* in .metadata, and float16 \[101, 4\] in .*two saves"),
    (point_behind_the_end, "which has .* the file was cut short"),
    (leave_the_folder, "outside of the folder's files"),
    (transform, "stored through .'zstd'.; save it without transforms"),
    (grow, "has 101 of its 102 rows"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_metadata_that_disagrees_with_the_files_is_named(
    copied: Path, change: Callable[[Any], None], message: str
) -> None:
    changed_metadata(copied / "dcp", change)
    with pytest.raises((ConfigError, FormatError), match=message):
        Checkpoint.open(copied / "dcp").tensor("model.embed.weight", ["BF16"], 2)


class Evil:
    """Runs code when it is unpickled by pickle itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_no_code_of_a_metadata_runs(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed_metadata(copied / "dcp", lambda metadata: metadata.planner_data.update(evil=Evil()))
    with pytest.raises(FormatError, match=r"\.metadata: .* it names builtins\.print, which is none of this format's"):
        Checkpoint.open(copied / "dcp")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02", b"\x80\x02K\x07.", b"cos\nsystem\n(S'true'\ntR.", b"\x80\x02]q\x00h\x07."]
)
def test_what_is_no_metadata_is_named(copied: Path, data: bytes) -> None:
    (copied / "dcp" / ".metadata").write_bytes(data)
    with pytest.raises(FormatError, match=r"\.metadata: it is no metadata of torch\.distributed\.checkpoint"):
        Checkpoint.open(copied / "dcp")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\xff.",  # 64 GiB of memo
        b"Np4000000000\n.",
        b"\x80\x02N\x8e\xff\xff\xff\xff\xff\0\0\0.",  # bytes that would be there for a TiB
        b"\x80\x02\x82\x01.",  # a class that was registered by number
    ],
)
def test_what_a_pickle_claims_is_refused_before_memory_is_taken_for_it(data: bytes) -> None:
    with pytest.raises(PickleError, match=r"of its memo, where 1 things are|it is damaged \((it ends|opcode 0x82)"):
        restricted_pickle.load(data, {})


def test_a_pickle_with_more_things_than_free_places_of_memo_is_read() -> None:
    things: list[Any] = [str(number) for number in range(pickle_checks.MEMO_FREE + 1000)]
    assert restricted_pickle.load(pickle.dumps(things, protocol=2), {}) == things


def nested(levels: int) -> bytes:
    """Opcodes of a tuple of two that are the same tuple of two, and so on: 2^levels, if it were written out."""
    return b"K\x01K\x01\x86\x94" + b"".join(b"h" + bytes([level]) + b"\x86\x94" for level in range(levels))


HARD_KEYS = {
    "an item": b"}%sNs.",
    "items": b"}(K\x01N%sNu.",
    "a dict of its own": b"(%sNd.",
    "a set": b"\x8f(%s\x90.",
    "a frozen set": b"(%s\x91.",
    "a copy": b"}%s2s.",
    "a size": b"}ctorch\nSize\n%s\x85RNs.",
    "an argument": b"}crecords\nThing\n%s\x81Ns.",
    "popped and put": b"%sN0q\x7f0}h\x7fNs.",
}


@pytest.mark.parametrize("how", HARD_KEYS)
def test_keys_that_would_be_hashed_without_end_are_refused_at_once(how: str) -> None:
    pair = b"".join(b"2\x86" for _ in range(60))  # without a memo
    for tuples in (nested(60), b"N" + pair, b"N" + b"\x85" * 101, b"(" + b"N" * 1000 + b"t" + b"2\x862\x86" * 6):
        data = b"\x80\x04" + HARD_KEYS[how] % tuples
        with pytest.raises(
            PickleError, match=r"keys of tuples within tuples, \d+ deep, of \d+ values; at most 100 deep"
        ):
            restricted_pickle.load(data, {("torch", "Size"): restricted_pickle.size, ("records", "Thing"): Record})


def test_keys_that_are_tuples_and_nested_values_are_read_as_pickle_reads_them() -> None:
    path = ("model", "layers", (1, "embed"))
    values = {path: (path, [path, {("a", 1): ()}]), "b": frozenset({path, (1, 2)}), 3: {4, (5,)}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        names = {("builtins", name): each for name, each in (("set", set), ("frozenset", frozenset))}
        names |= {("__builtin__", name): each for (_, name), each in names.items()}
        assert restricted_pickle.load(pickle.dumps(values, protocol), names) == values
    assert restricted_pickle.load(b"\x80\x04" + nested(60) + b".", {}) is not None


@pytest.mark.parametrize("place", [b"g+0\n", b"h\x01", b"j\1\0\0\0"])
def test_a_place_of_the_memo_that_is_not_there_is_damage(place: bytes) -> None:
    with pytest.raises(PickleError, match="it is damaged"):
        restricted_pickle.load(b"\x80\x04N\x94" + place + b".", {})


def test_sizes_that_lie_within_themselves_are_named() -> None:
    sizes = restricted_pickle.load(b"\x80\x02)" + b"\x85" * 100_000 + b".", {})
    with pytest.raises(PickleError, match=r"\(.* are no sizes of a tensor"):
        distributed_checkpoint._sizes(sizes)


def test_a_persistent_id_is_refused_where_there_are_none() -> None:
    with pytest.raises(PickleError, match="outside of it"):
        restricted_pickle.load(b"\x80\x02K\x01Q.", {})


@pytest.mark.parametrize("how", ["transposed", "compressed", "big-endian"])
def test_a_chunk_whose_bytes_are_not_its_rows_is_named(copied: Path, how: str) -> None:
    path = copied / "dcp" / "__0_0.distcp"
    if how == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"x" * 200)
    else:
        value = (
            torch.zeros(DIM, 51, dtype=torch.bfloat16).t() if how == "transposed" else torch.zeros(51, DIM).bfloat16()
        )
        torch.save(value, path)
        if how == "big-endian":
            path.write_bytes(path.read_bytes().replace(b"little", b"bigger"))
    length = path.stat().st_size

    def point(metadata: Any) -> None:
        info = storage_of(metadata, "model.embed.weight")
        info.offset, info.length = 0, length

    changed_metadata(copied / "dcp", point)
    words = {"transposed": "it is not contiguous", "compressed": "is compressed", "big-endian": "archive|little"}[how]
    with pytest.raises(ConfigError, match=words):
        Checkpoint.open(copied / "dcp").tensor("model.embed.weight", ["BF16"], 2)


@pytest.mark.parametrize(
    "info",
    ["", "[]", "{", '{"w": 1}', '{"w": {"saved_offsets": [-1, 0]}}', '{"w": {"saved_offsets": [0.5, 0]}}', '{"w": {}}'],
)
def test_ranks_files_whose_offsets_cannot_be_read_are_named(tmp_path: Path, info: str) -> None:
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "a.safetensors", {"DCP_SHARDING_INFO": info})
    with pytest.raises(
        FormatError, match=r"a\.safetensors: .*(DCP_SHARDING_INFO cannot be read|saved_offsets of w are)"
    ):
        Checkpoint.open(tmp_path)


PARTS: list[tuple[list[tuple[list[int], torch.Tensor]], str]] = [
    ([([0, 0], torch.zeros(2, 2)), ([1, 0], torch.zeros(2, 2))], "rows up to 2, then a part from row 1"),
    ([([0, 0], torch.zeros(2, 2)), ([2, 0], torch.zeros(2, 2).half())], "they are of two saves"),
    ([([0, 0], torch.zeros(2, 2)), ([2, 0], torch.zeros(2, 3))], "split by columns"),
    ([([0, 0], torch.zeros(2, 2)), ([2], torch.zeros(2, 2))], "they are of two saves"),
    ([([0, 0], torch.zeros(2, 2)), ([3, 0], torch.zeros(2, 2))], "rows up to 2, then a part from row 3"),
]


@pytest.mark.parametrize(("parts", "message"), PARTS, ids=range(len(PARTS)))
def test_ranks_parts_that_do_not_make_up_rows_are_named(
    tmp_path: Path, parts: list[tuple[list[int], torch.Tensor]], message: str
) -> None:
    for rank, (offsets, part) in enumerate(parts):
        info = json.dumps({"w": {"saved_offsets": offsets}})
        save_file({"w": part}, tmp_path / f"shard-{rank}.safetensors", {"DCP_SHARDING_INFO": info})
    with pytest.raises(ConfigError, match=message):
        Checkpoint.open(tmp_path).tensor("w", ["F32"], 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_damage_is_named_or_harmless(copied: Path, saved: Path, seed: int) -> None:
    """5,000 inputs: bytes changed, cut or repeated in .metadata and in the archives' own records."""
    rng = np.random.default_rng(seed)
    wanted = bytes_of(state_of(saved)["bf16"])
    for _ in range(25):
        name = [".metadata", ".metadata", "__0_0.distcp"][rng.integers(3)]
        data = bytearray((saved / "dcp" / name).read_bytes())
        spans = [(0, len(data))] if name == ".metadata" else [(0, 690), (704 + 816, 2345)]  # not the values themselves
        start, end = spans[rng.integers(len(spans))]
        place = int(rng.integers(start, end))
        if (how := rng.integers(3)) == 0:
            data[place] = int(rng.integers(256))
        elif how == 1:
            del data[place:]
        else:
            data[place : place + 4] = int(rng.integers(2**32)).to_bytes(4, "little")
        (copied / "dcp" / name).write_bytes(data)
        try:
            found = Checkpoint.open(copied / "dcp").tensors.get("model.embed.weight")
            if found is not None and (found.dtype, found.shape) == ("BF16", (ROWS, DIM)):
                assert found.read_bytes() == wanted
        except TierStoreError:
            pass
        shutil.copy(saved / "dcp" / name, copied / "dcp" / name)
