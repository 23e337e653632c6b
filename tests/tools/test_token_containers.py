"""The same documents are the same trace, byte for byte, whatever container people keep them in."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstandard
from support.held import open_files
from support.token_files import archive_of, litdata_folder, megatron_pair, mosaic_array, mosaic_folder
from tokenizers import Tokenizer

from tierstore.errors import BudgetError, ConfigError, FormatError
from tierstore.formats.trace import read_token_documents
from tierstore.tools.corpus import train_tokenizer
from tierstore.tools.inputs import chat, spool, unfolding
from tierstore.tools.inputs.columns import ColumnReader
from tierstore.tools.inputs.fields import Field, NoField
from tierstore.tools.inputs.ids import Piece
from tierstore.tools.inputs.processes import WorkerProcess
from tierstore.tools.inputs.spool import Spool
from tierstore.tools.trace import write_trace

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

DOCUMENTS = [
    np.random.default_rng(number).integers(0, 60_000, length).astype(np.int32)
    for number, length in enumerate([5, 1, 300, 0, 77, 2048, 3, 40, 0, 1000])
]
FULL = [document for document in DOCUMENTS if len(document)]
TEXTS = ["one two three", "Äpfel, 漢字\r\nand more", "", "the last \U0001f600"]


def trace_of(inputs: list[Path], **options: Any) -> bytes:
    output = inputs[0].with_name("written.trace")
    write_trace(inputs, output, **options)
    data = output.read_bytes()
    output.unlink()
    return data


def expected_trace(folder: Path, documents: list[np.ndarray] = DOCUMENTS, times: int = 1) -> bytes:
    """The trace of documents as raw ids and their lengths."""
    (folder / "plain.i32").write_bytes(b"".join(document.tobytes() for document in documents * times))
    np.save(folder / "lengths.npy", [len(document) for document in documents * times])
    return trace_of([folder / "plain.i32"], doclens=folder / "lengths.npy")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(" ".join(TEXTS) * 20)
    train_tokenizer([folder / "text.txt"], 400).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def columns() -> Iterator[ColumnReader]:
    with ColumnReader() as reader:
        yield reader


def table_of(kind: Any, documents: list[Any] | None = None, **others: list[Any]) -> Any:
    rows = [document.tolist() for document in DOCUMENTS] if documents is None else documents
    return pyarrow.table({"input_ids": pyarrow.array(rows, type=kind), **others})


# Columns


def test_every_file_of_columns_gives_the_same_trace(tmp_path: Path) -> None:
    files = []
    for name, kind, size in (
        ("a", pyarrow.list_(pyarrow.int32()), 3),
        ("b", pyarrow.large_list(pyarrow.int64()), 100),
        ("c", pyarrow.list_(pyarrow.uint16()), 1),
        ("d", pyarrow.list_(pyarrow.dictionary(pyarrow.int32(), pyarrow.int32())), 4),
    ):
        table = table_of(kind, number=list(range(len(DOCUMENTS))))
        files += [tmp_path / f"{name}.parquet", tmp_path / f"{name}.arrows", tmp_path / f"{name}.feather"]
        parquet.write_table(
            table, files[-3], row_group_size=size, compression=["zstd", "snappy", "none", "gzip"][size % 4]
        )
        with pyarrow.ipc.new_stream(files[-2], table.schema) as stream:
            stream.write_table(table, max_chunksize=size)
        options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
        with pyarrow.ipc.new_file(files[-1], table.schema, options=options) as file:
            file.write_table(table, max_chunksize=size)
    assert trace_of(files) == expected_trace(tmp_path, times=len(files))


def test_lists_of_one_length_are_rows_too(tmp_path: Path) -> None:
    rows = [document[:4].tolist() for document in DOCUMENTS if len(document) >= 4]
    table = table_of(pyarrow.list_(pyarrow.int32(), 4), rows)
    parquet.write_table(table, tmp_path / "fixed.parquet")
    with pyarrow.ipc.new_file(tmp_path / "fixed.arrow", table.schema) as file:
        file.write_table(table.slice(2))
    expected = [np.array(row, dtype=np.int32) for row in [*rows, *rows[2:]]]
    assert trace_of([tmp_path / "fixed.parquet", tmp_path / "fixed.arrow"]) == expected_trace(tmp_path, expected)


def test_columns_of_text_are_what_lines_of_text_are(tmp_path: Path, tokenizer: Path) -> None:
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
    files = [tmp_path / f"{number}.parquet" for number in range(len(kinds))]
    for file, kind in zip(files, kinds, strict=True):
        parquet.write_table(pyarrow.table({"n": [1, 2, 3, 4], "text": pyarrow.array(TEXTS).cast(kind)}), file)
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * len(kinds)))
    assert trace_of(files, tokenizer=tokenizer, bos=3) == trace_of([lines], tokenizer=tokenizer, bos=3)


def write_column(path: Path, values: Any, name: str = "input_ids") -> Path:
    parquet.write_table(pyarrow.table({name: values}), path)
    return path


def read_all(columns: ColumnReader, path: Path, vocab_size: int | None = None) -> list[Piece]:
    field = columns.field_of(path, "parquet", None)
    assert isinstance(field, Field)
    return list(columns.id_pieces(path, "parquet", field, vocab_size))


def test_a_row_that_is_no_document_is_named(tmp_path: Path, columns: ColumnReader) -> None:
    file = write_column(tmp_path / "a.parquet", [[1, 2], [3, None, 4]])
    with pytest.raises(ConfigError, match=r"a\.parquet: row 1 has null at place 1, expected token ids; .*--field"):
        read_all(columns, file)
    file = write_column(tmp_path / "b.parquet", [[1, 2], [], None])
    with pytest.raises(ConfigError, match=r"b\.parquet: row 2 is null, expected a document"):
        read_all(columns, file)
    file = write_column(tmp_path / "c.parquet", [[1, 2], [], [3, 70, 4]])
    with pytest.raises(ValueError, match=r"c\.parquet, row 2: token 1 has id 70, the vocabulary has 50 ids"):
        read_all(columns, file, vocab_size=50)
    assert [piece.token_ids.tolist() for piece in read_all(columns, file, vocab_size=71)] == [[1, 2, 3, 70, 4]]


def arrow_file(path: Path, column: Any, name: str) -> Path:
    table = pyarrow.table({name: column})
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    return path


LONG_ROWS = np.arange(6 * 200_000, dtype=np.int32).reshape(6, 200_000)  # of 800 KB: the worker answers in some parts


@pytest.mark.parametrize("kind", ["list_", "large_list", "list_view", "large_list_view", "fixed"])
def test_rows_that_take_several_answers_are_whole_and_in_order(
    tmp_path: Path, columns: ColumnReader, kind: str
) -> None:
    inner = pyarrow.int32()
    of = pyarrow.list_(inner, LONG_ROWS.shape[1]) if kind == "fixed" else getattr(pyarrow, kind)(inner)
    column = pyarrow.array(list(LONG_ROWS), type=of)
    file = arrow_file(tmp_path / "a.arrow", column, "input_ids")
    field = columns.field_of(file, "arrow-file", None)
    assert isinstance(field, Field)
    pieces = [
        (piece.token_ids.copy(), [*piece.document_ends]) for piece in columns.id_pieces(file, "arrow-file", field, None)
    ]
    assert len(pieces) > 1
    documents = [part for ids, ends in pieces for part in np.split(ids, ends[:-1])]
    np.testing.assert_array_equal(np.stack(documents), LONG_ROWS)


@pytest.mark.parametrize("kind", ["list_", "large_list", "list_view"])
def test_a_null_in_a_later_answer_is_named_by_its_row_in_the_file(
    tmp_path: Path, columns: ColumnReader, kind: str
) -> None:
    rows = [*LONG_ROWS[:5], [], [7, 8, None]]
    column = pyarrow.array(rows, type=getattr(pyarrow, kind)(pyarrow.int32()))
    file = arrow_file(tmp_path / "a.arrow", column, "input_ids")
    field = columns.field_of(file, "arrow-file", None)
    assert isinstance(field, Field)
    with pytest.raises(ConfigError, match="row 6 has null at place 2, expected token ids"):
        list(columns.id_pieces(file, "arrow-file", field, None))


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_texts_that_take_several_answers_are_whole_and_in_order(
    tmp_path: Path, columns: ColumnReader, kind: str
) -> None:
    texts = [f"{number} " * 300_000 for number in range(4)] + [*TEXTS]
    file = arrow_file(tmp_path / "a.arrow", pyarrow.array(texts, type=getattr(pyarrow, kind)()), "text")
    field = columns.field_of(file, "arrow-file", None)
    assert isinstance(field, Field)
    assert [document.content for document in columns.texts(file, "arrow-file", field)] == texts


def test_a_column_that_holds_no_documents_is_named_with_what_there_is(tmp_path: Path, columns: ColumnReader) -> None:
    table = {"score": [0.5], "embedding": [[0.5]], "body": ["text"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    found = columns.field_of(tmp_path / "a.parquet", "parquet", None)
    assert found == NoField("it has no field text, nor one of token ids; it has: score, embedding, body")
    assert columns.field_of(tmp_path / "a.parquet", "parquet", "body") == Field("body", "text")
    found = columns.field_of(tmp_path / "a.parquet", "parquet", "embedding")
    assert isinstance(found, NoField)
    assert found.why.startswith("its column embedding is list<")


def test_a_file_without_the_column_is_left_out_of_a_folder_unless_it_was_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_column(folder / "a.parquet", [[1, 2]])
    write_column(folder / "statistics.parquet", [0.5], name="score")
    write_column(folder / "_common_metadata", [[1, 2]])
    report = write_trace([folder], tmp_path / "t.trace")
    left_out = {path.name: why for path, why in report.left_out}
    assert sorted(left_out) == ["_common_metadata", "statistics.parquet"]
    assert "no field text" in left_out["statistics.parquet"]
    with pytest.raises(
        ConfigError, match=r"statistics\.parquet is a Parquet file, but it has no .* in a field input_ids"
    ):
        write_trace([folder], tmp_path / "u.trace", field="input_ids")
    assert not (tmp_path / "u.trace").exists()


def test_columns_without_pyarrow_are_an_error_with_the_command_that_installs_it(
    tmp_path: Path, columns: ColumnReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_column(tmp_path / "a.parquet", [[1, 2]])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"a\.parquet: a file of columns needs the extra 'data' .*install it: .*pip install"
    ):
        columns.field_of(file, "parquet", None)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.arrows"])
def test_a_file_that_is_cut_or_foreign_behind_its_head_is_named(
    tmp_path: Path, columns: ColumnReader, name: str
) -> None:
    table = table_of(pyarrow.list_(pyarrow.int32()))
    file = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(table, file)
    else:
        new = pyarrow.ipc.new_file if name == "a.arrow" else pyarrow.ipc.new_stream
        with new(file, table.schema) as out:
            out.write_table(table, max_chunksize=3)
    kind = {"a.parquet": "parquet", "a.arrow": "arrow-file", "a.arrows": "arrow-stream"}[name]
    data = file.read_bytes()
    for cut in (len(data) // 2, len(data) - 20):
        file.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=rf"{name} is damaged, or not what it begins like .*; copy it again"):
            list(columns.id_pieces(file, kind, Field("input_ids", "ids"), None))


# The worker


def test_a_worker_that_dies_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    ids = pyarrow.array(np.zeros(40 << 15, dtype=np.int32))  # more than a pipe holds
    file = write_column(tmp_path / "a.parquet", pyarrow.FixedSizeListArray.from_arrays(ids, 1 << 15))
    with WorkerProcess("column_worker") as worker:
        request = {"do": "read", "path": str(file), "format": "parquet", "column": "input_ids"}
        answers = worker.ask(file, request)
        assert next(answers)[0]["rows"] > 0
        worker.kill()
        with pytest.raises(
            FormatError, match=r"a\.parquet: the process that reads it ended \(SIGKILL\); .*smaller row"
        ):
            list(answers)
        assert sum(head["rows"] for head, _ in worker.ask(file, request)) == 40  # a new one serves the next file


@pytest.mark.parametrize(
    ("program", "remedy"),
    [
        ("column_worker", "the file is damaged, or needs more than .* in smaller row groups"),
        ("text_worker", "a text in it, or in an input that follows, ends the tokenizer, .* one by one to find it"),
        ("chat_worker", "a chat in it ends the chat template, .* take out its longest chats"),
    ],
)
def test_the_remedy_for_a_worker_that_dies_is_about_what_it_does(program: str, remedy: str) -> None:
    with WorkerProcess(program) as worker:
        worker.send(Path("given"), {"do": "nothing that it knows"})
        worker.kill()
        with pytest.raises(FormatError, match=rf"given: the process that reads it ended \(SIGKILL\); {remedy}"):
            worker.receive(Path("given"))


def test_a_worker_for_columns_reads_without_numpy_and_compute_which_take_as_long_as_all_else(tmp_path: Path) -> None:
    file = write_column(tmp_path / "a.parquet", [[1, 2]])
    before = psutil.Process().children()
    with WorkerProcess("column_worker") as worker:
        request = {"do": "read", "path": str(file), "format": "parquet", "column": "input_ids"}
        worker.send(file, request)
        assert worker.receive(file)[0]["rows"] == 1
        (process,) = (each for each in psutil.Process().children() if each not in before)
        loaded = {Path(region.path).name for region in process.memory_maps()}
        assert any(name.startswith("libarrow.so") for name in loaded)
        assert not any("multiarray" in name or name.startswith("_compute.") for name in loaded)


def test_a_worker_that_gives_no_answer_is_ended_in_time(tmp_path: Path) -> None:
    file = write_column(tmp_path / "a.parquet", [[1, 2]])
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for its writer
    with WorkerProcess("column_worker", answer_s=2.0) as worker:
        with pytest.raises(FormatError, match=r"pipe: the process that reads it gave no answer in 2 s and was ended"):
            list(worker.ask(tmp_path / "pipe", {"do": "describe", "path": str(tmp_path / "pipe"), "format": "parquet"}))
        worker.answer_s = 60.0  # a new process, on a machine that may be busy
        answers = list(worker.ask(file, {"do": "describe", "path": str(file), "format": "parquet"}))
        assert answers[0][0]["rows"] == 1


def test_a_row_beyond_the_limit_of_memory_is_named_and_takes_none_from_this_process(tmp_path: Path) -> None:
    row = pyarrow.ListArray.from_arrays([0, 1 << 22], pyarrow.array(np.zeros(1 << 22, dtype=np.int32)))
    parquet.write_table(pyarrow.table({"input_ids": row}), tmp_path / "a.parquet")
    with WorkerProcess("column_worker", memory_bytes=8 << 20) as worker:
        request = {"do": "read", "path": str(tmp_path / "a.parquet"), "format": "parquet", "column": "input_ids"}
        with pytest.raises((BudgetError, FormatError), match=r"a\.parquet: .*8\.00 MiB.*smaller row groups or batches"):
            list(worker.ask(tmp_path / "a.parquet", request))


def test_a_small_file_that_unfolds_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfolding, "FREE_BYTES", 1 << 16)
    zeros = np.zeros(1 << 22, dtype="<u2")
    (tmp_path / "ids.u16.zst").write_bytes(zstandard.compress(zeros.tobytes(), 19))
    (tmp_path / "ids.u16.gz").write_bytes(gzip.compress(zeros.tobytes()))
    row = pyarrow.ListArray.from_arrays([0, len(zeros)], pyarrow.array(zeros))
    parquet.write_table(pyarrow.table({"input_ids": row}), tmp_path / "ids.parquet")
    for name in ("ids.u16.zst", "ids.u16.gz", "ids.parquet"):
        with pytest.raises(ConfigError, match=rf"{name} has .* and unfolds to more than .*; if that is meant"):
            trace_of([tmp_path / name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.parquet", "ids.u16.gz", "ids.u16.zst"]


# Data sets in folders


def test_a_saved_data_set_is_read_without_the_caches_beside_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"input_ids": [document.tolist() for document in DOCUMENTS]})
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    stray = (tmp_path / "saved" / "data-00000-of-00003.arrow").read_bytes()
    (tmp_path / "saved" / "cache-0123456789abcdef.arrow").write_bytes(stray)  # as `map` leaves them
    expected = expected_trace(tmp_path)
    assert trace_of([tmp_path / "saved"]) == expected
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "splits"))
    assert trace_of([tmp_path / "splits" / "train"]) == expected
    with pytest.raises(ConfigError, match=r"splits is a data set of 2 splits: test, train; give .*splits/test"):
        trace_of([tmp_path / "splits"])
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(FormatError, match=r"data-00001-of-00003\.arrow is missing: state\.json lists 3 files, 2 are"):
        trace_of([tmp_path / "saved"])


def cached_repository(folder: Path, snapshots: dict[str, dict[str, bytes]], main: str | None) -> Path:
    """A repository as huggingface_hub caches it: files in blobs, and links to them in snapshots."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    for commit, files in snapshots.items():
        for number, (name, data) in enumerate(files.items()):
            blob, link = folder / "blobs" / f"{commit}-{number}", folder / "snapshots" / commit / name
            blob.write_bytes(data)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def test_a_repository_in_the_hub_cache_is_read_by_its_main_snapshot(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"input_ids": document.tolist()}) + "\n" for document in DOCUMENTS).encode()
    files = {"README.md": b"# A data set, and what is in it\n" * 3, "data/train.jsonl": lines, ".gitattributes": b"*"}
    snapshots = {"123": {"data/train.jsonl": b'{"input_ids": [1]}\n'}, "456": files}
    cache = cached_repository(tmp_path / "hub" / "datasets--o--d", snapshots, "456")
    report = write_trace([cache], tmp_path / "t.trace")
    assert (tmp_path / "t.trace").read_bytes() == expected_trace(tmp_path)
    assert [(path.name, why) for path, why in report.left_out] == [("README.md", "about the repository")]
    assert trace_of([tmp_path / "hub"]) == expected_trace(tmp_path)
    (cache / "refs" / "main").unlink()
    with pytest.raises(ConfigError, match=r"with 2 snapshots, and refs/main names none of them; give one"):
        trace_of([cache])
    (cache / "snapshots" / "456" / "data" / "train.jsonl").resolve().unlink()
    with pytest.raises(ConfigError, match=r"train\.jsonl is a link to .*, which is not in the cache; download"):
        trace_of([cache / "snapshots" / "456"])


