"""GGUF files that llama.cpp's own package writes: the tensors that it reads back, and damage by its name."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.marks import slow_but

import tierstore
from engram_adapter import RowIdEmbedding, build_checkpoint
from tierstore.codec import GGUF_BLOCKS
from tierstore.errors import ConfigError, FormatError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.tensor_files import read_tensor_file

gguf = pytest.importorskip("gguf", reason="requirements.txt installs it")
KINDS = gguf.GGMLQuantizationType
ROWS, DIM = 37, 512


def random_blocks(kind: Any, rows: int = ROWS, dim: int = DIM) -> np.ndarray:
    """Rows of a type in blocks, as bytes; float16s among them are finite."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(int(kind)).integers(0, 256, (rows, dim // block, block_bytes), dtype=np.uint8)
    blocks[..., 1] &= 0x3B
    blocks[..., 3] &= 0x3B
    return blocks.reshape(rows, -1)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Any]], alignment: int | None = None) -> Path:
    """Writes tensors with metadata of every kind, as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("a model")
    writer.add_token_list(["<s>", "", "é" * 100, *map(str, range(500))])
    writer.add_token_scores([0.5] * 503)
    writer.add_bool("llama.flag", True)
    writer.add_uint8("llama.small", 3)
    writer.add_float64("llama.double", 0.25)
    writer.add_array("llama.nested", [[1, 2], [3]])
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain(seed: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("alignment", [None, 64, 8])
def test_tensors_lie_where_the_library_reads_them(tmp_path: Path, alignment: int | None) -> None:
    tensors: dict[str, tuple[np.ndarray, Any]] = {
        "token_embd.weight": (random_blocks(KINDS.Q4_0), KINDS.Q4_0),
        "norm.weight": (plain(1, (7,)), None),
        "half": (plain(2, (5, 6), np.float16), None),
        "experts": (plain(3, (2, 3, 4)), None),
        "ids": (np.arange(9, dtype=np.int32).reshape(3, 3), None),
    }
    path = write(tmp_path / "model.gguf", tensors, alignment)
    ours = {tensor.name: tensor for tensor in read_tensor_file(path).tensors}
    for theirs in gguf.GGUFReader(path).tensors:
        tensor = ours.pop(theirs.name)
        assert tensor.shape == tuple(reversed(theirs.shape.tolist()))
        assert (tensor.byte_start, tensor.num_bytes) == (theirs.data_offset, theirs.n_bytes)
        assert tensor.read_bytes() == theirs.data.tobytes()
        assert tensor.dtype.removeprefix("GGUF_") == theirs.tensor_type.name
    assert not ours


@pytest.mark.parametrize("codec", GGUF_BLOCKS)
def test_a_table_of_each_type_is_built_with_the_librarys_values(tmp_path: Path, codec: str) -> None:
    kind = KINDS[codec.removeprefix("gguf_").upper()]
    blocks = random_blocks(kind)
    path = write(tmp_path / "model.gguf", {"a": (plain(1, (3, 3)), None), "token_embd.weight": (blocks, kind)})
    build_checkpoint(path, tmp_path / "store", tensor="token_embd.weight")
    with tierstore.open(tmp_path / "store", dram="4MiB") as store:
        spec = store["token_embd.weight"].spec
        assert (spec.codec, spec.num_rows, spec.dim) == (codec, ROWS, DIM)
        values = RowIdEmbedding(store, "token_embd.weight")(torch.arange(ROWS))
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).bfloat16()
    assert torch.equal(values, expected)


def test_a_table_of_floats_is_built_as_it_is(tmp_path: Path) -> None:
    rows = plain(4, (ROWS, 20), np.float16)
    write(tmp_path / "model.gguf", {"embed": (rows, None)})
    build_checkpoint(tmp_path, tmp_path / "store", tensor="embed")  # the folder's one GGUF file
    with tierstore.open(tmp_path / "store", dram="4MiB") as store:
        assert store["embed"].spec.codec == "fp16"
        assert store["embed"].rows(np.arange(ROWS)).tobytes() == rows.tobytes()


def test_a_numbered_set_is_read_whole_or_refused_by_what_is_missing(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2))
    write(first, {"a": (plain(1, (3, 4)), None)})
    with pytest.raises(ConfigError, match=r"is one of 2 files, m-00002-of-00002\.gguf are not there"):
        Checkpoint.open(first)
    write(second, {"b": (plain(2, (3, 4)), None)})
    for path in (first, second, tmp_path):
        assert set(Checkpoint.open(path).tensors) == {"a", "b"}


def test_types_that_no_codec_reads_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"embed": (random_blocks(KINDS.Q6_K), KINDS.Q6_K), "b": (plain(1, (3, 4)), None)})
    with pytest.raises(ConfigError, match=r"'embed' holds blocks of Q6_K, which no codec .*quantize it as Q8_0, Q4_0"):
        build_checkpoint(path, tmp_path / "store", tensor="embed")
    data = path.read_bytes()
    kind = data.index(b"embed") + 5 + 4 + 16
    assert struct.unpack_from("<I", data, kind) == (KINDS.Q6_K,)
    path.write_bytes(data[:kind] + struct.pack("<I", 99) + data[kind + 4 :])
    found = read_tensor_file(path)
    assert "is of type 99 of a GGUF file, which this version does not know" in found.unusable["embed"]
    assert [tensor.name for tensor in found.tensors] == ["b"]


SMALL = {"embed": (random_blocks(KINDS.Q8_0, 4, 32), KINDS.Q8_0), "b": (plain(1, (3, 4)), None)}
ALTERED = {
    r"of version 1, expected 2 or 3": (4, "<I", 1),
    r"of version 4, expected 2 or 3": (4, "<I", 4),
    r"of big-endian numbers": (4, ">I", 3),
    r"1099511627776 tensors, at most": (8, "<Q", 1 << 40),
    r"1000000 tensors in the .* bytes from": (8, "<Q", 10**6),
    r"18446744073709551615 metadata in the": (16, "<Q", 2**64 - 1),
    r"a header of .* bytes and more in a file of": (24, "<Q", 2**63),
}


@pytest.mark.parametrize("message", ALTERED)
def test_a_number_that_lies_is_refused(tmp_path: Path, message: str) -> None:
    path = write(tmp_path / "m.gguf", SMALL)
    at, form, value = ALTERED[message]
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=rf"m\.gguf: a GGUF file .*{message}"):
        read_tensor_file(path)


def altered(path: Path, before: bytes, after: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))
    return path


def test_tensors_that_cannot_lie_so_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, SMALL, alignment=64)
    info = b"general.alignment" + struct.pack("<II", 4, 64)
    with pytest.raises(FormatError, match=r"general\.alignment 48 of type 4, a power of two"):
        read_tensor_file(altered(path, info, info[:-4] + struct.pack("<I", 48)))
    embed = struct.pack("<Q", 5) + b"embed" + struct.pack("<IQQI", 2, 32, 4, KINDS.Q8_0)
    for after, message in (
        (embed.replace(struct.pack("<IQQ", 2, 32, 4), struct.pack("<IQQ", 2, 48, 4)), "of 48 columns, Q8_0 has blocks"),
        (embed.replace(struct.pack("<IQQ", 2, 32, 4), struct.pack("<IQQ", 2, 32, 3)), "the one before it ends at"),
        (embed.replace(struct.pack("<IQQ", 2, 32, 4), struct.pack("<IQQ", 5, 32, 4)), "of 5 sizes, at most 4"),
        (embed.replace(b"embed", b"\xff\xff\xff\xff\xff"), "a tensor's name is not UTF-8"),
    ):
        with pytest.raises(FormatError, match=message):
            read_tensor_file(altered(write(path, SMALL), embed, after))
    twice = {"b": (plain(1, (3, 4)), None), "c": (plain(1, (3, 4)), None)}
    name = struct.pack("<Q", 1)
    with pytest.raises(FormatError, match="a tensor's name twice"):
        read_tensor_file(altered(write(path, twice), name + b"c", name + b"b"))
    write(path, SMALL).write_bytes(path.read_bytes() + bytes(1000))
    with pytest.raises(FormatError, match="bytes, its header says"):
        read_tensor_file(path)


def test_a_file_that_was_cut_anywhere_is_refused(tmp_path: Path, small_file: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(small_file)
    used = max(tensor.byte_start + tensor.num_bytes for tensor in read_tensor_file(tmp_path / "m.gguf").tensors)
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, used, 37), used - 1]:
        cut.write_bytes(small_file[:length])
        with pytest.raises(FormatError, match=r"cut\.gguf"):
            read_tensor_file(cut)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("small") / "m.gguf", SMALL).read_bytes()


def damaged(whole: bytes, chance: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(200)
        data[at] = chance.choice([0, 255, data[at] ^ 1 << chance.randrange(8), chance.randrange(256)])
    if chance.random() < 0.2:
        at = chance.randrange(len(data))
        data[at:at] = chance.randbytes(chance.randrange(1, 40))
    return bytes(data)


@pytest.mark.parametrize("hundred", slow_but(range(3), range(100)))
def test_damage_is_refused_or_harmless(tmp_path: Path, small_file: bytes, hundred: int) -> None:
    """What is still read lies within the file, and nothing but the two kinds of error comes out."""
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        path, data = tmp_path / f"{seed}.gguf", damaged(small_file, random.Random(seed))
        path.write_bytes(data)
        try:
            tensors = read_tensor_file(path).tensors
        except (FormatError, ConfigError) as error:
            named, tensors = str(error), []
        else:
            named = str(path)
        assert str(path) in named
        for tensor in tensors:
            assert 0 <= tensor.byte_start <= tensor.byte_start + tensor.num_bytes <= len(data)
            assert len(tensor.read_bytes()) == tensor.num_bytes
