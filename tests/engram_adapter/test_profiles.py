"""Profiles of a model's tokens: the counts of each layer's keys, made anywhere and merged; another hash is refused."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from support.profiles import Documents, make_profile, merge_profiles
from support.repository import TESTS
from support.tiny_store import VOCAB_SIZE, tiny_hash

from engram_adapter import HashSpec, build_token_map, profiles
from engram_adapter.profiles import check_profile, profile_header, token_documents
from tests.engram_adapter.test_real_trace import V41
from tierstore import kernels
from tierstore.decisions.item_statistics import TableGroup
from tierstore.decisions.replay import simulate
from tierstore.errors import ConfigError, FingerprintMismatchError
from tierstore.formats.profile import KEYS, ProfileReader
from tierstore.offline.count_documents import read_groups
from tierstore.offline.documents import Document, held_out_documents

HELD_OUT = 0.25
NUM_PARTS = 4


def some_texts(seed: int = 0, count: int = 200) -> list[np.ndarray]:
    """Documents of skewed ids, some of one token and some of none."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 120, count)
    return [np.minimum(rng.pareto(0.7, length), VOCAB_SIZE - 1).astype(np.int32) for length in lengths]


def part_of(texts: list[np.ndarray], part: int) -> list[np.ndarray]:
    bounds = [0, 3, 110, 110, len(texts)]  # of very different lengths, one of them nothing
    return texts[bounds[part] : bounds[part + 1]]


def analyse(groups: list[TableGroup], counts: dict[str, int]) -> dict[str, Any]:
    (group,) = groups
    outcome = simulate(group.replay, group.replay.counts > 1, recency_sets=3, batch_tokens=4)
    return {"hits": outcome.document_hits.tolist(), "distinct": group.distinct, "tokens": counts["tokens"]}


def make(path: Path, texts: list[np.ndarray], memory_bytes: int = 128 * 1000) -> dict[str, Any]:
    spec = tiny_hash()
    documents = token_documents(spec, texts)
    return make_profile(path, profile_header(spec, HELD_OUT), documents, analyse, memory_bytes=memory_bytes)


def documents_of(profile: ProfileReader) -> Iterator[Document]:
    return token_documents(tiny_hash(), (columns["token_ids"] for columns in held_out_documents(profile)))


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/engram_adapter"]
from test_profiles import make, part_of, some_texts
make(Path(sys.argv[2]), part_of(some_texts(), int(sys.argv[3])))
"""


def test_a_profile_made_in_four_parts_by_four_processes_and_merged_is_the_one_made_at_once(tmp_path: Path) -> None:
    """To the byte: items, sums, documents, counts and analysis, whatever runs each counter's memory made."""
    whole = make(tmp_path / "whole", some_texts(), memory_bytes=1 << 20)
    parts = [tmp_path / f"part-{number}" for number in range(NUM_PARTS)]
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(TESTS), str(part), str(number)])
        for number, part in enumerate(parts)
    ]
    with contextlib.ExitStack() as stack:
        for child in children:
            stack.callback(child.kill)
        assert [child.wait(120) for child in children] == [0] * NUM_PARTS
    opened = [ProfileReader(part) for part in parts]
    assert [part.counts["documents"] for part in opened] == [3, 107, 0, 90]
    merged = merge_profiles(tmp_path / "merged", opened, documents_of, analyse, memory_bytes=128 * 1000)
    for part in opened:
        part.close()
    assert merged == whole
    assert 0 < merged["counts"]["held_out_documents"] < 200
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_classes_and_replay_are_those_of_every_layers_keys(tmp_path: Path) -> None:
    spec, texts = tiny_hash(), some_texts(1)
    make(tmp_path / "p", texts)
    with ProfileReader(tmp_path / "p") as profile:
        (group,) = read_groups(profile, Documents(documents_of))
    held = [kernels.crc32c(ids.tobytes()) < HELD_OUT * 2**32 for ids in texts]
    for layer in spec.layers:
        keys = [spec.keys(ids[None].astype(np.int64), layer)[0] for ids in texts]
        counted, kept = (
            np.concatenate([part for part, out in zip(keys, held, strict=True) if out == wanted])
            for wanted in (False, True)
        )
        for order_index in range(len(spec.orders)):
            sums, held_sums = (Counter(part[:, order_index].tolist()) for part in (counted, kept))
            expected: dict[int, list[int]] = {}
            for key, count in sums.items():
                told = expected.setdefault(count, [0, 0])
                told[0] += 1
                told[1] += held_sums[key]
            mine = group.classes.order_index == order_index
            columns = group.classes.counts[mine], group.classes.num_items[mine], group.classes.held_out[mine]
            found = {count: told for count, *told in np.stack(columns, axis=1).tolist()}
            assert found == expected
            assert group.distinct[order_index] == len(set(sums) | set(held_sums))
            items = group.replay.items[group.replay.order_index == order_index]
            assert group.replay.counts[items].tolist() == [sums[key] for key in kept[:, order_index].tolist()]
            pairs = set(zip(items.tolist(), kept[:, order_index].tolist(), strict=True))
            assert len(pairs) == len(held_sums) == len(set(items.tolist()))


