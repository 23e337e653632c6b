"""`tierstore trace` keeps every token and every document's end of whatever it is given,
or says what is wrong with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner
from tokenizers import Tokenizer

from tierstore.errors import ConfigError, FormatError
from tierstore.formats.trace import read_token_documents, read_token_trace_info
from tierstore.tools.cli import cli, run
from tierstore.tools.corpus import train_tokenizer
from tierstore.tools.inputs import byte_streams
from tierstore.tools.inputs import ids as token_ids
from tierstore.tools.inputs import text as token_text
from tierstore.tools.trace import write_trace

SUFFIXES = {"int32": ".i32", "int64": ".i64", "uint16": ".u16", "uint32": ".u32"}


def documents_of(path: Path) -> list[list[int]]:
    return [document.tolist() for document in read_token_documents(path)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text in folders, with what is no text beside it."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "b").mkdir()
    (folder / "b" / "deep").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "a.txt").write_text("one two three\n" * 50)
    (folder / "b" / "deep" / "c.md").write_text("Äpfel, crème brûlée, 漢字\r\n\r\nthe end")
    (folder / "b" / "latin.txt").write_bytes("caf\xe9 and tea".encode("latin-1"))
    (folder / "z").write_text("no suffix")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\1")
    (folder / ".hidden" / "d.txt").write_text("not looked at")
    (folder / "b" / ".e.txt").write_text("not looked at")
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = train_tokenizer([texts / "a.txt", texts / "b" / "deep" / "c.md"], 400)
    tokenizer.enable_truncation(5)  # as some come
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(file))
    return file


def whole_text(tokenizer_file: Path, document: list[int]) -> str:
    return Tokenizer.from_file(str(tokenizer_file)).decode(document, skip_special_tokens=True)


def test_every_file_of_a_folder_is_a_document_in_sorted_order(
    texts: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    report = write_trace([texts], tmp_path / "t.trace", tokenizer=tokenizer_file, bos=0)
    documents = documents_of(tmp_path / "t.trace")
    assert [document[0] for document in documents] == [0] * 4
    assert [whole_text(tokenizer_file, document) for document in documents] == [
        (texts / "a.txt").read_text(),
        "no suffix",
        "caf\ufffd and tea",
        "Äpfel, crème brûlée, 漢字\r\n\r\nthe end",
    ]
    assert [(path.name, why) for path, why in report.left_out] == [
        ("empty.txt", "empty"),
        ("picture.png", "no text: it has zero bytes"),
    ]
    vocab_size = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    assert read_token_trace_info(tmp_path / "t.trace").vocab_size == vocab_size


def test_a_text_is_the_same_document_whatever_pieces_it_is_read_in(
    texts: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trace([texts / "a.txt", texts / "z"], tmp_path / "whole", tokenizer=tokenizer_file, bos=1)
    monkeypatch.setattr(token_text, "PIECE_CHARACTERS", 20)
    monkeypatch.setattr(token_text, "BATCH_CHARACTERS", 70)
    seen = []
    options = {"tokenizer": tokenizer_file, "bos": 1, "on_progress": lambda *done: seen.append(done)}
    write_trace([texts / "a.txt", texts / "z"], tmp_path / "pieces", **options)
    assert documents_of(tmp_path / "pieces") == documents_of(tmp_path / "whole")  # no token of theirs spans lines
    total = 700 + 9
    assert seen[-1] == (total, total)
    assert len(seen) > 5
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_text_in_memory_is_cut_as_its_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_text, "PIECE_CHARACTERS", 4)
    rng = np.random.default_rng(5)
    for _ in range(300):
        text = "".join(rng.choice(list("ab\r\n\u2028\U0001f600"), rng.integers(1, 30)))
        (tmp_path / "a.txt").write_text(text, newline="")
        of_file = [(part.text, *part[1:3]) for part in token_text.parts_of_file(tmp_path / "a.txt", "", 9)]
        assert [(part.text, *part[1:3]) for part in token_text.parts_of_document(text, 9)] == of_file


@pytest.mark.parametrize("dtype", SUFFIXES)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "zst"])
@pytest.mark.parametrize("by_name", [False, True], ids=["--dtype", "suffix"])
def test_raw_integers_come_back_with_the_ends_of_their_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, compressed: bool, by_name: bool
) -> None:
    monkeypatch.setattr(byte_streams, "READ_BYTES", 100)  # no multiple of 8
    monkeypatch.setattr(byte_streams, "COMPRESSED_READ_BYTES", 50)
    ids = np.random.default_rng(0).integers(0, 60_000, 1000).astype(dtype)
    lengths = np.array([1, 0, 400, 99, 500, 0])
    np.save(tmp_path / "lengths.npy", lengths)
    data = ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    if compressed:  # of several frames
        data = zstandard.compress(data[:1001]) + zstandard.compress(data[1001:])
    file = tmp_path / ("tokens" + (SUFFIXES[dtype] if by_name else ".bin") + (".zst" if compressed else ""))
    file.write_bytes(data)
    seen: list[tuple[int, int]] = []
    write_trace(
        [file],
        tmp_path / "t.trace",
        dtype=None if by_name else dtype,
        doclens=tmp_path / "lengths.npy",
        on_progress=lambda *done: seen.append(done),
    )
    expected = [part.tolist() for part in np.split(ids, np.cumsum(lengths)) if len(part)]
    assert documents_of(tmp_path / "t.trace") == expected
    assert seen[-1] == (len(data), len(data))
    write_trace([file, file], tmp_path / "two.trace", dtype=None if by_name else dtype)
    assert documents_of(tmp_path / "two.trace") == [ids.tolist()] * 2


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<i2", ">i4", "<u8"])
def test_arrays_come_back_a_document_each_or_one_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, order: str
) -> None:
    monkeypatch.setattr(token_ids, "PIECE_TOKENS", 20)
    array = np.random.default_rng(1).integers(0, 999, (11, 7)).astype(dtype, order=order)
    np.save(tmp_path / "rows.npy", array)
    np.save(tmp_path / "flat.npy", array.reshape(-1))
    np.save(tmp_path / "none.npy", array[:0])
    np.save(tmp_path / "wide.npy", array.reshape(1, -1))
    names = ["rows.npy", "flat.npy", "none.npy", "wide.npy"]
    write_trace([tmp_path / name for name in names], tmp_path / "t.trace", vocab_size=999)
    flat = array.reshape(-1).tolist()
    assert documents_of(tmp_path / "t.trace") == [*array.tolist(), flat, flat]


def test_text_and_ids_mix_in_the_order_given(texts: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([5, 6, 7]))
    inputs = [texts / "z", tmp_path / "ids.npy", texts / "z"]
    write_trace(inputs, tmp_path / "t.trace", tokenizer=tokenizer_file)
    first, second, third = documents_of(tmp_path / "t.trace")
    assert second == [5, 6, 7]
    assert first == third
    assert whole_text(tokenizer_file, first) == "no suffix"


@pytest.mark.parametrize("name", ["ids.npy", "rows.npy", "ids.i32", "ids.i32.zst"])
@pytest.mark.parametrize("bad", [-1, 100])
def test_an_id_outside_the_vocabulary_is_named_with_file_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bad: int
) -> None:
    monkeypatch.setattr(token_ids, "PIECE_TOKENS", 16)
    monkeypatch.setattr(byte_streams, "READ_BYTES", 64)
    ids = np.arange(60, dtype=np.int32)
    ids[37] = bad
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "rows.npy", ids.reshape(6, 10))
    (tmp_path / "ids.i32").write_bytes(ids.tobytes())
    (tmp_path / "ids.i32.zst").write_bytes(zstandard.compress(ids.tobytes()))
    with pytest.raises(ValueError, match=f"{name}: token 37 has id {bad}, the vocabulary has 100 ids"):
        write_trace([tmp_path / name], tmp_path / "t.trace", vocab_size=100)
    assert not (tmp_path / "t.trace").exists()
    assert not list(tmp_path.glob("*.new"))


def test_ids_are_held_against_the_tokenizer_where_there_is_one(tokenizer_file: Path, tmp_path: Path) -> None:
    vocab_size = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    np.save(tmp_path / "ids.npy", np.array([0, vocab_size]))
    with pytest.raises(ValueError, match=f"token 1 has id {vocab_size}, the vocabulary has {vocab_size} ids"):
        write_trace([tmp_path / "ids.npy"], tmp_path / "t.trace", tokenizer=tokenizer_file)
    write_trace([tmp_path / "ids.npy"], tmp_path / "t.trace", tokenizer=tokenizer_file, vocab_size=vocab_size + 1)


@pytest.fixture
def odd_files(tmp_path: Path) -> Path:
    good = zstandard.compress(np.arange(100_000, dtype=np.int32).tobytes())
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2), dtype=np.int32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "rows.npy", np.ones((2, 3), dtype=np.int32))
    np.save(tmp_path / "three.npy", np.array([1, 2]))
    np.save(tmp_path / "negative.npy", np.array([4, -1]))
    np.savez(tmp_path / "many.npz", np.ones(3))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    (tmp_path / "foreign.npy").write_bytes(b"not an array")
    (tmp_path / "void.npy").write_bytes(b"")
    (tmp_path / "odd.i32").write_bytes(bytes(10))
    (tmp_path / "four.i32").write_bytes(bytes(16))
    (tmp_path / "a.bin").write_bytes(bytes(8))
    (tmp_path / "a.npy.zst").write_bytes(good)
    (tmp_path / "cut.i32.zst").write_bytes(good[:-5])
    (tmp_path / "bad.i32.zst").write_bytes(b"no zstd")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "picture.png").write_bytes(b"PNG\0")
    (tmp_path / "nothing").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("floats.npy", ConfigError, r"is float64 \[3\], expected integers"),
        ("cube.npy", ConfigError, r"int32 \[2, 2, 2\]"),
        ("objects.npy", ConfigError, r"is object \[1\], expected integers"),
        ("many.npy", ConfigError, "is a NumPy archive"),
        ("foreign.npy", FormatError, "no NumPy array"),
        ("void.npy", FormatError, "no NumPy array"),
        ("odd.i32", ConfigError, "ends in 2 bytes that are no whole int32 of 4"),
        ("a.bin", ConfigError, "a.bin does not say which integers it holds; give --dtype"),
        ("a.zst", FileNotFoundError, "a.zst"),
        ("a.npy.zst", FormatError, "is no NumPy array, or cut"),
        ("cut.i32.zst", FormatError, "ends within a zstd frame"),
        ("bad.i32.zst", FormatError, "no zstd file"),
        ("a.txt", ConfigError, "is text; give --tokenizer"),
        ("picture.png", ConfigError, "is no text: it has zero bytes"),
        ("nothing", ConfigError, "folders without text or token ids"),
        ("pipe.txt", ConfigError, "is not a regular file"),
        ("none.txt", FileNotFoundError, "none.txt"),
        ("four.i32 bos=1", ConfigError, "--bos is for text"),
        ("a.txt tokenizer= bos=5000", ConfigError, "--bos 5000 is outside the vocabulary of"),
        ("a.txt tokenizer= doclens=three.npy", ConfigError, "--doclens is for one input of token ids"),
        ("four.i32 odd.i32 doclens=three.npy", ConfigError, "there are 2"),
        ("four.i32 doclens=three.npy", ConfigError, "has 4 tokens, its document lengths add up to 3"),
        ("four.i32 doclens=negative.npy", ConfigError, "numbers below 0"),
        ("four.i32 doclens=rows.npy", ConfigError, r"is \[2, 3\]"),
        ("rows.npy doclens=three.npy", ConfigError, "is 2-D, one document a row; leave --doclens out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_traced_is_named_with_its_remedy_and_leaves_nothing(
    odd_files: Path, tokenizer_file: Path, arguments: str, error: type[Exception], message: str
) -> None:
    options: dict = dict(word.split("=") for word in arguments.split() if "=" in word)
    if "doclens" in options:
        options["doclens"] = odd_files / options["doclens"]
    if "tokenizer" in options:
        options["tokenizer"] = tokenizer_file
    if "bos" in options:
        options["bos"] = int(options["bos"])
    inputs = [odd_files / word for word in arguments.split() if "=" not in word]
    with pytest.raises(error, match=message):
        write_trace(inputs, odd_files / "t.trace", **options)
    assert not list(odd_files.glob("t.trace*"))


def test_a_trace_in_the_folder_that_is_traced_is_not_taken_for_text(tokenizer_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    for left_out in (0, 1):
        report = write_trace([tmp_path], tmp_path / "t.trace", tokenizer=tokenizer_file)
        assert (report.info.num_documents, len(report.left_out)) == (1, left_out)


def test_the_command_says_what_it_wrote_and_what_it_left_out(texts: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.trace"
    arguments = ["trace", str(texts), "-o", str(output), "--tokenizer", str(tokenizer_file), "--bos", "0"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    info = read_token_trace_info(output)
    said = re.search(
        r"t.trace: ([0-9,]+) tokens of 4 documents in 4 files, .*\(.* bytes a token\), [0-9,]+ tokens/s", result.stdout
    )
    assert said
    assert int(said[1].replace(",", "")) == info.num_tokens
    assert "left out: 2 files (1 empty, 1 no text: it has zero bytes), the first " in result.stdout
    assert "tracing: 100 %" in result.stderr


def test_the_command_gives_one_line_of_error_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", np.array([7, -3]))
    assert run(["trace", str(tmp_path / "ids.npy"), "-o", str(tmp_path / "t.trace")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: .*ids.npy: token 1 has id -3, .*\n", captured.err)


def test_names_that_are_no_utf_8_are_traced(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"ids-\xff.npy")
    np.save(file, np.array([1, 2]))
    command = [sys.executable, "-m", "tierstore.tools.cli", "trace", str(file), "-o", os.fsdecode(b"t-\xfe.trace")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert documents_of(tmp_path / os.fsdecode(b"t-\xfe.trace")) == [[1, 2]]


def test_a_recorded_trace_keeps_every_token_and_document(shared_data: Path, tmp_path: Path) -> None:
    lengths = shared_data / "trace_test_doclens.npy"
    options = {"doclens": lengths, "vocab_size": 129280}
    report = write_trace([shared_data / "trace_test.i32.zst"], tmp_path / "t.trace", **options)
    documents = list(read_token_documents(tmp_path / "t.trace"))
    assert [len(document) for document in documents] == np.load(lengths).tolist()
    with (shared_data / "trace_test.i32.zst").open("rb") as file:
        ids = np.frombuffer(zstandard.ZstdDecompressor().stream_reader(file).read(), dtype="<i4")
    np.testing.assert_array_equal(np.concatenate(documents), ids)
    assert report.trace_bytes < 2 * len(ids)


class PanicException(BaseException):
    """Stands in for pyo3's, which is a BaseException that no `except Exception` catches."""


class PanickingTokenizer:
    """Stands in for a tokenizer on which the library panics."""

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def get_vocab(self, **_: object) -> dict[str, int]:
        return {"a": 0}

    def encode_batch_fast(self, *_: object, **__: object) -> None:
        raise PanicException("no entry found for key")


def test_a_text_that_the_tokenizer_panics_on_is_an_error_and_leaves_no_file(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tierstore.tools.trace.load_tokenizer", lambda _: PanickingTokenizer())
    assert run(["trace", str(texts), "-o", str(tmp_path / "t.trace"), "--tokenizer", "tokenizer.json"]) == 1
    assert "gave up (no entry found for key)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<i4", ">i8", "<u2"])
def test_arrays_of_any_layout_are_read_in_parts_as_numpy_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Any, dtype: str
) -> None:
    monkeypatch.setattr(token_ids, "PIECE_TOKENS", 7)
    array = np.arange(60).reshape(12, 5).astype(dtype, order=order)
    np.save(tmp_path / "rows.npy", array)
    write_trace([tmp_path / "rows.npy"], tmp_path / "t.trace")
    assert documents_of(tmp_path / "t.trace") == array.tolist()


# A file that is mapped and then cut ends the process that reads it by SIGBUS: so in a process of its own.
CUT = """
import os, sys
from tierstore.errors import FormatError
from tierstore.tools.inputs import ids as token_ids
from tierstore.tools.cli import run
check = token_ids.check_token_ids
def cut_and_check(*arguments):
    os.truncate(sys.argv[1], 4096)
    check(*arguments)
token_ids.check_token_ids = cut_and_check
sys.exit(run(["trace", sys.argv[1], "-o", sys.argv[1] + ".trace"]))
"""


def test_an_array_that_is_cut_while_it_is_read_is_an_error_and_no_signal(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.ones(3 << 20, dtype=np.int32))
    done = subprocess.run([sys.executable, "-c", CUT, tmp_path / "ids.npy"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "copy it again" in done.stderr) == (1, True), done
    assert [file.name for file in tmp_path.iterdir()] == ["ids.npy"]
