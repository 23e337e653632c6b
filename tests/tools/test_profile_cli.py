"""`tierstore profile` as a user calls it: tables and JSON, parts merged, and everything that it refuses, named."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from text_store import ORDERS, TABLES, TextStore, good, good_json, invoke, write_trace

from tierstore.tools.cli import run

NUM_PARTS = 4
AT_ONCE = 2
BUDGETS = ["dram_bytes", "lru", "mixed", "recency", "resident", "static"]
MIXED = [
    "high", "hit_rate", "low", "misses_per_token", "packed_reads_per_token", "reads_per_token", "recency_entries",
    "recency_share", "static_entries", "static_fraction", "static_share",
]  # fmt: skip


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that fails prints: one line, on standard error."""
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_json_has_the_keys_that_programs_rely_on(text: TextStore, tmp_path: Path) -> None:
    footer = good_json("profile", text.store, text.trace, "-o", tmp_path / "p.profile")
    assert sorted(footer) == ["about", "analysis", "counts", "kind"]
    assert footer["kind"] == "ngrams"
    num_tokens = sum(map(len, text.documents))
    held_out = footer["counts"].pop("held_out_tokens"), footer["counts"].pop("held_out_documents")
    assert footer["counts"] == {"tokens": num_tokens, "documents": len(text.documents)}
    assert 0 < held_out[0] < num_tokens / 2
    assert 0 < held_out[1] < len(text.documents) / 2
    (group,) = footer["analysis"]["groups"]
    assert sorted(group) == [
        "cost", "distinct", "first_touch", "interval", "orders", "points", "recommended", "replay", "sampling", "source", "steps",
        "tables",
    ]  # fmt: skip
    assert (group["tables"], group["orders"], sorted(group["distinct"])) == (TABLES, [2, 3, 4], ORDERS[:3])
    for point in group["points"]:
        assert sorted(point) == BUDGETS
        assert sorted(point["mixed"]) == MIXED
        for order in ORDERS:
            low, rate, high = (point["mixed"][name][order] for name in ("low", "hit_rate", "high"))
            assert 0 <= low <= rate <= high <= 1
    assert {choice["name"] for choice in group["recommended"]} <= {"frugal", "knee", "generous", "whole"}


def test_people_get_tables_and_what_was_counted(text: TextStore, tmp_path: Path) -> None:
    shown = good("profile", text.store, text.trace, "-o", tmp_path / "p.profile").stdout
    for words in (
        "Recommended budgets",
        "Hit rate by policy",
        "by order",
        "NVMe reads a token",
        "Decoding side by side",
    ):
        assert words in shown
    assert f"{sum(map(len, text.documents)):,} tokens of {len(text.documents)} documents" in shown
    assert "64 MiB" in shown
    assert "128 MiB" not in shown, "so much memory holds the tables whole"


def test_parts_counted_by_four_processes_and_merged_are_the_profile_made_at_once(
    text: TextStore, tmp_path: Path
) -> None:
    parts = [tmp_path / f"{number}.profile" for number in range(NUM_PARTS)]
    bounds = [len(text.documents) * number // NUM_PARTS for number in range(NUM_PARTS + 1)]
    commands = []
    for number, part in enumerate(parts):
        trace = write_trace(part.with_suffix(".trace"), text.documents[bounds[number] : bounds[number + 1]])
        commands.append([sys.executable, "-m", "tierstore.tools.cli", "profile", text.store, trace, "-o", part])
    for first in range(0, NUM_PARTS, AT_ONCE):
        processes = [subprocess.Popen(each, stdout=subprocess.DEVNULL) for each in commands[first : first + AT_ONCE]]
        assert [process.wait(timeout=300) for process in processes] == [0] * AT_ONCE
    good("profile", text.store, "--merge", *parts, "-o", tmp_path / "merged.profile")
    assert (tmp_path / "merged.profile").read_bytes() == text.profile.read_bytes()


def test_a_profile_may_be_replaced_by_the_merge_that_reads_it(text: TextStore, tmp_path: Path) -> None:
    path = tmp_path / "p.profile"
    path.write_bytes(text.profile.read_bytes())
    good("profile", text.store, "--merge", path, "-o", path)
    assert path.read_bytes() == text.profile.read_bytes()


def test_without_held_out_documents_counts_are_kept_and_the_lack_is_said(text: TextStore, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.trace", text.documents[:3])
    arguments = "profile", text.store, trace, "--held-out", "0.000001", "-o", tmp_path / "p.profile"
    shown = good(*arguments).stdout
    assert "0 held out" in shown
    assert "larger --held-out" in shown
    record = good_json(*arguments)
    assert record["analysis"] == {"groups": []}
    assert record["counts"]["tokens"] == sum(map(len, text.documents[:3]))


def test_a_trace_of_no_tokens_gives_a_profile_of_none(text: TextStore, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.trace", [])
    assert "0 tokens of 0 documents" in good("profile", text.store, trace, "-o", tmp_path / "p.profile").stdout


def test_ids_outside_the_vocabulary_are_refused_before_the_counting(
    text: TextStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "t.trace", [*text.documents[:2], np.array([1, 70_000, 2])])
    error = error_of(capsys, "profile", text.store, text.trace, trace, "-o", tmp_path / "p.profile")
    assert f"{trace}: token ids go up to 70000, the vocabulary of the store's model has {text.vocab_size}" in error
    assert "profile with the store" in error
    assert list(tmp_path.iterdir()) == [trace]


def test_files_of_another_kind_or_cut_short_are_named(
    text: TextStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = "-o", tmp_path / "p.profile"
    assert "is a profile, expected a trace" in error_of(capsys, "profile", text.store, text.profile, *output)
    assert "is a trace, expected a profile" in error_of(capsys, "profile", text.store, text.trace, "--merge", *output)
    whole = text.trace.read_bytes()
    cut = tmp_path / "cut.trace"
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        error = error_of(capsys, "profile", text.store, cut, *output)
        assert str(cut) in error
        assert str(size) in error
    assert list(tmp_path.iterdir()) == [cut]


def test_parts_of_another_hash_or_another_share_are_not_merged(
    text: TextStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good("synth", tmp_path / "model", "--family", "deepseek_v41", "--rows-per-head", 300, "--seed", 4)
    good("build", tmp_path / "model", tmp_path / "store")
    output = "-o", tmp_path / "p.profile"
    error = error_of(capsys, "profile", tmp_path / "store", "--merge", text.profile, *output)
    assert "another hash" in error
    assert "profile again with this store" in error
    other = tmp_path / "other.profile"
    good("profile", text.store, text.trace, "--held-out", 0.5, "-o", other)
    error = error_of(capsys, "profile", text.store, "--merge", text.profile, other, *output)
    assert "held_out=0.5" in error
    assert "held_out=0.25" in error
    assert "the same --held-out" in error
    assert "leave it out" in error_of(
        capsys, "profile", text.store, "--merge", text.profile, "--held-out", 0.5, *output
    )
    assert not (tmp_path / "p.profile").exists()


def test_a_disk_that_fills_is_named_and_the_old_profile_stays(
    text: TextStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.profile"
    path.write_bytes(b"the old one")
    real, writes = os.write, 0

    def full(fd: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        error = error_of(capsys, "profile", text.store, text.trace, "-o", path)
    assert f"{path}, after " in error
    assert "bytes of it: No space left on device: " in error
    assert "free some disk" in error
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"the old one", [path])


def test_a_report_that_could_not_be_written_is_refused_before_the_counting(
    text: TextStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "profile", text.store, text.trace, "-o", tmp_path / "p.profile", "--report"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "needs matplotlib" in error_of(capsys, *arguments, tmp_path / "r.html")
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    assert "a folder that there is" in error_of(capsys, *arguments, tmp_path / "none" / "r.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "half"])
def test_a_share_that_is_none_is_wrong_usage(text: TextStore, tmp_path: Path, share: str) -> None:
    arguments = "profile", text.store, text.trace, "-o", tmp_path / "p.profile", "--held-out", share
    assert invoke(*arguments).exit_code == 2
