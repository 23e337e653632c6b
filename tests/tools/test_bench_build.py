"""bench build: what stands in its way is named before, or with what the failing program said."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from support.marks import slow_but

from tierstore.errors import BudgetError, ConfigError
from tierstore.tools.bench import build, export, inplace
from tierstore.tools.bench.pairs import Options

DiskUsage = collections.namedtuple("DiskUsage", "total used free")


def test_a_disk_without_room_is_refused_with_both_numbers_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = int(2.1 * (1 << 30)) + (256 << 20)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: DiskUsage(1 << 40, 0, needed - 1))
    with pytest.raises(BudgetError, match=rf"\({needed} bytes\).* free \({needed - 1} bytes\)"):
        build.check_room(tmp_path, 1 << 30)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: DiskUsage(1 << 40, 0, needed))
    build.check_room(tmp_path, 1 << 30)


def test_a_copy_or_a_build_that_fails_says_what_the_program_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"copying the checkpoint failed: cp: .*nothing\.safetensors"):
        build.copy([tmp_path / "nothing.safetensors"], tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"building failed: .*there is no checkpoint at"):
        build._build(tmp_path / "nothing", tmp_path / "store")


@pytest.mark.long
@pytest.mark.parametrize("shape", slow_but(["scales apart, in memory"], inplace.SHAPES))
def test_inplace_measures_builds_and_lookups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    monkeypatch.setattr(inplace, "SHAPES", {shape: inplace.SHAPES[shape]})
    result = inplace.run(tmp_path, Options(size_bytes=2 << 20, pairs=1, tokens=64))
    assert [comparison.case for comparison in result.comparisons] == [
        f"{shape}: {what}" for what in ("build in place", "cold lookups")
    ]
    reads = [value for name, value in result.facts.items() if "reads for a missed key" in name]
    assert len(reads) == 2
    assert all(7 < value <= 9 for value in reads)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_export_measures_stores_as_built_and_commits(tmp_path: Path) -> None:
    result = export.run(tmp_path, Options(size_bytes=2 << 20, pairs=1))
    assert [comparison.case for comparison in result.comparisons] == [
        "as built, warm files", "as built, cold files", "a commit of 1 % of the rows", "a commit of 25 % of the rows",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []
