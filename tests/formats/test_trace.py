"""A trace gives back documents and accesses as they were added, in any pieces;
what contradicts itself is refused by name."""

from __future__ import annotations

import contextlib
import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.errors import FormatError
from tierstore.formats import key_trace, trace
from tierstore.formats.columns import ColumnWriter
from tierstore.formats.key_trace import (
    KeyBlock,
    KeyTraceInfo,
    KeyTraceWriter,
    TracedTable,
    read_key_blocks,
    read_key_trace_info,
)
from tierstore.formats.trace import (
    TokenTraceInfo,
    TokenTraceWriter,
    check_token_ids,
    read_token_documents,
    read_token_pieces,
    read_token_trace_info,
    sort_of_trace,
)

TABLES = (TracedTable("layers.1", "ab", (2, 3, 4)), TracedTable("plain", "cd", (1,)))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "BLOCK_VALUES", 8)
    monkeypatch.setattr(key_trace, "BLOCK_VALUES", 8)


def write_tokens(path: Path, documents: list[list[int]], vocab_size: int | None = None) -> TokenTraceInfo:
    with TokenTraceWriter(path, vocab_size=vocab_size, source="a test") as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        return writer.finish()


def documents_of(path: Path) -> list[list[int]]:
    found = list(read_token_documents(path))
    assert all(document.dtype == np.int32 for document in found)
    return [document.tolist() for document in found]


LENGTHS = [0, 1, 7, 8, 9, 16, 25]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("lengths", list(itertools.product(LENGTHS, LENGTHS, [0, 1, 8])), ids=str)
def test_documents_come_back_whatever_blocks_they_span(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    numbers = itertools.count()
    documents = [list(itertools.islice(numbers, length)) for length in lengths]
    info = write_tokens(tmp_path / "t", documents)
    whole = [document for document in documents if document]
    total = sum(lengths)
    assert documents_of(tmp_path / "t") == whole
    assert info == TokenTraceInfo(tmp_path / "t", None, "a test", total, len(whole), total - 1)
    assert read_token_trace_info(tmp_path / "t") == info
    for token_ids, ends in read_token_pieces(tmp_path / "t"):
        assert 1 <= len(token_ids) <= 8
        assert ((ends >= 1) & (ends <= len(token_ids))).all()


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), tokens_max=st.integers(1, 20), stretch=st.integers(1, 20))
def test_long_documents_are_cut_into_stretches_and_short_ones_are_not(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], tokens_max: int, stretch: int
) -> None:
    stretch = min(stretch, tokens_max)
    path = tmp_path_factory.mktemp("trace") / "t"
    numbers = itertools.count()
    documents = [list(itertools.islice(numbers, length)) for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "BLOCK_VALUES", 8)
        write_tokens(path, documents)
    steps = [stretch if len(ids) > tokens_max else max(len(ids), 1) for ids in documents]
    expected = [
        ids[start : start + step]
        for ids, step in zip(documents, steps, strict=True)
        for start in range(0, len(ids), step)
    ]
    assert [ids.tolist() for ids in read_token_documents(path, tokens_max, stretch)] == expected