@pytest.mark.long
def test_a_profile_of_real_text_is_what_a_counter_of_its_keys_says(shared_data: Path, tmp_path: Path) -> None:
    spec = HashSpec.from_config(V41, build_token_map(shared_data / "deepseek_v3_tokenizer.json"))
    with (shared_data / "trace_test.i32.zst").open("rb") as file:
        ids = np.frombuffer(zstandard.ZstdDecompressor().stream_reader(file).read(200_000 * 4), "<i4")
    texts = [ids[start : start + 900] for start in range(0, len(ids), 900)]
    header = profile_header(spec, 0.1)
    distinct: list[tuple[int, ...]] = []
    footer = make_profile(
        tmp_path / "p",
        header,
        token_documents(spec, texts),
        lambda groups, _: {"distinct": distinct.append(groups[0].distinct)},
        memory_bytes=4 << 20,
    )
    assert footer["counts"]["tokens"] == 200_000
    keys = np.concatenate([spec.keys(text[None].astype(np.int64), 14)[0] for text in texts])
    assert list(distinct[0]) == [len(np.unique(keys[:, column])) for column in range(3)]
    with ProfileReader(tmp_path / "p") as profile:
        assert sum(int(sums.sum()) for _, sums in profile.items()) == 200_000
        check_profile(spec, profile.header)


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 14, 50])
def test_a_text_longer_than_a_document_may_be_is_several(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """A trace without document ends took 40 bytes a token at once, and was held out whole or not at all."""
    spec, text = tiny_hash(), np.arange(length, dtype=np.int64) % VOCAB_SIZE
    expected = [text[start : start + 7] for start in range(0, length, 7)] or [text]
    whole = list(token_documents(spec, expected))
    monkeypatch.setattr(profiles, "DOCUMENT_TOKENS_MAX", 7)
    for document, part, ids in zip(token_documents(spec, [text]), whole, expected, strict=True):
        np.testing.assert_array_equal(document.items, part.items)
        assert document.columns["token_ids"].dtype == np.int32
        assert document.columns["token_ids"].tolist() == ids.tolist()
        assert document.num_tokens == len(ids)
    bad = np.append(text, VOCAB_SIZE)
    where = rf"^document 1 from token {length // 7 * 7} on: " if length >= 7 else "^document 1: "
    with pytest.raises(ValueError, match=rf"{where}token id {VOCAB_SIZE} .* position {length % 7} "):
        list(token_documents(spec, [text[:3], bad]))


@pytest.mark.parametrize("bad", [VOCAB_SIZE, -1])
def test_ids_outside_the_vocabulary_are_named_and_leave_no_profile(tmp_path: Path, bad: int) -> None:
    texts = [np.array([1, 2], dtype=np.int32), np.array([3, bad, 4], dtype=np.int32)]
    with pytest.raises(ValueError, match=rf"document 1: token id {bad} .* position 1 .* vocabulary of {VOCAB_SIZE}"):
        make(tmp_path / "p", texts)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_of_another_hash_is_refused_with_the_remedy(tmp_path: Path) -> None:
    make(tmp_path / "p", some_texts(count=3))
    with ProfileReader(tmp_path / "p") as profile:
        header = profile.header
    check_profile(tiny_hash(), header)
    fewer = replace(header, tables=header.tables[:1])
    for spec, other in ((tiny_hash(4), header), (tiny_hash(compressed=39), header), (tiny_hash(), fewer)):
        with pytest.raises(FingerprintMismatchError, match=r"another hash.*profile again with this store"):
            check_profile(spec, other)
    with pytest.raises(ConfigError, match="counts keys"):
        check_profile(tiny_hash(), replace(header, kind=KEYS))


def test_the_share_that_was_held_out_is_no_part_of_the_hash() -> None:
    for held_out in (0.0, 0.1, 1.0):
        check_profile(tiny_hash(), profile_header(tiny_hash(), held_out))