@pytest.mark.parametrize("encoding", ["ndarray", "ndarray:int32", "bytes"])
def test_a_mosaic_data_set_is_read_by_its_index(tmp_path: Path, encoding: str) -> None:
    def value(document: np.ndarray) -> bytes:
        return document.tobytes() if encoding == "bytes" else mosaic_array(document, with_type=encoding == "ndarray")

    samples = [{"id": bytes(8), "tokens": value(document), "url": b"http://x"} for document in FULL]
    columns = {"id": "int", "tokens": encoding, "url": "str"}
    folder = mosaic_folder(tmp_path / "mds", columns, [samples[:3], samples[3:]])
    options = {"dtype": "int32", "field": "tokens"} if encoding == "bytes" else {}
    assert trace_of([folder], **options) == expected_trace(tmp_path)
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        file = folder / shard["raw_data"]["basename"]
        packed = zstandard.compress(file.read_bytes())
        (folder / (file.name + ".zstd")).write_bytes(packed)
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        name = shard["raw_data"]["basename"] + ".zstd"
        shard["zip_data"] = {"basename": name, "bytes": (folder / name).stat().st_size, "hashes": {}}
        (folder / shard["raw_data"]["basename"]).unlink()
    (folder / "index.json").write_text(json.dumps(index))
    assert trace_of([folder], **options) == expected_trace(tmp_path)


