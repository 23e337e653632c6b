"""`tierstore profile` as a user calls it: tables and JSON, parts merged, and everything that it refuses, named."""

from __future__ import annotations

import datetime
import errno
import html
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.text_store import ORDERS, TABLES, TextStore, good, good_json, invoke, write_trace

import tierstore
from tierstore.tools.cli import run
from tierstore.tools.report.tables import exact_bytes

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
        "cost", "distinct", "first_touch", "interval", "orders", "points", "recommended", "replay", "sampling",
        "source", "steps", "tables",
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
    assert "32 MiB" in shown
    assert "64 MiB" not in shown, "with a tenth more the tables fit whole"
    assert "128 MiB" not in shown, "so much memory holds the tables whole"


def test_inspect_says_what_a_profile_holds(text: TextStore) -> None:
    record = good_json("inspect", text.profile)
    assert (record["kind"], record["profile"]) == ("profile", "ngrams")
    assert (record["tokens"], record["documents"]) == (sum(map(len, text.documents)), len(text.documents))
    assert [table["name"] for table in record["tables"]] == TABLES
    assert f"recommended: --dram {record['recommended_dram_bytes'] >> 20}" in good("inspect", text.profile).stdout


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
    assert "free some" in error
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"the old one", [path])


def test_a_report_that_could_not_be_written_is_refused_before_the_counting(
    text: TextStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "profile", text.store, text.trace, "-o", tmp_path / "p.profile", "--report"
    assert "a folder that there is" in error_of(capsys, *arguments, tmp_path / "none" / "r.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "half"])
def test_a_share_that_is_none_is_wrong_usage(text: TextStore, tmp_path: Path, share: str) -> None:
    arguments = "profile", text.store, text.trace, "-o", tmp_path / "p.profile", "--held-out", share
    assert invoke(*arguments).exit_code == 2


def one_document(text: TextStore, path: Path, num_documents: int = 1) -> Path:
    """A trace of all text as so few documents, as token files without document ends give it."""
    ids = np.concatenate(text.documents)
    return write_trace(path, np.array_split(ids, num_documents))


@pytest.mark.parametrize("num_documents", [1, 3])
def test_few_long_documents_are_cut_into_stretches_some_of_them_held_out(
    text: TextStore, tmp_path: Path, num_documents: int
) -> None:
    """One document was held out whole or not at all, and the advice, a larger --held-out, did not help."""
    trace = one_document(text, tmp_path / "t.trace", num_documents)
    footer = good_json("profile", text.store, trace, "-o", tmp_path / "p.profile")
    num_tokens = sum(map(len, text.documents))
    assert footer["counts"]["tokens"] == num_tokens
    assert 60 <= footer["counts"]["documents"] <= 70
    assert 0.1 < footer["counts"]["held_out_tokens"] / num_tokens < 0.45
    (note,) = footer["about"]["notes"]
    for words in (f"{num_tokens:,} tokens are", "cut into stretches of", "--eos ID"):
        assert words in note
    good("plan", text.store, tmp_path / "p.profile", "--dram", "8MiB", "--dry-run")


def test_a_trace_with_document_boundaries_is_not_cut_elsewhere(text: TextStore, tmp_path: Path) -> None:
    footer = good_json("profile", text.store, text.trace, "-o", tmp_path / "p.profile")
    assert footer["counts"]["documents"] == len(text.documents)
    assert footer["about"]["notes"] == []


def test_a_short_record_of_keys_is_cut_too(text: TextStore, tmp_path: Path) -> None:
    """20,000 accesses were one stretch and a bit, so that more often than not nothing was held out."""
    keys = np.random.default_rng(0).zipf(1.3, (2000, 3)).astype(np.int64)
    with tierstore.open(text.store, dram="8MiB", placement="none") as store:
        store.start_trace(tmp_path / "keys.trace", share=1.0)
        for start in range(0, len(keys), 20):
            store[TABLES[0]].lookup(keys[start : start + 20])
        store.stop_trace()
    counts = good_json("profile", text.store, tmp_path / "keys.trace", "-o", tmp_path / "p.profile")["counts"]
    assert counts["documents"] > 30
    assert 0 < counts["held_out_documents"] < counts["documents"] / 2


def test_every_phase_is_told_in_order_with_its_end(text: TextStore, tmp_path: Path) -> None:
    arguments = "profile", text.store, text.trace, "-o", tmp_path / "p.profile", "--report", tmp_path / "r.html"
    lines = good(*arguments).stderr.splitlines()
    phases = list(dict.fromkeys(line.partition(":")[0] for line in lines))
    assert phases == [
        "counting", "merging", "sorting", "replaying", "intervals", "decoding", "checking", "writing", "drawing",
    ]  # fmt: skip
    num_tokens = sum(map(len, text.documents))
    for words in (f"counting: 100 %, {num_tokens:,} of {num_tokens:,} tokens", "replaying: 100 %", "decoding: 100 %"):
        assert any(line.startswith(words) for line in lines)
    merged = good("profile", text.store, "--merge", tmp_path / "p.profile", "-o", tmp_path / "m.profile").stderr
    assert merged.startswith("counting: 100 %, ")
    planned = good("plan", text.store, tmp_path / "p.profile", "--dram", "8MiB", "--dry-run").stderr
    ended = [line.partition(":")[0] for line in planned.splitlines() if "100 %" in line]
    assert list(dict.fromkeys(ended)) == ["reading", "trying"]  # what lasts says it once more before its end


def test_the_curve_ends_with_the_budget_at_which_plan_says_that_tables_fit(text: TextStore, tmp_path: Path) -> None:
    shown = good("profile", text.store, text.trace, "-o", tmp_path / "p.profile").stdout
    (group,) = good_json("profile", text.store, text.trace, "-o", tmp_path / "p.profile")["analysis"]["groups"]
    *cached, whole = group["points"]
    assert [point["resident"] for point in cached] == [False] * len(cached)
    assert whole["resident"] is True
    assert whole["mixed"]["hit_rate"] == dict.fromkeys(ORDERS, 1.0)
    assert (whole["mixed"]["low"]["all"], whole["mixed"]["reads_per_token"]) == (1.0, 0.0)
    assert (group["recommended"][-1]["name"], group["recommended"][-1]["dram_bytes"]) == ("whole", whole["dram_bytes"])
    assert f"{exact_bytes(whole['dram_bytes'])} (whole)" in shown
    for budget, resident in ((whole["dram_bytes"], True), (whole["dram_bytes"] * 127 // 128, False)):
        plan = good_json("plan", text.store, tmp_path / "p.profile", "--dram", budget, "--dry-run")
        assert plan["groups"][0]["resident"] is resident
    for point in cached[1:]:  # the plan tries other divisions, the curve a share of the steps
        plan = good_json("plan", text.store, tmp_path / "p.profile", "--dram", point["dram_bytes"], "--dry-run")
        assert plan["groups"][0]["hit_rate"]["all"] == pytest.approx(point["mixed"]["hit_rate"]["all"], abs=0.01)


def test_store_inputs_date_and_next_command_are_said_everywhere(text: TextStore, tmp_path: Path) -> None:
    output, page = tmp_path / "it's mine.profile", tmp_path / "r.html"
    arguments = "profile", text.store, text.trace, "-o", output, "--report", page
    shown = good(*arguments).stdout
    footer = good_json(*arguments)
    about = footer["about"]
    (group,) = footer["analysis"]["groups"]
    names = [choice["name"] for choice in group["recommended"]]
    knee = group["recommended"][names.index("knee") if "knee" in names else 0]["dram_bytes"]
    assert (about["store"], about["inputs"]) == (str(text.store), [str(text.trace)])
    assert abs(datetime.datetime.fromisoformat(about["made"]).timestamp() - time.time()) < 300
    command = shlex.split(about["next"])
    assert command == ["tierstore", "plan", str(text.store), str(output), "--dram", f"{knee >> 20}MiB"]
    assert good_json(*command[1:], "--dry-run")["dram_bytes"] == knee
    written = html.unescape(page.read_text())
    for words in (about["store"], about["inputs"][0], about["next"]):
        assert f": {words}" in shown
        assert words in written
    assert about["made"] in written


def test_a_profile_of_which_all_is_held_out_says_so(text: TextStore, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.trace", text.documents[:20])
    shown = good("profile", text.store, trace, "-o", tmp_path / "p.profile", "--held-out", "0.999999").stdout
    assert "note: all 20 documents were held out, so that nothing was counted" in shown
    assert "next: " not in shown


def test_names_that_a_terminal_would_act_on_are_shown_as_text(text: TextStore, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t\x1b[31m.trace", text.documents[:20])
    shown = good("profile", text.store, trace, "-o", tmp_path / "p.profile").stdout
    assert "\x1b" not in shown
    assert "t\\x1b[31m.trace" in shown
