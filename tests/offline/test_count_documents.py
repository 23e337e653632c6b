"""Profiles count what collections.Counter counts, in bounded memory,
and merge to what one process would have made of all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.profiles import Documents, make_profile, merge_profiles
from support.repository import TESTS

from tierstore import kernels
from tierstore.decisions.item_statistics import TableGroup
from tierstore.decisions.replay import simulate
from tierstore.errors import BudgetError, ConfigError, FormatError
from tierstore.formats import profile as profile_format
from tierstore.formats.profile import KEYS, NGRAMS, Columns, ProfileHeader, ProfileReader
from tierstore.offline import count as counting
from tierstore.offline import count_documents as counting_documents
from tierstore.offline.count_documents import read_groups
from tierstore.offline.documents import Document, held_out_documents, held_out_fraction

HEADER = ProfileHeader(NGRAMS, (("layers.1", "a", (2, 3)), ("layers.4", "b", (2, 3))), 17, 0.3, 1.0)
KEY_HEADER = ProfileHeader(KEYS, (("layers.1", "a", (2, 3)), ("plain", "b", (1,))), 0, 0.3, 0.5)
TINY_BYTES = 128 * 50  # fifty items a run
Ids = Sequence[int]


def document_of(ids: Ids) -> Document:
    """A document of token ids as items: 3-grams of 17 bits an id, the newest first, id 0 where look-back has ended."""
    items = np.zeros((len(ids), 2), dtype=np.uint64)
    for place in range(len(ids)):
        newest, older, oldest = (ids[place - i] if place >= i else 0 for i in range(3))
        items[place, 1] = newest << 34 | older << 17 | oldest
    return Document(items, {"token_ids": np.array(ids, dtype=np.int32)}, len(ids))


def key_document_of(columns: Columns) -> Document:
    """A recorded stretch, of as many lookups as its last kept access says."""
    items = np.stack([columns["table"].astype(np.uint64) << np.uint64(32), columns["keys"].astype(np.uint64)], axis=1)
    items[:, 0] |= columns["order_index"]
    return Document(items, columns, int(columns["batch"].max(initial=-1)) + 1)


def documents_of(profile: ProfileReader) -> Iterator[Document]:
    for columns in held_out_documents(profile):
        yield key_document_of(columns) if profile.header.kind == KEYS else document_of(columns["token_ids"].tolist())


def is_held_out(ids: Ids, share: float = 0.3) -> bool:
    return kernels.crc32c(np.array(ids, dtype="<i4").tobytes()) < share * 2**32


def some_documents(seed: int, count: int = 60, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.choice([0, 1, 2, 2**17 - 1], int(rng.integers(0, longest))).tolist() for _ in range(count)]


def some_key_columns(seed: int, count: int = 30) -> list[Columns]:
    """Recorded stretches, some without any kept key."""
    rng, stretches = np.random.default_rng(seed), []
    for _ in range(count):
        size = int(rng.integers(0, 30))
        table = rng.integers(0, 2, size)
        stretches.append(
            {
                "table": table.astype(np.uint16),
                "order_index": np.where(table == 0, rng.integers(0, 2, size), 0).astype(np.uint8),
                "keys": rng.choice([0, 1, 2, 2**63 - 1], size),
                "batch": np.sort(rng.integers(0, 12, size)),
            }
        )
    return stretches


def analyse(groups: list[TableGroup], counts: dict[str, int]) -> dict[str, Any]:
    """A small analysis, which depends on all that a profile holds."""
    told: dict[str, Any] = {"tokens": counts["tokens"]}
    for group in groups:
        outcome = simulate(group.replay, group.replay.counts > 1, recency_sets=2, batch_tokens=3)
        columns = (group.classes.order_index, group.classes.counts, group.classes.num_items, group.classes.held_out)
        told[group.tables[0]] = {
            "distinct": group.distinct,
            "classes": [column.tolist() for column in columns],
            "hits": outcome.document_hits.tolist(),
            "document_ends": group.replay.document_ends.tolist(),
            "hashes": int(np.bitwise_xor.reduce(group.item_hashes)) if len(group.item_hashes) else 0,
        }
    return told


def make(path: Path, documents: list[list[int]], header: ProfileHeader = HEADER, **options: Any) -> dict[str, Any]:
    return make_profile(path, header, map(document_of, documents), analyse, **options)


def merge(path: Path, parts: Sequence[Path], **options: Any) -> dict[str, Any]:
    opened = [ProfileReader(part) for part in parts]
    try:
        return merge_profiles(path, opened, documents_of, analyse, **options)
    finally:
        for part in opened:
            part.close()


def counted_in(path: Path) -> tuple[dict[int, tuple[int, int]], list[list[int]]]:
    """All that a profile of n-grams holds: sums of each packed 3-gram, and the held-out documents."""
    sums = {}
    with ProfileReader(path) as profile:
        for items, columns in profile.items():
            for (high, low), (counted, held_out) in zip(items.tolist(), columns.tolist(), strict=True):
                sums[high << 64 | low] = counted, held_out
        return sums, [columns["token_ids"].tolist() for columns in held_out_documents(profile)]


def assert_counts(path: Path, footer: dict[str, Any], documents: list[list[int]], share: float = 0.3) -> None:
    """Holds a profile against a Counter of plain tuples, and its counts against the documents."""
    held = [ids for ids in documents if is_held_out(ids, share)]
    rest = [ids for ids in documents if not is_held_out(ids, share)]
    counters = []
    for part in (rest, held):
        grams = Counter[int]()
        for ids in part:
            padded = [0, 0, *ids]
            grams.update(padded[i + 2] << 34 | padded[i + 1] << 17 | padded[i] for i in range(len(ids)))
        counters.append(grams)
    sums, found = counted_in(path)
    assert list(sums) == sorted(sums)
    assert sums == {gram: (counters[0][gram], counters[1][gram]) for gram in counters[0] | counters[1]}
    assert found == held
    assert footer["counts"] == {
        "tokens": sum(map(len, documents)),
        "documents": len(documents),
        "held_out_tokens": sum(map(len, held)),
        "held_out_documents": len(held),
    }
    with ProfileReader(path) as profile:
        assert profile.footer == json.loads(json.dumps(footer))
        assert json.dumps(analyse(read_groups(profile, Documents(documents_of)), profile.counts)) == json.dumps(
            footer["analysis"]
        )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is cut into blocks is, at a few values."""
    monkeypatch.setattr(profile_format, "BLOCK_ITEMS", 11)
    monkeypatch.setattr(counting_documents, "BLOCK_VALUES", 13)
    monkeypatch.setattr(counting_documents, "ADDED_AT_ONCE", 30)
    monkeypatch.setattr(counting, "BLOCK_ITEMS_MIN", 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("memory_bytes", [128, TINY_BYTES, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_items_and_documents_are_what_a_counter_says_whatever_the_memory(
    tmp_path: Path, seed: int, memory_bytes: int
) -> None:
    documents = some_documents(seed)
    assert_counts(tmp_path / "p", make(tmp_path / "p", documents, memory_bytes=memory_bytes), documents)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=12), st.integers(0, 12))
def test_any_documents_cut_anywhere_merge_to_what_all_at_once_give(
    tmp_path: Path, documents: list[list[int]], cut: int
) -> None:
    footer = make(tmp_path / "whole", documents)
    assert_counts(tmp_path / "whole", footer, documents)
    for name, part in (("a", documents[:cut]), ("b", documents[cut:])):
        make(tmp_path / name, part)
    merge(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("length", [12, 13, 14, 26, 27, 200])
@pytest.mark.usefixtures("small_blocks")
def test_documents_longer_than_a_block_go_over_blocks(tmp_path: Path, length: int) -> None:
    documents = [[7], list(range(length)), [], list(range(length, 0, -1)), [1, 2]]
    footer = make(tmp_path / "p", documents, replace(HEADER, held_out=1.0))
    assert_counts(tmp_path / "p", footer, documents, share=1.0)
    with ProfileReader(tmp_path / "p") as profile:
        blocks = list(profile.held_out())
    lengths = [len(block["token_ids"]) for block in blocks]
    assert lengths[:-1] == [13] * (len(lengths) - 1)
    assert (
        np.concatenate([block["document_ends"] for block in blocks]).tolist()
        == np.cumsum([len(ids) for ids in documents]).tolist()
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("documents", [[[]], [[], []], [[], [1]], [[1], []], [list(range(13)), [], [5]]], ids=str)
def test_an_empty_document_is_one_wherever_it_stands(tmp_path: Path, documents: list[list[int]]) -> None:
    """It was counted and analysed but not written, so that a merged profile had fewer
    documents than one made at once."""
    header = replace(HEADER, held_out=1.0)
    assert_counts(tmp_path / "p", make(tmp_path / "p", documents, header), documents, share=1.0)
    merge(tmp_path / "merged", [tmp_path / "p"])
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "p").read_bytes()


def test_no_documents_give_a_profile_of_nothing(tmp_path: Path) -> None:
    assert_counts(tmp_path / "p", make(tmp_path / "p", []), [])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 60)])