def test_a_mosaic_column_of_bytes_needs_its_type(tmp_path: Path) -> None:
    folder = mosaic_folder(tmp_path / "mds", {"tokens": "bytes"}, [[{"tokens": bytes(8)}]])
    with pytest.raises(ConfigError, match=r"column tokens is bytes, which do not say their type; give --dtype \(int64"):
        trace_of([folder])


@pytest.mark.parametrize(
    ("encoding", "value"), [("ndarray", b""), ("ndarray", b"\x41"), ("ndarray:int32", b""), ("json", b"[%d]" % 2**64)]
)
def test_a_mosaic_sample_without_an_array_of_ids_is_named(tmp_path: Path, encoding: str, value: bytes) -> None:
    folder = mosaic_folder(tmp_path / "mds", {"tokens": encoding}, [[{"tokens": value}]])
    with pytest.raises((FormatError, ConfigError), match=r"00000\.mds: sample 0 (is damaged|has an id beyond 64 bits)"):
        trace_of([folder])


def test_a_mosaic_index_that_disagrees_with_its_shards_is_named(tmp_path: Path) -> None:
    samples = [{"tokens": mosaic_array(document, with_type=True)} for document in FULL]
    folder = mosaic_folder(tmp_path / "mds", {"tokens": "ndarray"}, [samples])
    shard, good = folder / "shard.00000.mds", json.loads((folder / "index.json").read_text())

    def refused(message: str, **changed: Any) -> None:
        (folder / "index.json").write_text(json.dumps({"shards": [good["shards"][0] | changed], "version": 2}))
        with pytest.raises((FormatError, ConfigError), match=message):
            trace_of([folder])

    refused("has 8 samples, its index says 9", samples=9)
    refused("expected mds, version 2", version=3)
    refused("lacks what an index of mosaic has", column_names=None)
    refused("which is neither text nor integers|no field text", column_encodings=["pkl"])
    refused("outside its folder", raw_data={"basename": "../shard.00000.mds", "bytes": 1, "hashes": {}})
    refused(r"shard\.00007\.mds is missing", raw_data={"basename": "shard.00007.mds", "bytes": 1, "hashes": {}})
    shard.write_bytes(shard.read_bytes()[:-1])
    refused("bytes, its index.json says .* it was cut")
    (folder / "index.json").write_text('{"shards": [')
    with pytest.raises((FormatError, ConfigError), match=r"index\.json"):
        trace_of([folder])


