"""Checkpoints: headers are believed only where the safetensors library believes them,
and bytes come from where it says."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_adapter.families import plain_source
from tierstore import ConfigError, FormatError, TableSpec
from tierstore.formats import table_source
from tierstore.formats.checkpoint import Checkpoint, Plane, PlaneReader, TableSource


def write_raw(path: Path, header: object, data: bytes = b"", header_bytes: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data)
    return path


def accepted_by_library(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            list(file.keys())
    except safetensors.SafetensorError:
        return False
    return True


def test_tensors_are_found_where_the_library_put_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.integers(0, 256, (7, 5), dtype=np.uint8),
        "b": rng.normal(size=(3, 4, 5)),
        "c": np.float32(3)[None],
    }
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].read_bytes() == tensor.tobytes()
        assert checkpoint.tensors[name].shape == tensor.shape


def entry(start: int, end: int, shape: list, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIES = {
    "not JSON": (b"{]", b""),
    "a list": ([], b""),
    "no header": (b"", b""),
    "data cut short": ({"a": entry(0, 10, [10])}, bytes(9)),
    "data too long": ({"a": entry(0, 10, [10])}, bytes(11)),
    "a gap": ({"a": entry(0, 4, [4]), "b": entry(6, 10, [4])}, bytes(10)),
    "an overlap": ({"a": entry(0, 6, [6]), "b": entry(4, 10, [6])}, bytes(10)),
    "shape and offsets differ": ({"a": entry(0, 10, [11])}, bytes(10)),
    "dtype and offsets differ": ({"a": entry(0, 10, [10], "F32")}, bytes(10)),
    "offsets backwards": ({"a": entry(10, 0, [10])}, bytes(10)),
    "negative size": ({"a": entry(0, 10, [-10])}, bytes(10)),
    "huge shape": ({"a": entry(0, 10, [2**62, 2**62])}, bytes(10)),
    "text for a number": ({"a": entry(0, "10", [10])}, bytes(10)),
    "no offsets": ({"a": {"dtype": "U8", "shape": [10]}}, bytes(10)),
    "no entry": ({"a": 5}, b""),
    "an entry that is a list": ({"a": [1]}, b""),
    "three offsets": ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2, 2]}}, bytes(2)),
    "offsets in a text": ({"a": {"dtype": "U8", "shape": [2], "data_offsets": "02"}}, bytes(2)),
    "true for a number": ({"a": entry(0, 2, [True, 2])}, bytes(2)),
    "a fraction for a number": (b'{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}', bytes(2)),
    "minus zero": (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}', bytes(2)),
    "a number of 5,000 digits": (b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,2]}}' % (b"9" * 5000), bytes(2)),
    "nested 100,000 deep": (b"[" * 100_000, b""),
    "an unknown dtype": ({"a": entry(0, 2, [2], "U9")}, bytes(2)),
    "a dtype in a list": ({"a": {"dtype": ["U8"], "shape": [2], "data_offsets": [0, 2]}}, bytes(2)),
    "half a byte": ({"a": entry(0, 2, [3], "F4")}, bytes(2)),
    "a name in Latin-1": (b'{"\xe9":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', bytes(2)),
    "half a surrogate pair": (b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', bytes(2)),
    "UTF-16": ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'.encode("utf-16"), bytes(2)),
    "no number for a number": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', bytes(2)),
    "NaN in the metadata": (b'{"__metadata__":{"x":NaN}}', b""),
    "a number in the metadata": ({"__metadata__": {"x": 5}}, b""),
    "metadata in a list": ({"__metadata__": ["x"]}, b""),
    "the same dtype twice": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', bytes(2)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_as_the_library_refuses_it(tmp_path: Path, lie: str) -> None:
    header, data = LIES[lie]
    path = write_raw(tmp_path / "m.safetensors", header, data)
    assert not accepted_by_library(path)
    with pytest.raises(FormatError, match=r"m\.safetensors"):
        Checkpoint.open(tmp_path)


# What the library lets pass, and we do not: it is never written, and each has led some reader astray.
SUSPECT = {
    "a tensor twice": b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
    b'"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}',
    "a key that nobody reads": b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"strides":[1]}}',
    "65 dimensions": json.dumps({"a": entry(0, 2, [2] + [1] * 64)}).encode(),
    "infinite, but empty": json.dumps({"a": entry(0, 0, [2**62, 2, 0]), "b": entry(0, 2, [2])}).encode(),
}


@pytest.mark.parametrize("suspect", SUSPECT)
def test_a_header_that_only_the_library_accepts_is_refused(tmp_path: Path, suspect: str) -> None:
    assert accepted_by_library(write_raw(tmp_path / "m.safetensors", SUSPECT[suspect], bytes(2)))
    with pytest.raises(FormatError, match=r"m\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("num_dimensions", [64, 65, 120_000])
def test_a_shape_of_many_huge_sizes_is_refused_at_once_and_not_printed_whole(
    tmp_path: Path, num_dimensions: int
) -> None:
    """Multiplied out, 120,000 sizes of 2^62 are a number of seven million bits: minutes, and then none that prints."""
    write_raw(tmp_path / "m.safetensors", {"a": entry(0, 16, [2**62] * num_dimensions)}, bytes(16))
    started = time.process_time()
    with pytest.raises(FormatError, match="tensor a") as refused:
        Checkpoint.open(tmp_path)
    assert time.process_time() - started < 5
    assert len(str(refused.value)) < 600


def test_dtypes_that_are_no_tables_do_not_stand_in_the_way(tmp_path: Path) -> None:
    header = {"__metadata__": None, "a": entry(0, 3, [2, 3], "F4"), "b": entry(3, 6, [4], "F6_E2M3")}
    assert accepted_by_library(write_raw(tmp_path / "m.safetensors", header, bytes(6)))
    assert set(Checkpoint.open(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize("header_bytes", [0, 1, 2**20, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path: Path, header_bytes: int) -> None:
    write_raw(tmp_path / "m.safetensors", {"a": entry(0, 10, [10])}, bytes(10), header_bytes)
    with pytest.raises(FormatError):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("num_bytes", range(0, 90, 7))
def test_a_truncated_file_is_refused(tmp_path: Path, num_bytes: int) -> None:
    path = write_raw(tmp_path / "m.safetensors", {"a": entry(0, 40, [40])}, bytes(40))
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(FormatError):
        Checkpoint.open(tmp_path)


offsets = st.integers(-1, 12)


@settings(max_examples=150, deadline=None)
@given(
    entries=st.dictionaries(
        st.text("ab", max_size=2),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "F16", "F32", "F4", "F8_E4M3FNUZ", "Q8"]),
                "shape": st.lists(st.integers(-1, 6), max_size=2),
                "data_offsets": st.lists(offsets, min_size=1, max_size=3),
            }
        ),
        max_size=3,
    ),
    num_bytes=st.integers(0, 12),
)
def test_what_the_library_refuses_we_refuse(
    tmp_path_factory: pytest.TempPathFactory, entries: dict, num_bytes: int
) -> None:
    path = write_raw(tmp_path_factory.mktemp("lie") / "m.safetensors", entries, bytes(num_bytes))
    try:
        Checkpoint.open(path)
        opened = True
    except FormatError:
        opened = False
    assert opened <= accepted_by_library(path)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.sampled_from(["uint8", "float16", "float32", "int64"]), st.integers(0, 9)), max_size=5)
)
def test_what_the_library_writes_we_accept(tmp_path_factory: pytest.TempPathFactory, sizes: list) -> None:
    path = tmp_path_factory.mktemp("true") / "m.safetensors"
    tensors = {f"t{i}": np.arange(n, dtype=dtype) for i, (dtype, n) in enumerate(sizes)}
    safetensors.numpy.save_file(tensors, path)
    found = Checkpoint.open(path).tensors
    assert {name: tensor.read_bytes() for name, tensor in found.items()} == {n: t.tobytes() for n, t in tensors.items()}


def test_an_index_names_the_files_and_missing_ones_are_named(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "m-1.safetensors")
    safetensors.numpy.save_file({"b": np.zeros(3, np.uint8)}, tmp_path / "m-2.safetensors")
    safetensors.numpy.save_file({"c": np.zeros(3, np.uint8)}, tmp_path / "other.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    assert set(Checkpoint.open(tmp_path).tensors) == {"a", "b"}
    (tmp_path / "m-2.safetensors").unlink()
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensor("a", ["U8"], 1).read_bytes() == bytes(3)
    with pytest.raises(ConfigError, match=r"tensor b lies in m-2\.safetensors.*was not downloaded"):
        checkpoint.tensor("b", ["U8"], 1)
    (tmp_path / "m-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"none of the 2 files .*m-1\.safetensors"):
        Checkpoint.open(tmp_path)
    safetensors.numpy.save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "m-1.safetensors")
    for damaged in ("{}", "[]", "no", json.dumps({"weight_map": {"a": "../m-1.safetensors"}})):
        index.write_text(damaged)
        with pytest.raises(FormatError, match="index"):
            Checkpoint.open(tmp_path)


def test_places_without_a_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint at"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    safetensors.numpy.save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"config\.json"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("m-1", "m-2"):
        safetensors.numpy.save_file({"a": np.zeros(3, np.uint8)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match="again in"):
        Checkpoint.open(tmp_path)


def test_a_tensor_of_another_kind_is_refused_with_both(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros((3, 2), np.uint8)}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensor("a", ["U8"], 2).shape == (3, 2)
    with pytest.raises(ConfigError, match=r"U8 \[3, 2\], expected F32 of 2"):
        checkpoint.tensor("a", ["F32"], 2)
    with pytest.raises(ConfigError, match="of 1 dim"):
        checkpoint.tensor("a", ["U8"], 1)
    with pytest.raises(ConfigError, match="b is missing"):
        checkpoint.tensor("b", ["U8"], 2)


@pytest.mark.parametrize("changed", ["value", "config", "name", "shape"])
def test_another_checkpoint_has_another_digest(tmp_path: Path, changed: str) -> None:
    def digest(folder: str, tensors: dict, config: dict) -> str:
        (tmp_path / folder).mkdir()
        safetensors.numpy.save_file(tensors, tmp_path / folder / "m.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        return Checkpoint.open(tmp_path / folder).digest()

    values = np.arange(1_000_000, dtype=np.float32)
    first = digest("one", {"a": values}, {"x": 1})
    assert digest("same", {"a": values}, {"x": 1}) == first
    other = {
        "value": ({"a": values + 1}, {"x": 1}),
        "config": ({"a": values}, {"x": 2}),
        "name": ({"b": values}, {"x": 1}),
        "shape": ({"a": values.reshape(1000, 1000)}, {"x": 1}),
    }[changed]
    assert digest("other", *other) != first


@pytest.mark.parametrize("container", ["dict", "tensor"])
def test_a_pt_file_is_read_at_its_own_bytes(tmp_path: Path, container: str) -> None:
    tensor = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    path = tmp_path / "table.pt"
    torch.save({"small": torch.ones(3), "table": tensor, "n": 5} if container == "dict" else tensor, path)
    found = Checkpoint.open(path).tensors["table"]
    assert (found.dtype, found.shape) == ("BF16", (50, 7))
    assert found.read_bytes() == tensor.view(torch.uint8).numpy().tobytes()


def _views() -> dict[str, tuple[torch.Tensor, str]]:
    """Tensors whose bytes in a file are not their values in row-major order, and what must be said of each."""
    table = torch.arange(12.0).reshape(4, 3)
    return {
        "negated": (torch._neg_view(table), r"negated view; save w\.resolve_neg\(\)"),
        "imaginary part": (torch.ones(4, 1, dtype=torch.complex64).conj().imag, r"save w\."),
        "transposed": (table.t(), r"not contiguous; save w\.contiguous\(\)"),
        "sparse": (table.to_sparse(), r"torch\.sparse_coo; save it dense"),
        "meta": (table.to("meta"), "device meta"),
        "complex": (table.to(torch.complex64), r"torch\.complex64; save"),
        "empty": (table[:0], "no row"),
    }


@pytest.mark.parametrize("kind", _views())
def test_a_pt_tensor_whose_bytes_are_not_its_rows_is_refused_by_name_and_the_others_are_read(
    tmp_path: Path, kind: str
) -> None:
    view, message = _views()[kind]
    torch.save({"good": torch.arange(12.0).reshape(3, 4), "view": view}, tmp_path / "t.pt")
    checkpoint = Checkpoint.open(tmp_path / "t.pt")
    assert set(checkpoint.tensors) == {"good"}
    assert checkpoint.tensors["good"].read_bytes() == np.arange(12, dtype=np.float32).tobytes()
    with pytest.raises(ConfigError, match=f"tensor view is .*{message}|tensor view is {message}"):
        checkpoint.tensor("view", ["F32"], 2)
    with pytest.raises(ConfigError, match=message):
        plain_source(checkpoint, "view")


@pytest.mark.parametrize("name", ["m.safetensors", "config.json", "model.safetensors.index.json", "t.pt"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    if name != "m.safetensors":
        safetensors.numpy.save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "m.safetensors")
    os.mkfifo(tmp_path / name)
    code = "import sys; from tierstore.formats.checkpoint import Checkpoint; Checkpoint.open(sys.argv[1])"
    place = tmp_path / name if name.endswith(".pt") else tmp_path
    done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, timeout=60)
    assert f"ConfigError: {tmp_path / name} is not a regular file" in done.stderr


@pytest.mark.parametrize("name", ["m.safetensors", "config.json", "t.pt"])
def test_a_file_that_may_not_be_read_is_named_with_its_remedy(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors.numpy.save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text("{}")
    torch.save(torch.zeros(3), tmp_path / "t.pt")
    real_open = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real_open(self, *arguments, **options)

    def refuse_stat(self: Path, **_: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "stat" if name == "t.pt" else "open", refuse_stat if name == "t.pt" else refuse)
    with pytest.raises(ConfigError, match=rf"cannot read .*{name}: Permission denied; make it readable"):
        Checkpoint.open(tmp_path / name if name == "t.pt" else tmp_path)


def test_names_that_are_no_utf_8_are_read_and_told_apart(tmp_path: Path) -> None:
    """Linux allows any bytes in a file's name but NUL and a slash."""
    digests = set()
    for name in (b"m-\xff.safetensors", b"m-\xfe.safetensors"):
        folder = tmp_path / os.fsdecode(b"model-" + name)
        folder.mkdir()
        safetensors.numpy.save_file({"a": np.arange(3, dtype=np.uint8)}, tmp_path / "m")
        (tmp_path / "m").rename(folder / os.fsdecode(name))
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.tensors["a"].read_bytes() == bytes([0, 1, 2])
        digests.add(checkpoint.to_dict()["digest"])
    assert len(digests) == 2
    torch.save(torch.arange(6.0).reshape(2, 3), tmp_path / "m.pt")
    (tmp_path / "m.pt").rename(tmp_path / os.fsdecode(b"m-\xff.pt"))
    ((name, tensor),) = Checkpoint.open(tmp_path / os.fsdecode(b"m-\xff.pt")).tensors.items()
    assert name == "m-\ufffd"
    assert tensor.read_bytes() == np.arange(6, dtype=np.float32).tobytes()