def test_no_document_or_every_one_is_held_out_at_the_ends(tmp_path: Path, share: float, expected: int) -> None:
    footer = make(tmp_path / "p", some_documents(0), replace(HEADER, held_out=share))
    assert footer["counts"]["held_out_documents"] == expected


def test_equal_documents_share_their_fate_wherever_they_stand(tmp_path: Path) -> None:
    documents = some_documents(1, count=40)
    backwards = [*documents[::-1], *documents]
    footer, twice = make(tmp_path / "once", documents), make(tmp_path / "twice", backwards)
    assert 0 < footer["counts"]["held_out_documents"] < 40
    assert twice["counts"] == {name: 2 * count for name, count in footer["counts"].items()}
    sums, held = counted_in(tmp_path / "once")
    sums_twice, held_twice = counted_in(tmp_path / "twice")
    assert sums_twice == {gram: (2 * counted, 2 * held_out) for gram, (counted, held_out) in sums.items()}
    assert held_twice == [*held[::-1], *held]


def test_about_the_asked_share_is_held_out(tmp_path: Path) -> None:
    """Within five standard deviations of a fair draw."""
    documents = [[number, number % 7] for number in range(4000)]
    footer = make(tmp_path / "p", documents)
    assert abs(footer["counts"]["held_out_documents"] - 1200) < 5 * (4000 * 0.3 * 0.7) ** 0.5