def test_a_litdata_data_set_is_read_by_its_index(tmp_path: Path) -> None:
    items = [{"ids": document.tobytes(), "n": bytes(8)} for document in FULL]
    leaves = {"ids": "no_header_numpy:2", "n": "int"}
    folder = litdata_folder(tmp_path / "arrays", leaves, [items[:5], items[5:]])
    expected = expected_trace(tmp_path)
    assert trace_of([folder]) == expected
    tensors = [
        {"x": (16).to_bytes(4, "big") + (1).to_bytes(4, "big") + len(d).to_bytes(4, "big") + d.tobytes()} for d in FULL
    ]
    assert trace_of([litdata_folder(tmp_path / "tensors", {"x": "tensor"}, [tensors])]) == expected
    tokens = [{"x": document.tobytes()} for document in FULL]
    stream = litdata_folder(tmp_path / "stream", {"x": "no_header_tensor:16"}, [tokens], item_loader="TokensLoader")
    assert trace_of([stream]) == expected
    framed = litdata_folder(
        tmp_path / "framed", leaves, [items[:5], items[5:]], compression="zstd", compression_level="batch"
    )
    assert trace_of([framed]) == expected
    single = litdata_folder(tmp_path / "single", leaves, [items], compression="zstd", compression_level="sample")
    assert trace_of([single]) == expected


