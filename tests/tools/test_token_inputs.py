"""Token ids are read from what a file holds; what somebody packed is refused by its name and never taken for ids."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner
from tokenizers import Tokenizer

from tierstore.errors import ConfigError, FormatError, TierStoreError
from tierstore.formats.trace import read_token_documents
from tierstore.tools.cli import cli
from tierstore.tools.corpus import train_tokenizer
from tierstore.tools.inputs import byte_streams, json_lines
from tierstore.tools.inputs import ids as token_ids
from tierstore.tools.trace import TraceReport, write_trace

IDS = np.random.default_rng(0).integers(0, 60_000, 5000).astype("<u2")
TEXTS = ["one two three\n", "Äpfel, 漢字\r\nand more", "", "the last"]
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".zst": zstandard.compress,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def documents_of(path: Path) -> list[list[int]]:
    return [document.tolist() for document in read_token_documents(path)]


def traced(inputs: Path | list[Path], **options: Any) -> list[list[int]]:
    """The documents of a trace of the inputs, which is written beside the first."""
    inputs = inputs if isinstance(inputs, list) else [inputs]
    output = inputs[0].with_name("written.trace")
    write_trace(inputs, output, **options)
    documents = documents_of(output)
    output.unlink()
    return documents


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(" ".join(TEXTS) * 20)
    train_tokenizer([folder / "text.txt"], 400).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def ids_of_texts(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    """What the tokenizer makes of each text that is not empty."""
    loaded = Tokenizer.from_file(str(tokenizer))
    return [loaded.encode(text, add_special_tokens=False).ids for text in texts if text]


# What is packed


def with_offsets(items: list[bytes], between: bytes = b"") -> bytes:
    """A litdata chunk; with a JSON object of columns between table and items a Mosaic shard."""
    ends = np.cumsum([0, *map(len, items)]) + 8 + 4 * len(items) + len(between)
    return struct.pack(f"<{len(items) + 2}I", len(items), *ends) + between + b"".join(items)


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, IDS.tobytes())
    return out.getvalue()


def megatron_index(lengths: list[int], documents: list[int], code: int = 8, item_bytes: int = 2) -> bytes:
    starts = np.cumsum([0, *lengths])
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    offsets = (starts[:-1] * item_bytes).astype("<i8")
    return head + np.array(lengths, "<i4").tobytes() + offsets.tobytes() + np.array(documents, "<i8").tobytes()


def llmc(ids: np.ndarray, magic: int = 20240520, num_tokens: int | None = None) -> bytes:
    head = [magic, 1, len(ids) if num_tokens is None else num_tokens, *[0] * 253]
    return np.array(head, dtype="<i4").tobytes() + ids.tobytes()


PARTS = [IDS[start : start + 500].tobytes() for start in range(0, 5000, 500)]
COLUMNS = json.dumps({"column_names": ["tokens"], "format": "mds"}).encode()
PACKED = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 2206408\n",
    "web page": b"<!DOCTYPE html>\n<html><body>404: not here</body></html>\n",
    "GGUF": b"GGUF" + struct.pack("<IQQ", 3, 2, 5) + IDS.tobytes(),
    "safetensors": struct.pack("<Q", 64) + b'{"a": {"dtype": "U16"}}'.ljust(64) + IDS.tobytes(),
    "PyTorch": zipped("archive/data.pkl"),
    "zip archive": zipped("corpus/train.bin"),
    "NumPy archive": zipped("ids.npy"),
    "HDF5": b"\x89HDF\r\n\x1a\n" + IDS.tobytes(),
    "lz4": b"\x04\x22\x4d\x18" + IDS.tobytes(),
    "Megatron index": megatron_index([5, 6], [0, 1, 2]),
    "litdata chunk": with_offsets(PARTS),
    "Mosaic shard": with_offsets(PARTS, COLUMNS),
    "model file of llm.c": llmc(IDS, magic=20240326),
    "evaluations": llmc(IDS, magic=20240522),
    "trace or profile of tierstore": b"TIERCOLS" + IDS.tobytes(),
}
# In a folder these are the data, or stand for it: a trace without them would be of another corpus.
FETCHED_OR_PACKED = {
    "Git LFS pointer", "lz4", "Megatron index", "litdata chunk", "Mosaic shard", "evaluations",
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [None, "uint16", "int32"])
@pytest.mark.parametrize("suffix", [".bin", ".txt", ".u16"])
def test_what_is_packed_is_refused_by_its_name_whatever_it_is_called(
    tmp_path: Path, tokenizer: Path, name: str, dtype: str | None, suffix: str
) -> None:
    file = tmp_path / f"train{suffix}"
    file.write_bytes(PACKED[name])
    with pytest.raises(TierStoreError, match=f"{file.name} is .*{name}.*; "):
        write_trace([file], tmp_path / "t.trace", dtype=dtype, tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name", sorted(set(PACKED) - {"evaluations", "trace or profile of tierstore"}))
@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_what_is_packed_is_refused_also_if_it_is_compressed(tmp_path: Path, name: str, suffix: str) -> None:
    file = tmp_path / f"train.u16{suffix}"
    file.write_bytes(COMPRESSORS[suffix](PACKED[name]))
    with pytest.raises(TierStoreError, match=f"data that holds .*{name}.*; decompress it first"):
        write_trace([file], tmp_path / "t.trace")
    assert not (tmp_path / "t.trace").exists()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [None, "uint16"])
def test_in_a_folder_packed_data_is_refused_and_what_holds_none_is_left_out(
    tmp_path: Path, tokenizer: Path, name: str, dtype: str | None
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "packed.bin").write_bytes(PACKED[name])
    (folder / "tokens.u16").write_bytes(IDS.tobytes())
    options: dict[str, Any] = {"dtype": dtype, "tokenizer": tokenizer, "vocab_size": 60_000}
    if name in FETCHED_OR_PACKED:
        with pytest.raises(TierStoreError, match=r"packed\.bin is "):
            write_trace([folder], tmp_path / "t.trace", **options)
    else:
        report = write_trace([folder], tmp_path / "t.trace", **options)
        assert [path.name for path, _ in report.left_out] == ["packed.bin"]
        assert name in report.left_out[0].why
        assert documents_of(tmp_path / "t.trace") == [IDS.tolist()]


def test_a_random_stream_of_ids_is_nothing_but_ids(tmp_path: Path) -> None:
    """Recognition must not take real streams for files of a format: 200 streams whose first ids are small,
    as tokens are."""
    rng = np.random.default_rng(1)
    file = tmp_path / "train.bin"
    for dtype, high in (("uint16", 50_257), ("int32", 200), ("uint16", 1000), ("int32", 129_280)) * 50:
        ids = rng.integers(0, high, 2000).astype(dtype)
        file.write_bytes(ids.tobytes())
        assert traced(file, dtype=dtype) == [ids.tolist()]


def test_a_remedy_can_be_run_as_it_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "it's mine.pt"
    file.write_bytes(PACKED["PyTorch"])
    with pytest.raises(ConfigError) as refused:
        write_trace([file], tmp_path / "t.trace")
    printed = str(refused.value).partition("save its ids as .npy: ")[2]
    assert printed == f"numpy.save('ids.npy', torch.load({str(file)!r}).numpy())"


# Text that is called ids, and the reverse


def test_text_is_never_taken_for_ids(tmp_path: Path, tokenizer: Path) -> None:
    text = "for each in range(10):\n    print(each)\n" * 5
    for name in ("train.bin", "train.u16"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=r"is text, not uint16 ids; name it \.txt"):
            write_trace([tmp_path / name], tmp_path / "t.trace", dtype="uint16", tokenizer=tokenizer)
    (tmp_path / "notes.txt").write_text(text)
    (tmp_path / "ids.i32").write_bytes(np.arange(9, dtype="<i4").tobytes())
    documents = traced([tmp_path / "notes.txt", tmp_path / "ids.i32"], dtype="int32", tokenizer=tokenizer)
    assert documents == [*ids_of_texts(tokenizer, [text]), list(range(9))]


def test_text_in_a_folder_of_ids_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "README.md").write_text("# A corpus of token ids\n" * 4)
    (folder / "train.bin").write_bytes(IDS.tobytes())
    report = write_trace([folder], tmp_path / "t.trace", dtype="uint16")
    assert [(path.name, why) for path, why in report.left_out] == [("README.md", "text, while --dtype asks for ids")]
    assert documents_of(tmp_path / "t.trace") == [IDS.tolist()]


def test_text_in_utf_16_is_named(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("a text of Windows", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"is text in UTF-16; convert it first: iconv"):
        write_trace([tmp_path / "a.txt"], tmp_path / "t.trace", tokenizer=tokenizer)


def test_a_web_page_that_is_called_one_is_text(tmp_path: Path, tokenizer: Path) -> None:
    page = "<!DOCTYPE html><html><body>the one</body></html>"
    (tmp_path / "page.html").write_text(page)
    assert traced(tmp_path / "page.html", tokenizer=tokenizer) == ids_of_texts(tokenizer, [page])


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"one two")
    assert traced(tmp_path / "a.txt", tokenizer=tokenizer) == ids_of_texts(tokenizer, ["one two"])


# Compression


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_text_lines_and_ids_are_what_they_were(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(byte_streams, "COMPRESSED_READ_BYTES", 37)
    text = "".join(f"line {number} of the text, {number * 7919}\n" for number in range(400))
    lines = "".join(json.dumps({"text": each}) + "\n" for each in TEXTS)
    for name, data in (("a.txt", text.encode()), ("a.jsonl", lines.encode()), ("a.u16", IDS.tobytes())):
        (tmp_path / name).write_bytes(data)
        half = len(data) // 2  # two members, which every one of these formats allows
        compressed = COMPRESSORS[suffix](data[:half]) + COMPRESSORS[suffix](data[half:])
        (tmp_path / (name + suffix)).write_bytes(compressed)
        seen: list[tuple[int, int]] = []
        found = traced(
            tmp_path / (name + suffix),
            tokenizer=tokenizer,
            vocab_size=60_000,
            on_progress=lambda *at, seen=seen: seen.append(at),
        )
        assert found == traced(tmp_path / name, tokenizer=tokenizer, vocab_size=60_000)
        assert seen[-1] == (len(compressed), len(compressed))
        for cut in (len(compressed) - 1, len(compressed) - 9):
            (tmp_path / (name + suffix)).write_bytes(compressed[:cut])
            with pytest.raises(FormatError, match=r"was cut short|damaged"):
                traced(tmp_path / (name + suffix), tokenizer=tokenizer, vocab_size=60_000)


def long_window(window_log: int) -> bytes:
    """Ids as `zstd --long` compresses them from a pipe: the frame states its whole window."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window_log, enable_ldm=True, write_content_size=False
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(IDS.tobytes()) + compressor.flush()


