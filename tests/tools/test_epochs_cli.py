"""`tierstore epochs`: placements listed, chosen and pruned; an open store keeps the one it has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.text_store import TABLES, TextStore, good, good_json, invoke

import tierstore
from engram_adapter import HashSpec
from tests.tools.test_profile_cli import error_of
from tierstore.formats.catalog import read_catalog

DRAM = 16 << 20


@pytest.fixture(scope="module")
def with_epochs(text: TextStore, tmp_path_factory: pytest.TempPathFactory) -> TextStore:
    """A store with epochs 1 to 3, of ever more DRAM. Tests must not change it; see `planned`."""
    store = text.copy(tmp_path_factory.mktemp("epochs") / "planned.tier")
    for number in (1, 2, 3):
        good("plan", store, text.profile, "--dram", number * DRAM)
    return replace(text, store=store)


@pytest.fixture
def planned(with_epochs: TextStore, tmp_path: Path) -> Path:
    """A store with those epochs, to be chosen and pruned; its files are links, to be replaced and not written to."""
    return with_epochs.copy(tmp_path / "own.tier")


def epoch_of(store: Path) -> int | None:
    with tierstore.open(store, dram=DRAM) as opened:
        epoch: int | None = opened.stats()["placement"]["epoch"]
        return epoch


def test_epochs_are_listed_for_people_and_programs(planned: Path) -> None:
    records = good_json("epochs", planned)
    assert [sorted(record) for record in records] == [["current", "details", "entries", "epoch", "num_bytes"]] * 3
    assert [(record["epoch"], record["current"]) for record in records] == [(1, False), (2, False), (3, True)]
    for record in records:
        assert list(record["entries"]) == TABLES
        assert record["details"]["plan"]["dram_bytes"] == record["epoch"] * DRAM
        assert record["details"]["profile"] == "text.profile"
        assert record["num_bytes"] == (planned / f"placements/{record['epoch']:08d}.placement").stat().st_size
    shown = good("epochs", planned).stdout
    for words in ("opened with", "yes", "32.00 MiB of DRAM", f"{records[0]['entries'][TABLES[0]]:,}"):
        assert words in shown


def test_a_store_without_placements_says_how_to_make_one(own: Path) -> None:
    assert good_json("epochs", own) == []
    assert "has no placements; make one: tierstore plan" in " ".join(good("epochs", own).stdout.split())


def test_another_epoch_or_none_can_be_chosen(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for use, epoch in (("1", 1), ("none", None), ("3", 3)):
        good("epochs", planned, "--use", use)
        assert epoch_of(planned) == epoch
    for wrong in ("4", "0", "-1", "x", ""):
        error = error_of(capsys, "epochs", planned, "--use", wrong)
        assert "there is 1, 2, 3; give one of them, or none" in error
    assert epoch_of(planned) == 3


@pytest.mark.parametrize(("options", "left"), [([], [2, 3]), (["--keep", 0], [3]), (["--keep", 5], [1, 2, 3])], ids=str)
def test_pruning_keeps_the_current_epoch_and_the_newest_others(
    planned: Path, options: list[str], left: list[int]
) -> None:
    result = good("epochs", planned, "--prune", *options, "--json")
    assert [record["epoch"] for record in json.loads(result.stdout)] == left
    assert sorted(path.name for path in (planned / "placements").iterdir()) == [f"{n:08d}.placement" for n in left]
    for epoch in {1, 2, 3} - set(left):
        assert f"removed epoch {epoch}, " in result.stderr
    assert epoch_of(planned) == 3


def test_an_epoch_chosen_and_pruned_around_at_once(planned: Path) -> None:
    good("epochs", planned, "--use", 2, "--prune", "--keep", 0)
    assert [(record["epoch"], record["current"]) for record in good_json("epochs", planned)] == [(2, True)]
    assert epoch_of(planned) == 2


def test_a_pruned_epoch_serves_the_store_that_has_it_open_and_no_other(planned: Path, text: TextStore) -> None:
    with (
        tierstore.open(planned, dram=DRAM, placement=1) as old,
        tierstore.open(planned, dram=DRAM, placement="none") as other,
    ):
        spec = HashSpec.from_store(old)
        keys = spec.keys(text.documents[0][None, :2000], spec.layers[0])[0]
        good("epochs", planned, "--prune", "--keep", 0)
        assert list(read_catalog(planned).placements) == [3]
        np.testing.assert_array_equal(old[TABLES[0]].lookup(keys), other[TABLES[0]].lookup(keys))
        assert (old[TABLES[0]].explain(keys) == "static").any()
        assert old.stats()["placement"]["epoch"] == 1
    with pytest.raises(tierstore.ConfigError, match=r"epoch 1 does not exist in .*; there is 3"):
        tierstore.open(planned, dram=DRAM, placement=1)


def test_a_damaged_epoch_is_listed_with_what_is_wrong_and_can_be_pruned(planned: Path) -> None:
    file = planned / "placements/00000001.placement"
    cut = file.read_bytes()[:-4096]
    file.unlink()
    file.write_bytes(cut)
    first = good_json("epochs", planned)[0]
    assert f"{file.stat().st_size} bytes on disk, the catalog says {first['num_bytes']}" in first["problem"]
    assert str(file.stat().st_size) in good("epochs", planned).stdout
    good("epochs", planned, "--prune")
    good("epochs", planned, "--prune", "--keep", 0)
    assert [record["epoch"] for record in good_json("epochs", planned)] == [3]


def test_wrong_usage_has_status_2_and_no_store_status_1(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke("epochs", own, "--prune", "--keep", -1).exit_code == 2
    assert invoke("epochs").exit_code == 2
    assert "no store" in error_of(capsys, "epochs", tmp_path / "none")
    assert not (tmp_path / "none").exists()