def test_rows_with_lists_in_a_litdata_data_set_are_an_arrow_file_behind_an_empty_table(tmp_path: Path) -> None:
    folder = litdata_folder(tmp_path / "lists", {"input_ids": "json"}, [[], []])
    index = json.loads((folder / "index.json").read_text())
    table = table_of(pyarrow.list_(pyarrow.int64()))
    for number, rows in enumerate((table.slice(0, 4), table.slice(4))):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_file(sink, table.schema) as file:
            file.write_table(rows, max_chunksize=3)
        arrow = sink.getvalue().to_pybytes()
        empty = np.array([len(rows), *[4 * (len(rows) + 2)] * (len(rows) + 1)], dtype="<u4").tobytes()
        data = empty + arrow + len(arrow).to_bytes(4, "little") + b"LDARW01\0"
        (folder / index["chunks"][number]["filename"]).write_bytes(data)
        index["chunks"][number] |= {"chunk_bytes": len(data), "chunk_size": len(rows)}
    (folder / "index.json").write_text(json.dumps(index))
    assert trace_of([folder]) == expected_trace(tmp_path)


def test_a_chunk_by_itself_is_refused_with_its_folder_as_the_remedy(tmp_path: Path) -> None:
    folder = litdata_folder(tmp_path / "lit", {"x": "no_header_numpy:2"}, [[{"x": bytes(40)}]])
    for name in ("chunk-0-0.bin", "index.json"):
        with pytest.raises(ConfigError, match=r"litdata .*; give its folder"):
            trace_of([folder / name])


# Archives


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_an_archive_are_documents(tmp_path: Path, tokenizer: Path, format_: int) -> None:
    deep = "d" * 70 + "/" + "e" * 60  # longer than a header's name
    members: list[tuple[str, bytes]] = []
    for number, text in enumerate(TEXTS):
        members += [(f"{deep}/{number:06}.jpg", bytes(700)), (f"{deep}/{number:06}.txt", text.encode())]
    archive = archive_of(members, format_)
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    expected = trace_of([lines], tokenizer=tokenizer)
    for name, data in (("a.tar", archive), ("a.tar.gz", gzip.compress(archive)), ("b", zstandard.compress(archive))):
        (tmp_path / name).write_bytes(data)
        assert trace_of([tmp_path / name], tokenizer=tokenizer) == expected


def test_objects_and_arrays_in_an_archive_are_documents(tmp_path: Path) -> None:
    objects = [(f"{n}.json", json.dumps({"id": n, "input_ids": d.tolist()}).encode()) for n, d in enumerate(DOCUMENTS)]
    (tmp_path / "objects.tar").write_bytes(archive_of(objects))
    np.save(tmp_path / "one.npy", FULL[0])
    (tmp_path / "arrays.tar").write_bytes(archive_of([("0.npy", (tmp_path / "one.npy").read_bytes())]))
    assert trace_of([tmp_path / "objects.tar"]) == expected_trace(tmp_path)
    assert trace_of([tmp_path / "arrays.tar"]) == expected_trace(tmp_path, FULL[:1])
    (tmp_path / "pictures.tar").write_bytes(archive_of([("0.jpg", bytes(100)), ("0.cls", b"1")]))
    with pytest.raises(ConfigError, match="without text or token ids: its members are of these kinds: jpg, cls"):
        trace_of([tmp_path / "pictures.tar"])