def test_a_long_window_is_read_as_far_as_memory_goes_and_else_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ids.u16.zst"
    file.write_bytes(long_window(28))
    assert traced(file) == [IDS.tolist()]
    monkeypatch.setattr(byte_streams, "available_memory", lambda: (1 << 20, "machine"))
    with pytest.raises(ConfigError, match=r"a window of 256.00 MiB, and 128.00 MiB can be taken .* without --long"):
        traced(file)
    file.write_bytes(long_window(27))
    assert traced(file) == [IDS.tolist()]


def test_a_dictionary_is_named_and_no_damage(tmp_path: Path) -> None:
    samples = [IDS[start : start + 40].tobytes() for start in range(0, 4000, 8)]
    trained = zstandard.train_dictionary(2000, samples)
    (tmp_path / "ids.u16.zst").write_bytes(zstandard.ZstdCompressor(dict_data=trained).compress(IDS.tobytes()))
    with pytest.raises(ConfigError, match=f"compressed with a dictionary, number {trained.dict_id()}"):
        traced(tmp_path / "ids.u16.zst")


def test_skippable_frames_are_skipped(tmp_path: Path) -> None:
    """Seekable files end in one, and parallel compressors begin with one."""
    skipped = struct.pack("<II", 0x184D2A50, 8) + b"whatever"
    (tmp_path / "ids.u16.zst").write_bytes(skipped + zstandard.compress(IDS.tobytes()) + skipped)
    assert traced(tmp_path / "ids.u16.zst") == [IDS.tolist()]