def test_a_pt_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(FormatError, match="weights_only"):
        Checkpoint.open(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(FormatError, match=r"noise\.pt"):
        Checkpoint.open(tmp_path / "noise.pt")


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_read_across_stacked_tensors_and_planes(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, 200, 3))
    weight, scale = rng.integers(0, 256, (200, 6), dtype=np.uint8), rng.integers(0, 256, (200, 2), dtype=np.uint8)
    parts = {f"w{i}": part for i, part in enumerate(np.split(weight, cuts)) if len(part)}
    safetensors.numpy.save_file(parts | {"s": scale}, tmp_path / "m.safetensors")
    tensors = Checkpoint.open(tmp_path).tensors
    planes = (Plane(6, tuple(tensors[name] for name in parts)), Plane(2, (tensors["s"],)))
    with PlaneReader(TableSource(TableSpec.plain("t", 200, 8, "raw", 8), planes)) as reader:
        for _ in range(30):
            start, end = sorted(rng.integers(0, 201, 2).tolist())
            first, second = reader.read(start, end)
            np.testing.assert_array_equal(first, weight[start:end])
            np.testing.assert_array_equal(second, scale[start:end])


def test_what_is_read_ahead_is_what_is_read_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"w0": np.zeros((30, 6), np.uint8), "w1": np.zeros((50, 6), np.uint8)}
    safetensors.numpy.save_file(parts | {"s": np.zeros((80, 2), np.uint8)}, tmp_path / "m.safetensors")
    tensors = Checkpoint.open(tmp_path).tensors
    planes = (Plane(6, (tensors["w0"], tensors["w1"])), Plane(2, (tensors["s"],)))
    ahead, read = [], []
    real = table_source.read_exactly

    def note_read(fd: int, out: np.ndarray, byte_start: int, what: str) -> None:
        read.append((byte_start, out.nbytes))
        real(fd, out, byte_start, what)

    monkeypatch.setattr(table_source, "read_exactly", note_read)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, num_bytes, __: ahead.append((start, num_bytes)))
    with PlaneReader(TableSource(TableSpec.plain("t", 80, 8, "raw", 8), planes)) as reader:
        for start, end in ((10, 60), (0, 80), (40, 40)):
            reader.will_read(start, end)
            reader.read(start, end)
        assert ahead == read
        assert len(ahead) == 6

        def refuse(*_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "posix_fadvise", refuse)
        reader.will_read(0, 80)


def test_a_source_whose_tensors_disagree_with_its_spec_is_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.zeros((20, 8), np.uint8)}, tmp_path / "m.safetensors")
    tensor = Checkpoint.open(tmp_path).tensors["w"]
    with pytest.raises(ConfigError, match="hold 20 rows of 8 bytes, the table has 21 rows"):
        TableSource(TableSpec.plain("t", 21, 8, "raw", 8), (Plane(8, (tensor,)),))
    with pytest.raises(ConfigError, match="8 bytes a row, its codec needs 9"):
        TableSource(TableSpec.plain("t", 20, 9, "raw", 9), (Plane(8, (tensor,)),))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.zeros((20, 8), np.uint8)}, tmp_path / "m.safetensors")
    source = TableSource(TableSpec.plain("t", 20, 8, "raw", 8), (Plane(8, (Checkpoint.open(tmp_path).tensors["w"],)),))
    with PlaneReader(source) as reader:
        with (tmp_path / "m.safetensors").open("r+b") as file:
            file.truncate(100)
        with pytest.raises(FormatError, match=r"ends .* bytes early"):
            reader.read(0, 20)