def test_an_id_outside_the_vocabulary_is_named_by_member_and_sample(tmp_path: Path) -> None:
    members = [("a/1.json", b"[1, 2]"), ("a/2.json", b"[3, 50]")]
    (tmp_path / "s.tar").write_bytes(archive_of(members))
    samples = [{"tokens": mosaic_array(np.array(ids), with_type=True)} for ids in ([1, 2], [3, 50])]
    items = [{"ids": np.array(ids, "<i4").tobytes()} for ids in ([1, 2], [3, 50])]
    for given, place in (
        (tmp_path / "s.tar", r"s\.tar: member a/2\.json"),
        (mosaic_folder(tmp_path / "mds", {"tokens": "ndarray"}, [samples]), r"shard\.00000\.mds: sample 1"),
        (litdata_folder(tmp_path / "lit", {"ids": "no_header_numpy:2"}, [items]), r"chunk-0-0\.bin: sample 1"),
    ):
        with pytest.raises(ValueError, match=rf"{place}: token 1 has id 50, the vocabulary has 50 ids"):
            trace_of([given], vocab_size=50)


@pytest.mark.parametrize("kind", [tarfile.AREGTYPE, tarfile.CONTTYPE], ids=["of before 1988", "contiguous"])
def test_every_kind_of_regular_member_is_a_document(tmp_path: Path, kind: bytes) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, document in enumerate(DOCUMENTS):
            data = json.dumps(document.tolist()).encode()
            member = tarfile.TarInfo(f"{number}.json")
            member.size, member.type = len(data), kind if number else tarfile.REGTYPE
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "a.tar").write_bytes(archive.getvalue())
    assert trace_of([tmp_path / "a.tar"]) == expected_trace(tmp_path)


def test_arrays_of_several_integer_types_in_one_archive_are_documents(tmp_path: Path) -> None:
    members = []
    for number, dtype in enumerate(["<u8", "<i8", ">i4", "<u2"]):
        data = io.BytesIO()
        np.save(data, FULL[number].astype(dtype))
        members.append((f"{number}.npy", data.getvalue()))
    (tmp_path / "a.tar").write_bytes(archive_of(members))
    assert trace_of([tmp_path / "a.tar"]) == expected_trace(tmp_path, FULL[:4])


@pytest.mark.parametrize("size", [b"-1", b"-0000001000"])
def test_a_member_of_less_than_no_bytes_is_named(tmp_path: Path, size: bytes) -> None:
    archive = bytearray(archive_of([("0.json", b'{"input_ids": [1, 2]}')]))
    archive[124:136], archive[148:156] = size.ljust(12, b"\0"), b" " * 8
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    (tmp_path / "a.tar").write_bytes(archive)
    with pytest.raises(FormatError, match=r"a\.tar: the header at byte 0 is damaged"):
        trace_of([tmp_path / "a.tar"])


def test_an_archive_that_is_cut_or_damaged_is_named_with_the_place(tmp_path: Path) -> None:
    archive = archive_of([(f"{number}.json", b'{"input_ids": [1, 2]}') for number in range(4)])
    file = tmp_path / "a.tar"
    for cut in (512, 1000, 1024, 2048):
        file.write_bytes(archive[:cut])
        with pytest.raises(FormatError, match=r"a\.tar ends within .*, at byte \d+: it was cut"):
            trace_of([file])
    file.write_bytes(archive[:1030] + b"7" + archive[1031:])
    with pytest.raises(FormatError, match=r"a\.tar: the header at byte 1024 is damaged"):
        trace_of([file])


# Samples and jobs


def test_a_sample_is_drawn_by_number_and_seed_and_is_the_same_from_any_container(tmp_path: Path) -> None:
    many = [np.full(length, number, dtype=np.int32) for number, length in enumerate([3, 0, 7, 1] * 500)]
    (tmp_path / "ids.i32").write_bytes(b"".join(document.tobytes() for document in many))
    np.save(tmp_path / "lengths.npy", [len(document) for document in many])
    lines = tmp_path / "ids.jsonl"
    lines.write_text("".join(json.dumps({"input_ids": document.tolist()}) + "\n" for document in many))
    full = [document for document in many if len(document)]
    samples = [{"tokens": mosaic_array(document, with_type=True)} for document in full]
    folder = mosaic_folder(tmp_path / "mds", {"tokens": "ndarray"}, [samples])
    drawn = {}
    for seed in (0, 1):
        options: dict[str, Any] = {"sample": 0.3, "seed": seed}
        plain = trace_of([tmp_path / "ids.i32"], doclens=tmp_path / "lengths.npy", **options)
        assert trace_of([lines], **options) == plain
        assert trace_of([folder], **options) == plain
        (tmp_path / "t.trace").write_bytes(plain)
        drawn[seed] = [int(document[0]) for document in read_token_documents(tmp_path / "t.trace")]
        assert drawn[seed] == sorted(drawn[seed])
        assert abs(len(drawn[seed]) - 0.3 * len(full)) < 5 * (0.3 * 0.7 * len(full)) ** 0.5
    assert drawn[0] != drawn[1]
    assert trace_of([lines], sample=1.0) == trace_of([lines])