# JSON lines


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.ndjson", "part-0000"])
@pytest.mark.parametrize("padding", [0, 5000], ids=["short", "long"])  # the first line is longer than what is looked at
def test_a_line_of_json_is_a_document(tmp_path: Path, tokenizer: Path, name: str, padding: int) -> None:
    texts = ["the one " * (1 + padding // 8), *TEXTS]
    lines = write_lines(tmp_path / name, [{"meta": {"n": 1}, "text": text} for text in texts])
    assert traced(lines, tokenizer=tokenizer) == ids_of_texts(tokenizer, texts)
    loaded = [[0, *ids] for ids in ids_of_texts(tokenizer, texts)]
    assert traced(lines, tokenizer=tokenizer, bos=0) == loaded


@pytest.mark.parametrize("field", ["input_ids", "tokens", None])
def test_lines_of_ids_need_no_tokenizer(tmp_path: Path, field: str | None) -> None:
    documents = [[5, 6, 7], [8], [], list(range(3000))]
    lines = [ids if field is None else {field: ids, "attention_mask": [1] * len(ids)} for ids in documents]
    assert traced(write_lines(tmp_path / "c.jsonl", lines)) == [ids for ids in documents if ids]


def test_the_field_is_chosen_by_name_and_by_what_it_holds(tmp_path: Path, tokenizer: Path) -> None:
    lines = write_lines(
        tmp_path / "c.jsonl", [{"text": text, "body": "one", "input_ids": [1, 2]} for text in ["a", "b"]]
    )
    assert traced(lines, tokenizer=tokenizer) == ids_of_texts(tokenizer, ["a", "b"])
    assert traced(lines, tokenizer=tokenizer, field="body") == ids_of_texts(tokenizer, ["one", "one"])
    assert traced(lines, field="input_ids") == [[1, 2], [1, 2]]
    with pytest.raises(ConfigError, match="is text; give --tokenizer"):
        traced(lines)
    with pytest.raises(
        ConfigError, match=r"no text or token ids in a field prompt; it has: text, body, input_ids.*--field"
    ):
        traced(lines, field="prompt")


def test_one_line_that_is_called_json_lines_is_one_document(tmp_path: Path) -> None:
    assert traced(write_lines(tmp_path / "c.jsonl", [{"input_ids": [1, 2]}])) == [[1, 2]]
    assert traced(write_lines(tmp_path / "c.json", [{"input_ids": [1, 2]}]), field="input_ids") == [[1, 2]]
    with pytest.raises(ConfigError, match=r"is a JSON file; write it as JSON lines"):
        traced(write_lines(tmp_path / "c.json", [{"input_ids": [1, 2]}]))


def test_json_that_is_no_lines_is_refused_by_name_and_left_out_of_folders(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "corpus").mkdir()
    file = tmp_path / "corpus" / "alpaca.json"
    file.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=2))
    with pytest.raises(ConfigError, match=r"alpaca\.json is a JSON file; write it as JSON lines"):
        write_trace([file], tmp_path / "t.trace", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"folders without text or token ids; .*alpaca\.json is a JSON file"):
        write_trace([tmp_path / "corpus"], tmp_path / "t.trace", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input_ids": [1, 2', r"line 3 is not JSON .* cut"),
        ('{"other": [1]}', "line 3 has no field input_ids"),
        ('{"input_ids": "one"}', "line 3: its field input_ids is 'one', expected a list of integers"),
        ('{"input_ids": [1, 2.5]}', "line 3: its field input_ids is .* expected a list of integers"),
        ('{"input_ids": [true]}', "line 3: .* expected a list of integers"),
        ('{"input_ids": null}', "line 3: .* is 'None'"),
        ('{"input_ids": [99999999999999999999]}', "line 3: .* beyond 64 bits"),
        ("[1, 2]", "line 3 has no field"),
    ],
)
def test_a_line_that_is_unlike_the_first_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    lines = write_lines(tmp_path / "c.jsonl", [{"input_ids": [1]}, "", line])
    with pytest.raises(ConfigError, match=rf"c\.jsonl: {message}"):
        traced(lines)
    assert not (tmp_path / "written.trace").exists()