def test_one_endless_document_is_cut_in_the_memory_of_a_stretch(tmp_path: Path) -> None:
    with TokenTraceWriter(tmp_path / "t", vocab_size=None, source="") as writer:
        for _ in range(24):
            writer.add(np.zeros(1 << 20, dtype=np.int32))
        writer.finish()
    tracemalloc.start()
    try:
        assert sum(map(len, read_token_documents(tmp_path / "t", 1 << 16))) == 24 << 20
        assert tracemalloc.get_traced_memory()[1] < 40 << 20, "of 96 MiB"
    finally:
        tracemalloc.stop()


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=30), max_size=8),
    cuts=st.lists(st.integers(0, 240), max_size=8),
)
def test_pieces_of_any_length_give_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t"
    flat = np.array([token for document in documents for token in document], dtype=np.int16)
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    bounds = sorted({0, len(flat), *(cut for cut in cuts if cut < len(flat))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "BLOCK_VALUES", 8)
        with TokenTraceWriter(path, vocab_size=100, source="") as writer:
            for number, (start, end) in enumerate(itertools.pairwise(bounds)):
                # An end at a cut comes with the piece behind it or before it, in turn.
                inside = (ends > start) & (ends < end) | ((ends == end) if number % 2 else (ends == start))
                writer.add(flat[start:end], ends[inside] - start)
                if number % 2 == 0 and end in ends:
                    writer.add(flat[:0], [0])
            writer.finish()
    assert documents_of(path) == [document for document in documents if document]


def test_a_long_trace_streams_in_little_memory(tmp_path: Path) -> None:
    chunk = np.random.default_rng(0).integers(0, 129280, 1 << 20).astype(np.int32)
    tracemalloc.start()
    with TokenTraceWriter(tmp_path / "t", vocab_size=129280, source="") as writer:
        for _ in range(12):
            writer.add(chunk)
        writer.finish()
    total = sum(len(token_ids) for token_ids, _ in read_token_pieces(tmp_path / "t"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 12 << 20
    assert peak < 48 << 20  # a block of 4 MiB, filtered, compressed, and read back; the whole is 48 MiB


@pytest.mark.parametrize("bad", [-1, 100, 2**40])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path, bad: int) -> None:
    with TokenTraceWriter(tmp_path / "t", vocab_size=100, source="") as writer:
        writer.add(np.arange(50))
        with pytest.raises(ValueError, match=rf"t: token 53 has id {bad}, the vocabulary has 100 ids"):
            writer.add(np.array([1, 2, 99, bad, 5]))
    with TokenTraceWriter(tmp_path / "t", vocab_size=None, source="") as writer:
        with pytest.raises(ValueError, match=r"2147483648 ids"):
            writer.add(np.array([1, 2**31]))
        with pytest.raises(TypeError, match="float64"):
            writer.add(np.array([1.0]))
        for ends in ([-1], [3], [2, 1]):
            with pytest.raises(ValueError, match="not ascending"):
                writer.add(np.array([1, 2]), ends)
    assert not list(tmp_path.iterdir())
    for vocab_size in (0, 2**31 + 1):
        with pytest.raises(ValueError, match=f"vocab_size {vocab_size}"):
            TokenTraceWriter(tmp_path / "t", vocab_size=vocab_size, source="")


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "<u2", "<i4", ">i4", "<u4", ">u4", "<i8", ">i8", "<u8"])
def test_ids_of_every_integer_type_and_stride_are_held_against_the_vocabulary(dtype: str) -> None:
    limits = np.iinfo(dtype)
    most = min(int(limits.max), 2**31 - 1)
    for ids in (np.array([0, most, 5], dtype=dtype), np.array([0, 9, most, 9, 5, 9], dtype=dtype)[::2]):
        assert check_token_ids(ids, None, "t") == most
        assert check_token_ids(ids, most + 1, "t") == most
        with pytest.raises(ValueError, match=rf"t: token 8 has id {most}, the vocabulary has {most} ids"):
            check_token_ids(ids, most, "t", 7)
    assert check_token_ids(np.empty(0, dtype=dtype), 1, "t") == -1
    for bad in sorted({-1, int(limits.min), int(limits.max)} - {0}):
        if limits.min <= bad < 0 or bad >= 2**31:
            with pytest.raises(ValueError, match=rf"t: token 1 has id {bad},"):
                check_token_ids(np.array([3, bad, 4], dtype=dtype), None, "t")


def test_an_empty_trace_is_a_trace(tmp_path: Path) -> None:
    info = write_tokens(tmp_path / "t", [])
    assert (info.num_tokens, info.num_documents, info.token_id_max) == (0, 0, -1)
    assert documents_of(tmp_path / "t") == []