def test_a_sample_of_text_is_the_same_as_of_its_ids(tmp_path: Path, tokenizer: Path) -> None:
    texts = [f"text number {number}" for number in range(200)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    loaded = Tokenizer.from_file(str(tokenizer))
    ids = [loaded.encode(text, add_special_tokens=False).ids for text in texts]
    (tmp_path / "i.jsonl").write_text("".join(json.dumps({"input_ids": each}) + "\n" for each in ids))
    assert trace_of([tmp_path / "c.jsonl"], tokenizer=tokenizer, sample=0.2) == trace_of(
        [tmp_path / "i.jsonl"], tokenizer=tokenizer, sample=0.2
    )


def test_files_of_a_document_each_are_numbered_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03}.i32").write_bytes(np.full(4, number, dtype="<i4").tobytes())
    lines = tmp_path / "ids.jsonl"
    lines.write_text("".join(json.dumps({"input_ids": [number] * 4}) + "\n" for number in range(60)))
    assert trace_of([folder], sample=0.4) == trace_of([lines], sample=0.4)


def test_documents_of_one_long_file_are_drawn_at_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.tools.inputs import byte_streams

    ids = np.array([[9, number, number, number] for number in range(300)], dtype="<i4").reshape(-1)
    (tmp_path / "ids.i32").write_bytes(ids[1:].tobytes())
    whole = trace_of([tmp_path / "ids.i32"], eos=9, sample=0.5)
    for read_bytes in (4, 12, 100):
        monkeypatch.setattr(byte_streams, "READ_BYTES", read_bytes)
        assert trace_of([tmp_path / "ids.i32"], eos=9, sample=0.5) == whole


def test_text_through_several_processes_is_the_same_trace(tmp_path: Path, tokenizer: Path) -> None:
    from tierstore.tools.inputs import text

    lines = tmp_path / "c.jsonl"
    lines.write_text(
        "".join(json.dumps({"text": f"{each} {number}"}) + "\n" for number in range(300) for each in TEXTS)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BATCH_CHARACTERS", 1000)
        assert trace_of([lines], tokenizer=tokenizer, bos=2, jobs=2) == trace_of([lines], tokenizer=tokenizer, bos=2)


def test_megatron_pairs_start_at_odd_addresses_and_are_read(tmp_path: Path) -> None:
    """An index has 34 bytes before its arrays, so that nothing in it is aligned."""
    pair = megatron_pair(tmp_path / "text.bin", [document.astype("<u2") for document in DOCUMENTS], 8)
    assert trace_of([pair]) == expected_trace(tmp_path)


def test_uint16_of_a_larger_vocabulary_is_refused_since_its_writers_wrap_ids_round(tmp_path: Path) -> None:
    pair = megatron_pair(tmp_path / "text.bin", [document.astype("<u2") for document in DOCUMENTS], 8)
    with pytest.raises(ConfigError, match=r"text\.bin holds uint16, and the vocabulary has 129280 ids: ids from 65536"):
        trace_of([pair], vocab_size=129_280)
    trace_of([pair], vocab_size=65_536)


# Pipes and copies


def piped(arguments: list[str | Path], given: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tierstore.tools.cli", "trace", *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, timeout=120, check=False)


def test_whatever_comes_through_a_pipe_is_the_same_trace_and_leaves_no_copy(tmp_path: Path) -> None:
    expected = expected_trace(tmp_path)
    write_column(tmp_path / "a.parquet", [document.tolist() for document in DOCUMENTS])
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "t.trace"
    done = piped(["-", "-o", output], (tmp_path / "a.parquet").read_bytes())
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == expected
    assert [path.name for path in output.parent.iterdir()] == ["t.trace"]
    output.unlink()
    done = piped(["-", "-o", output], b'{"input_ids": [1]}\n{"input_ids": [2\n')
    assert done.returncode == 1
    assert b"error: standard input: line 2 is not JSON" in done.stderr
    assert list(output.parent.iterdir()) == []


def test_what_readers_seek_in_may_be_compressed_too(tmp_path: Path) -> None:
    write_column(tmp_path / "a.parquet", [document.tolist() for document in DOCUMENTS])
    np.save(tmp_path / "a.npy", np.concatenate(DOCUMENTS))
    ids = np.concatenate(DOCUMENTS).astype("<u2")
    (tmp_path / "a.bin").write_bytes(np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes())
    names = ["a.parquet", "a.npy", "a.bin"]
    for name, compress in zip(names, (zstandard.compress, gzip.compress, zstandard.compress), strict=True):
        (tmp_path / (name + ".packed")).write_bytes(compress((tmp_path / name).read_bytes()))
    plain = trace_of([tmp_path / name for name in names])
    assert trace_of([tmp_path / (name + ".packed") for name in names]) == plain
    cut = (tmp_path / "a.npy").read_bytes()[:-2]
    (tmp_path / "a.npy.gz").write_bytes(gzip.compress(cut))
    with pytest.raises(FormatError, match=r"a\.npy\.gz has \d+ bytes of values, its head says \d+: it was cut"):
        trace_of([tmp_path / "a.npy.gz"])


def test_any_number_of_compressed_arrays_takes_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "HELD_MAX", 3)
    expected = expected_trace(tmp_path, times=5)
    (tmp_path / "in").mkdir()
    for number, document in enumerate(DOCUMENTS * 5):
        np.save(tmp_path / "a.npy", document)
        (tmp_path / "in" / f"{number:02}.npy.gz").write_bytes(gzip.compress((tmp_path / "a.npy").read_bytes()))
    before, most = open_files(), 0

    def count(_done: int, _total: int) -> None:
        nonlocal most
        most = max(most, len(open_files() - before))

    inputs = [tmp_path / "in", tmp_path / "in" / "00.npy.gz", tmp_path / "in" / "00.npy.gz"]
    write_trace(inputs, tmp_path / "t", on_progress=count)
    assert 3 <= most <= 3 + 4  # the trace, the file that is read, and its copy
    assert open_files() <= before
    assert trace_of([tmp_path / "in"]) == expected


def test_a_compressed_array_that_is_replaced_before_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "HELD_MAX", 0)
    np.save(tmp_path / "a.npy", DOCUMENTS[0])
    for name in "ab":
        (tmp_path / f"{name}.npy.gz").write_bytes(gzip.compress((tmp_path / "a.npy").read_bytes()))

    def replace(_done: int, _total: int) -> None:
        (tmp_path / "b.npy.gz").write_bytes(gzip.compress((tmp_path / "a.npy").read_bytes() + b"more"))

    with pytest.raises(ConfigError, match=r"^\S*b\.npy\.gz was changed while it was read; trace it again"):
        write_trace([tmp_path / "a.npy.gz", tmp_path / "b.npy.gz"], tmp_path / "t", on_progress=replace)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npy.gz", "b.npy.gz"]