def test_ids_of_lines_are_held_against_the_vocabulary(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "c.jsonl", [{"input_ids": [1, 2]}, {"input_ids": [3, 7, -1]}])
    with pytest.raises(ValueError, match=r"c\.jsonl: line 2: token 1 has id 7, the vocabulary has 5 ids"):
        traced(lines, vocab_size=5)


def test_a_line_without_end_is_refused_before_memory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = write_lines(tmp_path / "c.jsonl", [{"input_ids": [1]}, {"input_ids": [2] * 500}])
    monkeypatch.setattr(json_lines, "LINE_BYTES_MAX", 1000)
    with pytest.raises(ConfigError, match="line 2 is longer than 1000 bytes"):
        traced(lines)


# Token files with a head or an index


@pytest.mark.parametrize(("magic", "dtype"), [(20240520, "<u2"), (20240801, "<u4")])
def test_token_files_of_llm_c_are_read_without_their_head(tmp_path: Path, magic: int, dtype: str) -> None:
    file = tmp_path / "fineweb_train_000001.bin"
    file.write_bytes(llmc(IDS.astype(dtype), magic))
    assert traced(file) == [IDS.tolist()]
    assert traced(file, dtype=np.dtype(dtype).name, eos=int(IDS[9]))[0] == IDS[:10].tolist()
    with pytest.raises(ConfigError, match=r"by its header, --dtype says int64; leave --dtype out"):
        traced(file, dtype="int64")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(FormatError, match=r"says 5000 tokens, which is \d+ bytes; it has \d+: it was cut"):
        traced(file)


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_a_megatron_pair_is_read_with_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, dtype: str
) -> None:
    monkeypatch.setattr(byte_streams, "READ_BYTES", 100)
    folder = tmp_path / "corpus"
    folder.mkdir()
    lengths, documents = [100, 40, 0, 260], [0, 2, 2, 3, 4]  # of two sequences, of none, of one that is empty, of one
    ids = IDS[:400].astype(dtype)
    (folder / "text.bin").write_bytes(ids.tobytes())
    (folder / "text.idx").write_bytes(megatron_index(lengths, documents, code, ids.itemsize))
    expected = [ids[:140].tolist(), ids[140:].tolist()]
    for given in (folder, folder / "text.bin"):
        report = write_trace([given], tmp_path / "t.trace")
        assert documents_of(tmp_path / "t.trace") == expected
        assert (report.num_inputs, report.left_out) == (1, [])
    assert traced(folder / "text.bin", eos=int(ids[50]))[0] == ids[:51].tolist()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (megatron_index([100, 300], [0, 1, 2])[:-1], "it was cut"),
        (megatron_index([100, 300], [0, 1, 2])[:20], "it was cut"),
        (megatron_index([100, 200], [0, 1, 2]), r"text\.bin has 800 bytes, its index text\.idx says 600"),
        (megatron_index([100, 300], [0, 1, 2], item_bytes=4), "do not lie one behind the other"),
        (megatron_index([100, 300], [0, 1]), "do not take up its 2 sequences"),
        (megatron_index([100, 300], [0, 2, 1, 2]), "do not take up its 2 sequences"),
        (megatron_index([100, 300], [0, 1, 2], code=77), "type code 77"),
        (megatron_index([100, 300], [0, 1, 2], code=7), "holds float32 by its index"),
        (b"TNTIDX\0\0" + bytes(100), r"old format \(TNTIDX\)"),
    ],
)
def test_an_index_that_does_not_fit_its_stream_is_named(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / "text.bin").write_bytes(IDS[:400].tobytes())
    (tmp_path / "text.idx").write_bytes(index)
    with pytest.raises(TierStoreError, match=message):
        traced(tmp_path / "text.bin", dtype="uint16")