@pytest.mark.usefixtures("small_blocks")
def test_accesses_come_back_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 2, 21)
    added = KeyBlock(table, rng.integers(0, 3, 21) * (1 - table), rng.integers(0, 2**63 - 1, 21), np.arange(21) // 4)
    with KeyTraceWriter(tmp_path / "k", tables=TABLES, sample_rate=0.25) as writer:
        writer.add(KeyBlock(*(column[:17] for column in added)))
        writer.add(KeyBlock(*(column[17:] for column in added)))
        info = writer.finish(num_batches=9, num_dropped=5)
    assert info == KeyTraceInfo(tmp_path / "k", TABLES, 0.25, 21, 9, 5) == read_key_trace_info(tmp_path / "k")
    blocks = list(read_key_blocks(tmp_path / "k"))
    assert [len(block.keys) for block in blocks] == [8, 8, 5]
    for name in KeyBlock._fields:
        found = np.concatenate([getattr(block, name) for block in blocks])
        np.testing.assert_array_equal(found, getattr(added, name))


def test_a_trace_says_its_sort_and_is_not_taken_for_the_other(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[1, 2]])
    with KeyTraceWriter(tmp_path / "k", tables=TABLES, sample_rate=1) as writer:
        writer.finish(num_batches=0, num_dropped=0)
    assert (sort_of_trace(tmp_path / "t"), sort_of_trace(tmp_path / "k")) == ("tokens", "keys")
    assert list(read_key_blocks(tmp_path / "k")) == []
    with pytest.raises(FormatError, match="is a trace of tokens, expected one of keys"):
        next(read_key_blocks(tmp_path / "t"))
    with pytest.raises(FormatError, match="is a trace of keys, expected one of tokens"):
        next(read_token_documents(tmp_path / "k"))
    with ColumnWriter(tmp_path / "o", "trace", {"trace": "rows"}) as other:
        other.finish({})
    with pytest.raises(FormatError, match="a trace of 'rows', this tierstore knows"):
        sort_of_trace(tmp_path / "o")


TOKEN_HEADER = {"trace": "tokens", "vocab_size": 10, "source": ""}
TOKEN_FOOTER = {"tokens": 4, "documents": 2, "token_id_max": 9}
IDS, ENDS = [1, 9, 0, 3], [1, 4]


@pytest.mark.parametrize(
    ("header", "footer", "token_ids", "ends"),
    [
        ({"vocab_size": 0}, {}, IDS, ENDS),
        ({"vocab_size": 9}, {}, IDS, ENDS),
        ({"vocab_size": "10"}, {}, IDS, ENDS),
        ({"vocab_size": True}, {}, IDS, ENDS),
        ({"vocab_size": 2**31 + 1}, {}, IDS, ENDS),
        ({"source": None}, {}, IDS, ENDS),
        ({}, {"tokens": 5}, IDS, ENDS),
        ({}, {"tokens": None}, IDS, ENDS),
        ({}, {"documents": 1}, IDS, ENDS),
        ({}, {"token_id_max": 8}, IDS, ENDS),
        ({}, {"token_id_max": -1}, IDS, ENDS),
        ({}, {"token_id_max": 1.5}, IDS, ENDS),
        ({}, {}, [1, 9, -1, 3], ENDS),
        ({}, {}, IDS, [1, 3]),
        ({}, {}, IDS, [1, 5]),
        ({}, {}, IDS, [0, 4]),
        ({}, {}, IDS, [4, 4]),
        ({}, {}, IDS, [-4, 4]),
        ({}, {"documents": 4}, IDS, [1, -(2**63), -(2**62), 4]),  # its differences wrap round to positive ones
        ({}, {"documents": 0}, IDS, []),
    ],
)
def test_a_token_trace_that_contradicts_itself_is_refused(
    tmp_path: Path, header: dict, footer: dict, token_ids: list[int], ends: list[int]
) -> None:
    def attempt(header: dict, footer: dict, token_ids: list[int], ends: list[int]) -> list[list[int]]:
        with ColumnWriter(tmp_path / "t", "trace", TOKEN_HEADER | header) as writer:
            columns = {
                "token_ids": np.array(token_ids, dtype=np.int32),
                "document_ends": np.array(ends, dtype=np.int64),
            }
            writer.write_block("tokens", columns)
            writer.finish(TOKEN_FOOTER | footer)
        return documents_of(tmp_path / "t")

    assert attempt({}, {}, IDS, ENDS) == [[1], [9, 0, 3]]
    with pytest.raises(FormatError, match=r"t: .*write (it|the trace) again"):
        attempt(header, footer, token_ids, ends)