# Chats


CHATS = [
    [{"role": "user", "content": "one <two>"}, {"role": "assistant", "content": "three"}],
    [{"role": "user", "content": "Äpfel, 漢字"}],
]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}
<{{ message['role'] }}>{% generation %}{{ message['content'] }}{% endgeneration %}{{ message | tojson | length }}
{% endfor %}"""


@pytest.fixture
def chat_folder(tmp_path: Path, tokenizer: Path) -> Path:
    """A tokenizer with a chat template, as people download it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_chats_become_the_text_that_transformers_makes_of_them(tmp_path: Path, chat_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    parquet.write_table(pyarrow.table({"messages": CHATS}), tmp_path / "c.parquet")
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(chat_folder / "tokenizer.json"), bos_token="<s>")
    texts = [oracle.apply_chat_template(chat, chat_template=TEMPLATE, tokenize=False) for chat in CHATS]
    assert texts[1].startswith("<s>")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = trace_of([tmp_path / "t.jsonl"], tokenizer=chat_folder)
    assert trace_of([lines], tokenizer=chat_folder) == expected
    assert trace_of([tmp_path / "c.parquet"], tokenizer=chat_folder) == expected
    with pytest.raises(ConfigError, match=r"c\.jsonl holds chats, and the chat template writes their first token"):
        trace_of([lines], tokenizer=chat_folder, bos=1)


def test_a_chat_that_the_template_refuses_is_named_and_one_without_end_is_ended(
    tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "c.jsonl"
    chats = [*CHATS, [{"role": "system", "content": "x"}]]
    lines.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    with pytest.raises(ConfigError, match=r"c\.jsonl: chat 2: the chat template refuses it \(.*no system here\)"):
        trace_of([lines], tokenizer=chat_folder)
    (chat_folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match=r"chat 0: the chat template refuses it \(SecurityError"):
        trace_of([lines], tokenizer=chat_folder)
    deep = "".join(f"{{% for a{n} in range(99999) %}}" for n in range(4)) + "{% endfor %}" * 4
    (chat_folder / "chat_template.jinja").write_text(deep)
    monkeypatch.setattr(chat, "ANSWER_S", 1.5)
    with pytest.raises(FormatError, match=r"gave no answer in 2 s and was ended"):
        trace_of([lines], tokenizer=chat_folder)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (chat_folder / name).unlink()
    with pytest.raises(ConfigError, match=r"c\.jsonl holds chat messages, and there is no chat template beside"):
        trace_of([lines], tokenizer=chat_folder)


def test_an_interrupt_ends_the_workers_and_leaves_nothing(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierstore.tools.inputs import text

    monkeypatch.setattr(text, "BATCH_CHARACTERS", 1000)
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"text": f"{TEXTS[0]} {number}"}) + "\n" for number in range(2000)))
    workers: list[psutil.Process] = []

    def interrupt(_done: int, _total: int) -> None:
        workers[:] = [each for each in psutil.Process().children() if "text_worker" in " ".join(each.cmdline())]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_trace([lines], tmp_path / "t.trace", tokenizer=tokenizer, jobs=2, on_progress=interrupt)
    assert len(workers) == 2
    assert not [each for each in workers if each.is_running()]
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_an_error_names_the_source_of_its_copy_however_many_copies_there_are(tmp_path: Path) -> None:
    with Spool(tmp_path) as copies:
        for number in range(120):  # descriptors of one, two and three digits: some begin like others
            path = copies.copy([b""], f"source {number}")
            with pytest.raises(FormatError, match=rf"^source {number}: damaged$"), copies.naming_sources():
                raise FormatError(f"{path}: damaged")