def test_an_index_by_itself_names_the_stream_that_it_belongs_to(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "text.idx").write_bytes(megatron_index([100], [0, 1]))
    for given in (folder, folder / "text.idx"):
        with pytest.raises(ConfigError, match=r"text\.idx is a Megatron index.*; give the \.bin file"):
            write_trace([given], tmp_path / "t.trace", dtype="uint16")


def test_an_array_that_was_cut_is_named_before_it_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    (tmp_path / "ids.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:-2])
    with pytest.raises(FormatError, match=r"has 9998 bytes of values, its head says 10000: it was cut"):
        traced(tmp_path / "ids.npy")


def test_arrays_of_other_things_are_left_out_of_folders_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    np.save(folder / "embeddings.npy", np.ones((3, 4)))
    np.save(folder / "objects.npy", np.array([{}], dtype=object))
    np.save(folder / "z.npy", IDS)
    report = write_trace([folder], tmp_path / "t.trace")
    assert [(path.name, why.split(",")[0]) for path, why in report.left_out] == [
        ("embeddings.npy", "float64 [3"),
        ("objects.npy", "object [1]"),
    ]
    assert documents_of(tmp_path / "t.trace") == [IDS.tolist()]


# Documents


def test_eos_ends_documents_and_belongs_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_streams, "READ_BYTES", 10)  # ends fall on the ends of pieces too
    ids = np.array([9, 1, 2, 9, 9, 3, 4, 5, 6, 9, 7, 8], dtype="<u2")
    (tmp_path / "train.bin").write_bytes(ids.tobytes())
    documents = [[9], [1, 2, 9], [9], [3, 4, 5, 6, 9], [7, 8]]
    assert traced(tmp_path / "train.bin", dtype="uint16", eos=9) == documents
    np.save(tmp_path / "rows.npy", ids.reshape(2, 6))
    assert traced(tmp_path / "rows.npy", eos=9) == [[9], [1, 2, 9], [9], [3], [4, 5, 6, 9], [7, 8]]
    assert traced(tmp_path / "train.bin", dtype="uint16", eos=77) == [ids.tolist()]