KEY_HEADER = {"trace": "keys", "tables": [["a", "ff", [2, 3]], ["b", "ee", [1]]], "sample_rate": 0.5}
KEY_FOOTER = {"accesses": 3, "batches": 2, "dropped": 0}
ACCESSES = {"table": [0, 0, 1], "order_index": [0, 1, 0], "keys": [0, 5, 7], "batch": [0, 1, 1]}


@pytest.mark.parametrize(
    ("header", "footer", "accesses"),
    [
        ({"sample_rate": 0.0}, {}, {}),
        ({"sample_rate": 1.5}, {}, {}),
        ({"sample_rate": "1"}, {}, {}),
        ({"tables": None}, {}, {}),
        ({"tables": [["a", "ff"]]}, {}, {}),
        ({"tables": [["a", "ff", ["2"]]]}, {}, {}),
        ({"tables": []}, {}, {}),
        ({}, {"accesses": 2}, {}),
        ({}, {"batches": -1}, {}),
        ({}, {"batches": 1}, {}),
        ({}, {"dropped": None}, {}),
        ({}, {}, {"table": [0, 0, 2]}),
        ({}, {}, {"order_index": [0, 2, 0]}),
        ({}, {}, {"order_index": [0, 1, 1]}),
        ({}, {}, {"keys": [0, -1, 7]}),
        ({}, {}, {"batch": [1, 0, 1]}),
        ({}, {}, {"batch": [-1, 0, 1]}),
        ({}, {}, {"batch": [-(2**63), -(2**62), 1]}),
        ({}, {}, {"batch": [0, 1]}),
    ],
)
def test_a_key_trace_that_contradicts_itself_is_refused(
    tmp_path: Path, header: dict, footer: dict, accesses: dict
) -> None:
    def attempt(header: dict, footer: dict, accesses: dict) -> list[KeyBlock]:
        with ColumnWriter(tmp_path / "k", "trace", KEY_HEADER | header) as writer:
            columns = {
                name: np.array((ACCESSES | accesses)[name], dtype=dtype)
                for name, dtype in key_trace.KEY_COLUMNS.items()
            }
            writer.write_block("keys", columns)
            writer.finish(KEY_FOOTER | footer)
        return list(read_key_blocks(tmp_path / "k"))

    assert [column.tolist() for column in attempt({}, {}, {})[0]] == list(ACCESSES.values())
    with pytest.raises(FormatError, match=r"k: .*again"):
        attempt(header, footer, accesses)


def test_a_trace_with_other_columns_is_refused(tmp_path: Path) -> None:
    with ColumnWriter(tmp_path / "t", "trace", TOKEN_HEADER) as writer:
        writer.write_block("tokens", {"token_ids": np.zeros(4, dtype=np.int64)})
        writer.finish(TOKEN_FOOTER)
    with pytest.raises(FormatError, match="a block of tokens has columns"):
        read_token_trace_info(tmp_path / "t")


def test_any_flipped_byte_of_a_trace_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[1, 2, 3], [4, 5]], vocab_size=6)
    healthy = (tmp_path / "t").read_bytes()
    for place in range(len(healthy)):
        (tmp_path / "t").write_bytes(healthy[:place] + bytes([healthy[place] ^ 0x41]) + healthy[place + 1 :])
        with contextlib.suppress(FormatError):
            assert documents_of(tmp_path / "t") == [[1, 2, 3], [4, 5]]
