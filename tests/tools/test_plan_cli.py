"""`tierstore plan` as a user calls it; and the promise of it: what is predicted is what the store then measures."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.device import DEVICE
from support.marks import slow_but
from support.text_store import ORDERS, TABLE_BYTES, TABLES, TextStore, good, good_json, write_trace

import tierstore
from engram_adapter import HashSpec, open_profile
from tests.tools.test_profile_cli import error_of
from tierstore.formats.catalog import read_catalog
from tierstore.formats.profile import ProfileReader
from tierstore.offline import placement_file
from tierstore.offline import plan as planning
from tierstore.offline.documents import held_out_documents
from tierstore.offline.place import choose_entries, place_entries
from tierstore.tools import plan as command

DRAM = 16 << 20
GROUP = [
    "first_touch_share", "hbm_entries", "hbm_share", "high", "hit_rate", "low", "nvme_entries", "reads_per_token",
    "reads_per_token_unpacked", "recency_sets", "recency_share", "resident", "static_entries", "static_fraction",
    "static_share", "steps_without_read", "tables",
]  # fmt: skip
RATES = ["first_touch_share", "hbm_share", "high", "hit_rate", "low", "recency_share", "static_share"]


class CountedOnly(ProfileReader):
    """A profile that knows nothing of what its held-out documents held, as a prediction must not."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.counts = self.counts | {
            "tokens": self.counts["tokens"] - self.counts["held_out_tokens"],
            "held_out_tokens": 0,
        }

    def items(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for items, sums in super().items():
            counted = sums[:, 0] > 0
            yield items[counted], sums[counted] * [1, 0]


def measured_rates(
    store: tierstore.Store, spec: HashSpec, documents: list[np.ndarray], batch_tokens: int
) -> dict[str, Any]:
    """Hit rates by table and order of documents, looked up in batches of so many tokens,
    one document after the other."""
    for layer in spec.layers:
        keys = np.concatenate([spec.keys(ids[None].astype(np.int64), layer)[0] for ids in documents])
        for start in range(0, len(keys), batch_tokens):
            store[spec.table_name(layer)].lookup(keys[start : start + batch_tokens])
    rates = {}
    for name, counts in store.stats()["tables"].items():
        of_order = {str(order): tiers for order, tiers in counts["orders"].items()} | {"all": counts["hits"]}
        rates[name] = {order: tiers["dram"] / sum(tiers.values()) for order, tiers in of_order.items()}
    return rates


@pytest.mark.parametrize(
    ("dram", "nvme", "batch_tokens"),
    slow_but([(DRAM, 4 << 20, 16)], [(DRAM, 0, 1), (DRAM, 4 << 20, 16), (2 * DRAM, 0, 256)], several=True),
)
def test_what_is_predicted_for_held_out_documents_is_what_the_store_then_measures(
    text: TextStore, own: Path, dram: int, nvme: int, batch_tokens: int
) -> None:
    planned = tierstore.plan(own, open_profile(own, text.profile), dram, 0, nvme, batch_tokens=batch_tokens)
    with CountedOnly(text.profile) as counted:
        place_entries(own, choose_entries(read_catalog(own), planned, counted))
        documents = [columns["token_ids"] for columns in held_out_documents(counted)]
    (plan,) = planned.groups
    assert plan.static_entries > 0
    with tierstore.open(own, dram=dram, io="mmap") as store:  # through the page cache: fast, and counted alike
        placed = store.stats()["placement"]
        assert abs(placed["static_entries"][TABLES[0]] - plan.static_entries) <= 0.01 * plan.static_entries + 1
        assert abs(placed["recency_sets"][TABLES[0]] - plan.recency_sets) <= 0.01 * plan.recency_sets + 1
        measured = measured_rates(store, HashSpec.from_store(store), documents, batch_tokens)
        stats = store.stats()
    for name in TABLES:
        assert measured[name] == pytest.approx(plan.hit_rate, abs=0.005), "within half a point, by order and in all"
    assert (stats["entries_read"] > 0) == (plan.nvme_entries > 0)


def test_json_has_the_keys_that_programs_rely_on(text: TextStore, own: Path) -> None:
    record = good_json("plan", own, text.profile, "--dram", DRAM, "--hbm", "1MiB", "--nvme-entries", "4MiB")
    assert sorted(record) == ["dram_bytes", "epoch", "groups", "hbm_bytes", "held_out_tokens", "nvme_bytes", "why"]
    assert (record["dram_bytes"], record["hbm_bytes"], record["nvme_bytes"]) == (DRAM, 1 << 20, 4 << 20)
    assert (record["epoch"], record["why"]) == (1, "asked for")
    (group,) = record["groups"]
    assert sorted(group) == GROUP
    assert group["tables"] == TABLES
    for name in RATES:
        assert list(group[name]) == ORDERS
        assert all(0 <= rate <= 1 for rate in group[name].values())
    for order in ORDERS:
        parts = sum(group[name][order] for name in ("hbm_share", "static_share", "recency_share"))
        assert parts == pytest.approx(group["hit_rate"][order], abs=1e-5)
        assert group["low"][order] <= group["hit_rate"][order] <= group["high"][order]


def test_hbm_and_packed_entries_are_counted_and_bring_what_they_say(text: TextStore, own: Path) -> None:
    plain = good_json("plan", own, text.profile, "--dram", DRAM, "--dry-run")["groups"][0]
    more = good_json("plan", own, text.profile, "--dram", DRAM, "--hbm", "4MiB", "--nvme-entries", "8MiB")["groups"][0]
    record_bytes = 2128  # 8 rows of 264 bytes, and the trailer of 16
    with tierstore.open(own, dram=DRAM, hbm="4MiB", device=DEVICE) as store:
        placement = store.stats()["placement"]
    assert placement["hbm_entries"] == pytest.approx(dict.fromkeys(TABLES, more["hbm_entries"]), abs=2)
    assert 0.8 * (2 << 20) / record_bytes < more["hbm_entries"] < (2 << 20) / record_bytes
    static = sum(placement["static_entries"].values()) / len(TABLES)  # some of those that HBM holds may lie there too
    assert more["static_entries"] == pytest.approx(static, abs=512)
    assert more["nvme_entries"] == pytest.approx(
        (8 << 20) / len(TABLES) / record_bytes, abs=more["static_entries"] + 512
    )
    assert (plain["hbm_entries"], plain["nvme_entries"]) == (0, 0)
    assert plain["reads_per_token"] == plain["reads_per_token_unpacked"]
    assert more["reads_per_token"] < more["reads_per_token_unpacked"] < plain["reads_per_token"]
    assert more["hit_rate"]["all"] > plain["hit_rate"]["all"]
    assert more["hbm_share"]["all"] > 0
    (epoch,) = good_json("epochs", own)
    entries = more["hbm_entries"] + more["static_entries"] + more["nvme_entries"]
    assert epoch["entries"] == pytest.approx(dict.fromkeys(TABLES, entries), rel=0.01)
    assert epoch["details"]["plan"]["groups"][0]["hbm_entries"] == more["hbm_entries"]


def test_where_dram_holds_whole_tables_a_plan_places_what_goes_to_hbm(text: TextStore, own: Path) -> None:
    said = good("plan", own, text.profile, "--dram", "1GiB", "--hbm", "1MiB").output
    assert "HBM 1.00 MiB" in said
    assert "fits its share of DRAM whole: " in said
    with tierstore.open(own, dram="1GiB", hbm="1MiB", device=DEVICE) as store:
        stats = store.stats()
        assert stats["memory"]["resident_tables"] == TABLES
        assert min(stats["placement"]["hbm_entries"].values()) > 100
    assert "nothing to place" in good("plan", own, text.profile, "--dram", "1GiB").output
    assert read_catalog(own).epoch is None


@pytest.mark.slow
def test_packed_entries_beyond_all_that_were_counted_cost_no_memory(text: TextStore, own: Path) -> None:
    """Room was set aside for an index of entries that there are not: with a generous size none was static any more."""
    some, all_of_them, more = (
        good_json("plan", own, text.profile, "--dram", 2 * DRAM, "--nvme-entries", size, *options)["groups"][0]
        for size, *options in (("8MiB", "--dry-run"), ("2GiB", "--dry-run"), ("1TiB",))  # written once: a gigabyte
    )
    assert more == all_of_them
    assert more["static_entries"] > 0
    assert more["hit_rate"]["all"] > 0.9 * some["hit_rate"]["all"]
    assert more["reads_per_token"] < some["reads_per_token"]
    with tierstore.open(own, dram=2 * DRAM) as store:
        static_entries = store.stats()["placement"]["static_entries"][TABLES[0]]
    assert static_entries == pytest.approx(more["static_entries"], rel=0.01)


def test_people_get_the_plan_and_what_was_made(text: TextStore, own: Path) -> None:
    shown = good("plan", own, text.profile, "--dram", DRAM).stdout
    for words in (
        "DRAM 16.00 MiB (asked for)",
        "dram static",
        "first seen",
        "left to recency",
        "NVMe reads a token",
        "95 %",
    ):
        assert words in shown
    assert f"{own} opens with epoch 1 from now on" in "".join(shown.splitlines())
    with tierstore.open(own, dram=DRAM) as store:
        assert store.stats()["placement"]["epoch"] == 1


def test_a_dry_run_writes_nothing(text: TextStore, own: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*") if path.is_file() and "lock" not in path.name}
    record = good_json("plan", own, text.profile, "--dram", DRAM, "--dry-run")
    assert "epoch" not in record
    after = {path: path.stat().st_mtime_ns for path in own.rglob("*") if path.is_file() and "lock" not in path.name}
    assert after == before
    assert good_json("epochs", own) == []


def test_without_dram_the_knee_is_recommended_and_the_reason_said(
    text: TextStore, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProfileReader(text.profile) as profile:
        recommended = profile.footer["analysis"]["groups"][0]["recommended"]
    names = [choice["name"] for choice in recommended]
    knee = recommended[names.index("knee") if "knee" in names else 0]
    record = good_json("plan", own, text.profile, "--dry-run")
    assert record["dram_bytes"] == knee["dram_bytes"]
    assert knee["why"] in record["why"]
    shown = " ".join(good("plan", own, text.profile, "--dry-run").stdout.split())
    assert f"({record['why']})" in shown
    monkeypatch.setattr(planning, "available_memory", lambda: (knee["dram_bytes"], "machine"))
    record = good_json("plan", own, text.profile, "--dry-run")
    assert record["dram_bytes"] == knee["dram_bytes"] // 2
    assert "half of the memory" in record["why"]
    assert "MiB" in record["why"]


def test_tables_that_fit_whole_need_no_placement(text: TextStore, own: Path) -> None:
    good("plan", own, text.profile, "--dram", DRAM)
    shown = good("plan", own, text.profile, "--dram", 2 * TABLE_BYTES).stdout
    assert "fits its share of DRAM whole" in shown
    assert "opens without a placement from now on" in " ".join(shown.split())
    record = good_json("plan", own, text.profile, "--dram", 2 * TABLE_BYTES)
    assert (record["epoch"], record["groups"][0]["resident"]) == (None, True)
    with tierstore.open(own, dram=2 * TABLE_BYTES) as store:
        assert store.stats()["placement"]["epoch"] is None
        assert store.stats()["memory"]["resident_tables"] == TABLES
    assert [epoch["current"] for epoch in good_json("epochs", own)] == [False], "the old one stays, to be used again"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dram", "10KiB"], ["10240 bytes", "is below the", "ask for more"]),
        (["--dram", "900TiB"], [str(900 << 40), "bytes", "left; ask for less", "--dry-run", "--for-machine 900TiB"]),
        (["--dram", "8GiB", "--for-machine", "4GiB"], [str(8 << 30), f"--for-machine has {4 << 30}", "ask for less"]),
        (["--dram", "8MiB", "--for-machine", "big"], ["--for-machine: 'big' is not a size"]),
        (["--dram", "256KiB", "--nvme-entries", "60MiB"], ["262144 bytes", "placement's index", "place less"]),
        (["--dram", "much"], ["--dram: 'much' is not a size"]),
        (["--dram", "8MiB", "--hbm", "-1"], ["--hbm: '-1' is not a size"]),
    ],
    ids=str,
)
def test_budgets_that_cannot_be_are_refused_with_both_numbers(
    text: TextStore, own: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    error = error_of(capsys, "plan", own, text.profile, *options)
    for each in words:
        assert each in error
    assert not read_catalog(own).placements


def test_profiles_that_cannot_be_planned_with_are_named(
    text: TextStore, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is a trace, expected a profile" in error_of(capsys, "plan", own, text.trace, "--dram", DRAM)
    whole = bytearray(text.profile.read_bytes())
    path = tmp_path / "bad.profile"
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        error = error_of(capsys, "plan", own, path, "--dram", DRAM)
        assert str(path) in error
        assert str(size) in error
    for place_of_version, message in ((8, "upgrade"), (len(whole) // 2, "")):
        changed = whole.copy()
        changed[place_of_version] ^= 0xFF
        path.write_bytes(changed)
        error = error_of(capsys, "plan", own, path, "--dram", DRAM)
        assert str(path) in error
        assert message in error
    assert not read_catalog(own).placements


def test_a_profile_of_another_hash_is_refused(
    text: TextStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good("synth", tmp_path / "model", "--family", "deepseek_v41", "--rows-per-head", 300, "--seed", 4)
    good("build", tmp_path / "model", tmp_path / "store")
    error = error_of(capsys, "plan", tmp_path / "store", text.profile, "--dram", DRAM)
    theirs, ours = (
        read_catalog(store).tables[TABLES[0]].spec.fingerprint for store in (text.store, tmp_path / "store")
    )
    assert "another hash" in error
    assert theirs in error
    assert ours in error
    assert "profile again with this store" in error


@pytest.mark.parametrize("options", [[], ["--dram", "8MiB"]], ids=str)
def test_profiles_without_held_out_documents_are_refused(
    text: TextStore, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    trace = write_trace(tmp_path / "t.trace", text.documents[:3])
    good("profile", own, trace, "--held-out", "0.000001", "-o", tmp_path / "p.profile")
    error = error_of(capsys, "plan", own, tmp_path / "p.profile", *options)
    assert "0 of its 65 documents are held out" in error
    assert "larger --held-out" in error


def test_any_budget_may_be_looked_at_and_another_machine_planned_for(
    text: TextStore, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (planning, command):
        monkeypatch.setattr(module, "available_memory", lambda: (1 << 20, "cgroup"))
    shown = good("plan", own, text.profile, "--dram", "900TiB", "--dry-run").stdout
    assert "fits its share of DRAM whole" in shown
    assert "more than this cgroup has left, 1.00 MiB: a plan for another one" in shown
    record = good_json("plan", own, text.profile, "--dry-run", "--for-machine", "6MiB")
    assert record["dram_bytes"] == 3 << 20
    assert "half of the memory that is there" in record["why"]
    assert good_json("plan", own, text.profile, "--dram", DRAM, "--for-machine", "128GiB")["epoch"] == 1
    assert (
        "another one"
        not in good("plan", own, text.profile, "--dram", DRAM, "--for-machine", "1GiB", "--dry-run").stdout
    )


@pytest.mark.parametrize("share", ["0.000001", "0.999999"], ids=["nothing held out", "nothing counted"])
def test_a_profile_that_tests_nothing_leaves_a_good_placement_as_it_is(
    text: TextStore, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str
) -> None:
    """With all documents held out nothing was counted, and the plan to place nothing replaced the placement."""
    good("plan", own, text.profile, "--dram", DRAM)
    good("profile", own, text.trace, "--held-out", share, "-o", tmp_path / "p.profile")
    words = "nothing is counted" if share.startswith("0.9") else "0 of its 61 documents are held out"
    for options in ([], ["--dry-run"], ["--untested"] if share.startswith("0.9") else []):
        error = error_of(capsys, "plan", own, tmp_path / "p.profile", "--dram", DRAM, *options)
        assert words in error
        assert "The store's placement stays as it is" in error
    with tierstore.open(own, dram=DRAM) as store:
        assert store.stats()["placement"]["epoch"] == 1


def test_told_to_a_plan_places_by_counts_alone_and_says_so(text: TextStore, own: Path, tmp_path: Path) -> None:
    good("profile", own, text.trace, "--held-out", "0.000001", "-o", tmp_path / "p.profile")
    shown = good("plan", own, tmp_path / "p.profile", "--dram", DRAM, "--untested").stdout
    assert "not tested, because the profile holds nothing back" in shown
    assert "100.0 %" not in shown
    tested = good_json("plan", own, text.profile, "--dram", DRAM, "--untested", "--dry-run")
    assert tested == good_json("plan", own, text.profile, "--dram", DRAM, "--dry-run"), (
        "where there is a test, it counts"
    )
    with tierstore.open(own, dram=DRAM) as store:
        assert store.stats()["placement"]["epoch"] == 1
        spec = HashSpec.from_store(store)
        ids = np.concatenate(text.documents)[None].astype(np.int64)
        keys = spec.keys(ids, spec.layers[0])[0]
        pairs = keys[:, 0]
        hottest = np.unique(pairs, return_counts=True)
        hottest_keys = np.zeros((50, keys.shape[1]), dtype=np.int64) - 1
        hottest_keys[:, 0] = hottest[0][np.argsort(-hottest[1])[:50]]
        tiers = store[TABLES[0]].explain(hottest_keys)
        assert (np.asarray(tiers)[:, 0] == "static").mean() > 0.9, "what is most frequent is static"


def test_a_disk_that_fills_while_placing_keeps_the_old_epoch(
    text: TextStore, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good("plan", own, text.profile, "--dram", DRAM)
    files = sorted((own / "placements").iterdir())

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(placement_file, "write_all", full)
        error = error_of(capsys, "plan", own, text.profile, "--dram", 2 * DRAM)
    assert "No space left on device: " in error
    assert "the store keeps epoch 1" in error
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        error = error_of(capsys, "plan", own, text.profile, "--dram", 2 * DRAM)
    assert "(1000 bytes) are free" in error
    assert "free some" in error
    assert sorted((own / "placements").iterdir()) == files
    with tierstore.open(own, dram=DRAM) as store:
        assert store.stats()["placement"]["epoch"] == 1


def test_a_plan_of_a_store_that_there_is_not_makes_none(
    text: TextStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no store" in error_of(capsys, "plan", tmp_path / "none", text.profile, "--dram", DRAM)
    assert not list(tmp_path.iterdir())


def test_a_sample_of_keys_predicts_and_all_of_them_can_be_placed(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was not recorded cannot be placed: a plan of a sample promised entries that it had no keys of."""
    keys = np.random.default_rng(0).zipf(1.3, (6000, 3)).astype(np.int64)
    for share in (0.25, 1.0):
        with tierstore.open(own, dram=DRAM, placement="none") as store:
            store.start_trace(tmp_path / "keys.trace", share=share)
            for start in range(0, len(keys), 50):
                store[TABLES[0]].lookup(keys[start : start + 50])
            store.stop_trace()
        footer = good_json("profile", own, tmp_path / "keys.trace", "-o", tmp_path / "keys.profile", "--held-out", 0.5)
        assert footer["kind"] == "keys"
        if share < 1:
            refused = error_of(capsys, "plan", own, tmp_path / "keys.profile", "--dram", DRAM)
            assert "a sample of 0.25 of the keys" in refused
            assert "share=1" in refused
        else:
            record = good_json("plan", own, tmp_path / "keys.profile", "--dram", DRAM, "--nvme-entries", "1GiB")
            assert record["epoch"] is not None