def test_a_longer_trace_holds_out_a_smaller_fraction() -> None:
    shares = [held_out_fraction(tokens) for tokens in (0, 1, 16_000_000, 64_000_000, 4 * 10**12)]
    assert shares == [1 / 4, 1 / 4, 1 / 4, 1 / 16, 1e-6]


def test_every_phase_tells_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting_documents, "ADDED_AT_ONCE", 30)
    documents, told = some_documents(3), list[tuple[str, int, int | None]]()
    footer = make(tmp_path / "p", documents, on_progress=lambda *args: told.append(args))
    assert list(dict.fromkeys(phase for phase, _, _ in told)) == ["counting", "merging", "sorting"]
    counted = [done for phase, done, _ in told if phase == "counting"]
    assert len(counted) > 5
    assert counted == sorted(counted)
    assert (counted[0], counted[-1]) == (0, sum(map(len, documents)))
    merging = [(done, total) for phase, done, total in told if phase == "merging"]
    assert merging[0] == (0, None)
    assert merging[-1][0] == merging[-1][1] == len(counted_in(tmp_path / "p")[0])
    told.clear()
    assert merge(tmp_path / "m", [tmp_path / "p"] * 2, on_progress=lambda *args: told.append(args)) != footer
    counting_items = [(done, total) for phase, done, total in told if phase == "counting"]
    assert counting_items[-1][0] == counting_items[-1][1] == 2 * len(counted_in(tmp_path / "p")[0])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(3))
def test_recorded_keys_count_by_table_and_order_and_merge(tmp_path: Path, seed: int) -> None:
    stretches = some_key_columns(seed)
    parts = [stretches[:11], stretches[11:12], [], stretches[12:]]
    expected: dict[tuple[int, int], list[int]] = {}
    held = []
    for columns in stretches:
        content = b"".join(columns[name].tobytes() for name in ("table", "order_index", "keys"))
        column = int(kernels.crc32c(content) < 0.3 * 2**32)
        held += [columns] * column
        accesses = (columns[name].tolist() for name in ("table", "order_index", "keys"))
        for table, order_index, key in zip(*accesses, strict=True):
            expected.setdefault((table << 32 | order_index, key), [0, 0])[column] += 1
    for name, part in (("whole", stretches), *((str(number), part) for number, part in enumerate(parts))):
        make_profile(tmp_path / name, KEY_HEADER, map(key_document_of, part), analyse, memory_bytes=TINY_BYTES)
    with ProfileReader(tmp_path / "whole") as profile:
        found = {
            tuple(item): column.tolist()
            for items, sums in profile.items()
            for item, column in zip(items.tolist(), sums, strict=True)
        }
        assert found == expected
        for columns, stretch in zip(held_out_documents(profile), held, strict=True):
            assert {name: values.tolist() for name, values in columns.items()} == {
                name: values.tolist() for name, values in stretch.items()
            }
        assert analyse(read_groups(profile, Documents(documents_of)), profile.counts) == profile.footer["analysis"] | {
            name: told | {"distinct": tuple(told["distinct"])}
            for name, told in profile.footer["analysis"].items()
            if name != "tokens"
        }
    merge(tmp_path / "merged", [tmp_path / str(number) for number in range(4)], memory_bytes=TINY_BYTES)
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_keys_without_a_held_out_stretch_make_a_profile(tmp_path: Path) -> None:
    header = replace(KEY_HEADER, held_out=0.0)
    footer = make_profile(tmp_path / "p", header, map(key_document_of, some_key_columns(0)), analyse)
    assert footer["counts"]["held_out_documents"] == 0
    assert footer["analysis"]["layers.1"]["hits"] == []


def test_lookups_of_a_held_out_stretch_that_go_backwards_are_named(tmp_path: Path) -> None:
    columns = {
        "table": np.zeros(2, np.uint16),
        "order_index": np.zeros(2, np.uint8),
        "keys": np.arange(2),
        "batch": np.array([1, 0]),
    }
    with profile_format.ProfileWriter(tmp_path / "p", KEY_HEADER) as writer:
        writer.write_held_out(columns | {"document_ends": np.array([2])})
        counts = {"tokens": 2, "documents": 1, "held_out_tokens": 2, "held_out_documents": 1}
        writer.finish({"counts": counts})
    with ProfileReader(tmp_path / "p") as profile, pytest.raises(FormatError, match=r"lookups .* go backwards"):
        list(held_out_documents(profile))


OTHERS = {
    "another hash": replace(HEADER, tables=(("layers.1", "a", (2, 3)), ("layers.4", "other", (2, 3)))),
    "other tables": replace(HEADER, tables=HEADER.tables[:1]),
    "other bits": replace(HEADER, bits=18),
    "another share": replace(HEADER, held_out=0.31),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_profiles_that_do_not_fit_each_other_are_refused_by_name(tmp_path: Path, other: ProfileHeader) -> None:
    make(tmp_path / "first", some_documents(0))
    make(tmp_path / "second", some_documents(0), other)
    with pytest.raises(ConfigError, match=r"second is of other tables or settings than .*first.*same --held-out"):
        merge(tmp_path / "merged", [tmp_path / "first", tmp_path / "first", tmp_path / "second"])
    assert not (tmp_path / "merged").exists()


def test_a_profile_may_be_merged_into_its_own_file(tmp_path: Path) -> None:
    documents = some_documents(5)
    make(tmp_path / "a", documents[:30])
    make(tmp_path / "b", documents[30:])
    merge(tmp_path / "a", [tmp_path / "a", tmp_path / "b"])
    assert_counts(tmp_path / "a", make(tmp_path / "whole", documents), documents)


def test_held_out_documents_that_were_not_counted_refuse_the_merge(tmp_path: Path) -> None:
    make(tmp_path / "a", some_documents(6))
    with ProfileReader(tmp_path / "a") as profile, pytest.raises(FormatError, match="not those that it counted"):
        merge_profiles(tmp_path / "merged", [profile], lambda _: iter([]), analyse)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


class BrokenError(Exception):
    pass


def broken_after(count: int) -> Iterator[Document]:
    yield from map(document_of, some_documents(7, count))
    raise BrokenError


def break_down(*_: object) -> Any:
    raise BrokenError


@pytest.mark.parametrize("count", [0, 1, 20, 60])
def test_what_fails_midway_leaves_no_file_and_an_older_one_as_it_was(tmp_path: Path, count: int) -> None:
    make(tmp_path / "p", some_documents(8))
    before = (tmp_path / "p").read_bytes()
    with pytest.raises(BrokenError):
        make_profile(tmp_path / "p", HEADER, broken_after(count), analyse, memory_bytes=TINY_BYTES)
    with pytest.raises(BrokenError):
        make_profile(tmp_path / "p", HEADER, map(document_of, some_documents(7)), break_down, memory_bytes=TINY_BYTES)
    with ProfileReader(tmp_path / "p") as profile, pytest.raises(BrokenError):
        merge_profiles(tmp_path / "merged", [profile], lambda _: broken_after(count), analyse)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]
    assert (tmp_path / "p").read_bytes() == before