def test_an_eos_that_never_comes_is_said(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(IDS.tobytes())
    arguments = ["trace", str(tmp_path / "train.bin"), "--dtype", "uint16", "-o", str(tmp_path / "t.trace")]
    shown = CliRunner().invoke(cli, [*arguments, "--eos", "64000"])
    assert shown.exit_code == 0, shown.output
    assert "note: --eos 64000 is none of the tokens" in shown.stdout
    assert "note" not in CliRunner().invoke(cli, [*arguments, "--eos", str(IDS[3])]).stdout


def test_options_that_contradict_each_other_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "ids.u16").write_bytes(IDS.tobytes())
    np.save(tmp_path / "lengths.npy", np.array([5000]))
    with pytest.raises(ConfigError, match="--eos is for token ids"):
        traced(tmp_path / "a.txt", tokenizer=tokenizer, eos=1)
    with pytest.raises(ConfigError, match="give one of them"):
        traced(tmp_path / "ids.u16", doclens=tmp_path / "lengths.npy", eos=1)
    with pytest.raises(ConfigError, match="--eos 70000 is outside the vocabulary of 60000"):
        traced(tmp_path / "ids.u16", vocab_size=60_000, eos=70_000)
    lines = write_lines(tmp_path / "c.jsonl", [{"input_ids": [1]}] * 2)
    with pytest.raises(ConfigError, match="says itself where its documents end"):
        traced(lines, doclens=tmp_path / "lengths.npy")


def test_lengths_in_the_folder_are_no_input(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "ids.u16").write_bytes(IDS.tobytes())
    np.save(folder / "lengths.npy", np.array([2000, 3000]))
    write_trace([folder], tmp_path / "t.trace", doclens=folder / "lengths.npy")
    assert [len(ids) for ids in documents_of(tmp_path / "t.trace")] == [2000, 3000]


# Folders


def test_a_download_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.u16").write_bytes(IDS.tobytes())
    (folder / "train.u16.aria2").write_bytes(b"\0\1")
    for given in (folder, folder / "train.u16"):
        with pytest.raises(ConfigError, match=r"train\.u16.*aria2.*finish the download"):
            write_trace([given], tmp_path / "t.trace")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_streams, "READ_BYTES", 1000)
    file = tmp_path / "ids.u16"
    file.write_bytes(IDS.tobytes())

    def write_more(done: int, _total: int) -> None:
        if done == 2000:
            with file.open("ab") as opened:
                opened.write(b"\1\0")

    with pytest.raises(ConfigError, match=r"ids\.u16 was changed while it was read"):
        write_trace([file], tmp_path / "t.trace", on_progress=write_more)
    assert not (tmp_path / "t.trace").exists()


# What is told


def test_json_says_what_was_written_and_what_was_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.u16").write_bytes(IDS.tobytes())
    (folder / "empty.txt").write_bytes(b"")
    arguments = ["trace", str(folder), "-o", str(tmp_path / "t.trace"), "--json", "--eos", str(IDS[7])]
    shown = CliRunner().invoke(cli, arguments)
    record = json.loads(shown.stdout)
    assert record.pop("seconds") > 0
    assert record == {
        "trace": str(tmp_path / "t.trace"),
        "tokens": 5000,
        "documents": len(documents_of(tmp_path / "t.trace")),
        "vocab_size": None,
        "token_id_max": int(IDS.max()),
        "source": "tierstore trace",
        "inputs": 1,
        "left_out": [{"path": str(folder / "empty.txt"), "why": "empty"}],
        "bytes": (tmp_path / "t.trace").stat().st_size,
        "eos_found": IDS.tolist().count(IDS[7]),
    }
    assert isinstance(write_trace([folder], tmp_path / "t.trace"), TraceReport)


def test_pieces_are_as_small_as_they_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ids, "PIECE_TOKENS", 64)
    np.save(tmp_path / "ids.npy", IDS)
    seen: list[int] = []
    write_trace([tmp_path / "ids.npy"], tmp_path / "t.trace", on_progress=lambda done, _: seen.append(done))
    assert max(np.diff(seen)) == 128
    assert documents_of(tmp_path / "t.trace") == [IDS.tolist()]
