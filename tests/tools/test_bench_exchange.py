"""`bench exchange` at toy size: every side runs and takes part, rows are checked, and targets are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tierstore.errors import DaemonError
from tierstore.tools.bench.exchange import command, lookups, rank_group, servers, training
from tierstore.tools.bench.pairs import Options

ROWS = 4_096


@pytest.mark.slow
def test_exchange_measures_every_side_and_keeps_its_targets(tmp_path: Path) -> None:
    options = Options(size_bytes=ROWS * 1024, pairs=2, tokens=16)
    result: dict[str, Any] = command.run(tmp_path, options).to_dict()
    cases = {each["case"]: each for each in result["comparisons"]}
    assert len(cases) == 6
    for case, each in cases.items():
        assert {"tierstore"} < set(each["seconds"]), case
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in each["seconds"].values())
    walls = [each for case, each in cases.items() if case.endswith("wall")]
    assert [each["targets"].get(lookups.BARE) for each in walls] == [0.8, None, None]
    assert [each["targets"].get(training.DUPLICATES) for each in walls] == [None, None, 1.4]
    assert training.TORCHREC in walls[2]["seconds"] or training.TORCHREC in result["skipped"]
    figures = {each["case"]: each for each in result["figures"]}
    assert {each["bound"] for each in figures.values()} == {
        training.BYTES_BOUND, servers.RATE, servers.ONE_TOKEN, servers.WIRE, None
    }  # fmt: skip
    sent = next(each for case, each in figures.items() if case.startswith("bytes that ranks send"))
    assert all(1 < value < 2 for value in sent["values"])
    assert list(tmp_path.iterdir()) == []  # nothing is left


def test_a_rank_that_fails_ends_the_benchmark_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DaemonError, match="bench exchange, lookups: a rank failed with status 1"):
        rank_group.run("lookups", {"paths": ["/nowhere"] * 2, "tokens": 4, "pairs": 1, "threads": 1})
    assert "/nowhere" in capfd.readouterr().err