@pytest.mark.parametrize("call", ["write", "pwrite", "fsync", "rename"])
def test_a_disk_that_fails_at_any_call_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    documents = some_documents(9)
    real: Callable[..., Any] = getattr(os, call)
    for failing in range(1, 1000):
        calls = 0

        def fail(*arguments: object, failing: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(os, call, fail)
        message = ""
        try:
            make(tmp_path / "p", documents, memory_bytes=TINY_BYTES)
        except (OSError, BudgetError) as error:
            message = str(error)
        monkeypatch.setattr(os, call, real)
        assert ("No space left" in message) == (calls >= failing)
        if calls < failing:
            break
        if call != "fsync" or failing == 1:  # the folder's, which comes after the name, is too late to take it back
            assert list(tmp_path.iterdir()) == []
        (tmp_path / "p").unlink(missing_ok=True)
    assert failing > 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


CHILD = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from offline.test_count_documents import HEADER, analyse, document_of, some_documents
from support.profiles import make_profile
def documents():
    for number, ids in enumerate(some_documents(10)):
        if number == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        yield document_of(ids)
make_profile(sys.argv[2], HEADER, documents(), analyse, memory_bytes=128 * 50)
"""


def test_what_is_killed_midway_leaves_no_profile_and_the_next_run_clears_up(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", CHILD, str(TESTS), str(tmp_path / "p")]
    done = subprocess.run(arguments, timeout=120, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {entry.name for entry in tmp_path.iterdir()} <= {"p.new"}
    documents = some_documents(10)
    assert_counts(tmp_path / "p", make(tmp_path / "p", documents), documents)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


MEASURE = """
import sys
import numpy as np
from tierstore.formats.profile import NGRAMS, ProfileHeader
from tierstore.formats.profile import ProfileWriter
from tierstore.offline.count_documents import count_documents
from tierstore.offline.documents import Document
header = ProfileHeader(NGRAMS, (("t", "a", (2, 3, 4)),), 16, 0.01, 1.0)
rng = np.random.default_rng(0)
def documents():
    for _ in range(6000):
        items = np.zeros((1000, 2), dtype=np.uint64)
        items[:, 1] = rng.integers(0, 2**64, 1000, dtype=np.uint64)
        yield Document(items, {"token_ids": rng.integers(0, 2**16, 1000, dtype=np.int32)}, 1000)
def peak_kib():  # not ru_maxrss: it begins with what the parent had at the fork
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak_kib()
with ProfileWriter(sys.argv[1], header) as writer:
    count_documents(writer, documents(), memory_bytes=16 << 20)
    writer.finish({})
print(peak_kib() - before)
"""


def test_memory_is_that_of_the_counter_one_block_and_what_is_held_out(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "p")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 350 << 10  # 16 MiB of it are the counter's
