"""`bench --against`: two builds in turn on the same keys; another tree's failure, or other rows,
are named and no figure."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.marks import slow_but
from support.repository import REPOSITORY

from tests.tools.test_bench import zipf_text
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.tools.bench import stores
from tierstore.tools.bench.against import building, building_side, builds, overlapping, ratios
from tierstore.tools.bench.against import command as against
from tierstore.tools.bench.against import side as against_side
from tierstore.tools.bench.overlap import model as overlap_model
from tierstore.tools.bench.overlap import sides as overlap_sides
from tierstore.tools.bench.pairs import Options
from tierstore.tools.cli import cli


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "EFFORT", 0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("against")


def bench(folder: Path, *arguments: object) -> Any:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments), "--folder", str(folder), "--size", "16MiB"])


@pytest.mark.parametrize("name", slow_but(["cold", "serve"], against_side.CASES))
def test_this_build_is_measured_beside_another_in_pairs_of_processes(folder: Path, name: str) -> None:
    file = folder / f"{name}.json"
    result = bench(folder, name, "--against", REPOSITORY, "--pairs", 1, "--json", file)
    assert result.exit_code == 0, result.output
    record = json.loads(file.read_text())[name]
    assert {part["case"] for part in record["comparisons"]} == against_side.CASES[name].keys()
    for comparison in record["comparisons"]:
        assert {side: len(seconds) for side, seconds in comparison["seconds"].items()} == {
            against.THIS: 1,
            against.OTHER: 1,
        }
        assert comparison["targets"] == {against.OTHER: 0.97}
        assert f"{comparison['ratios'][against.OTHER]['median']:.3f}" in result.stdout
    assert record["facts"]["keys that missed in measured runs"] == {against.THIS: 0, against.OTHER: 0}
    assert record["facts"]["the other is"]["package"] == str(REPOSITORY / "tierstore")
    assert not list(folder.glob("tierstore-bench-*"))


def test_fifteen_pairs_are_run_if_nothing_else_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def note(_: str, __: Path, options: Options, ___: Path) -> None:
        asked.append(options.pairs)
        raise ConfigError("enough")

    monkeypatch.setattr(against, "run", note)
    assert "enough" in str(bench(tmp_path, "warm", "--against", REPOSITORY).exception)
    assert asked == [15]


def test_a_benchmark_of_one_build_only_is_refused(tmp_path: Path) -> None:
    result = bench(tmp_path, "warm", "peers", "--against", REPOSITORY)
    assert result.exit_code == 2
    assert "--against runs warm, cold, decode, serve, overlap, build; peers cannot" in result.output


def test_a_folder_that_is_no_build_is_refused_with_what_to_give(tmp_path: Path, folder: Path) -> None:
    error = bench(folder, "warm", "--against", tmp_path).exception
    assert "neither tierstore/__init__.py nor bin/python" in str(error)
    assert "build_ext --inplace" in str(error)


def test_a_build_that_cannot_run_is_named_with_its_last_words(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "tierstore").mkdir()
    (tmp_path / "tierstore" / "__init__.py").write_text("raise ImportError('its extension is not built')\n")
    error = str(bench(folder, "warm", "--against", tmp_path, "--pairs", 1).exception)
    assert error.startswith(f"{tmp_path}: bench warm failed in this build:")
    assert "its extension is not built" in error


def test_builds_that_give_other_rows_are_no_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: against.Build, _: object) -> dict[str, Any]:
        return {
            "checksum": 1 if self.folder == REPOSITORY else 2,
            "seconds": {},
            "skipped": {},
            "missed": 0,
            "build": {},
        }

    (folder / "other" / "tierstore").mkdir(parents=True)
    (folder / "other" / "tierstore" / "__init__.py").touch()
    monkeypatch.setattr(against.Build, "measure", measure)
    with pytest.raises(ConfigError, match="other rows for the same keys"):
        against.run("warm", folder, Options(size_bytes=16 << 20, pairs=1), folder / "other")


def test_an_environment_is_run_by_its_own_python(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    build = against.Build.at(tmp_path, tmp_path)
    assert (build.python, build.folder) == (str(tmp_path / "bin" / "python"), None)


@pytest.mark.parametrize("count", [6, 7, 15, 16, 51])
def test_the_interval_of_a_median_is_that_of_the_sign_test(count: int) -> None:
    """It misses the median if all values between its ends lie on one side: a binomial tail, at most 2.5 % each."""
    low, high = ratios.median_interval([float(value) for value in range(count)])
    assert low == count - 1 - high
    outside = sum(math.comb(count, k) for k in range(int(low) + 1)) / 2**count
    one_closer = outside + math.comb(count, int(low) + 1) / 2**count
    assert 2 * outside <= 0.05 < 2 * one_closer


SIDES_OF_BUILDS = {
    f"build, files {state}{beside}": {against.THIS, other}
    for state in ("warm", "cold")
    for beside, other in (("", against.OTHER), (", beside cp", building.COPY))
}


@pytest.mark.slow
def test_builds_of_a_store_are_timed_beside_each_other_and_beside_cp(folder: Path) -> None:
    file = folder / "build.json"
    result = bench(folder, "build", "--against", REPOSITORY, "--pairs", 1, "--json", file)
    assert result.exit_code == 0, result.output
    record = json.loads(file.read_text())["build"]
    assert {part["case"]: set(part["seconds"]) for part in record["comparisons"]} == SIDES_OF_BUILDS
    assert record["facts"]["the other is"]["package"] == str(REPOSITORY / "tierstore")
    assert not list(folder.glob("bench-build-*"))


def test_a_build_is_timed_in_each_state_of_the_cache_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_: builds.Build, ask: dict[str, Any], side: Path) -> dict[str, Any]:
        assert side.name == "building_side.py"
        return building_side.measure(json.loads(json.dumps(ask)))

    monkeypatch.setattr(builds.Build, "measure", measure)
    record = building.run(folder, Options(size_bytes=4 << 20, pairs=1), REPOSITORY).to_dict()
    assert {part["case"]: set(part["seconds"]) for part in record["comparisons"]} == SIDES_OF_BUILDS
    for part in record["comparisons"]:
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in part["seconds"].values())
    assert not list(folder.glob("bench-build-*"))


def test_builds_that_write_other_shards_are_no_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(100))

    def measure(_: object, ask: dict[str, Any], __: Path) -> dict[str, Any]:
        return {"checksum": next(numbers), "seconds": {ask["bench"]: 1.0}, "skipped": {}, "cpu_s": 1.0, "build": {}}

    monkeypatch.setattr(builds.Build, "measure", measure)
    with pytest.raises(ConfigError, match="other rows for the same keys"):
        building.run(folder, Options(size_bytes=16 << 20, pairs=1), REPOSITORY)


@pytest.fixture
def small_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    training, held_out = zipf_text(0, 300, 500), zipf_text(0, 330, 500)
    held_out.documents[:] = held_out.documents[300:]
    monkeypatch.setattr(overlapping.real_text, "load_split", lambda: (training, held_out))
    for module, sizes in {
        overlapping: {
            "SHAPES": {"small model": (4, 32, 2)},
            "ENGRAM_LAYERS": (1, 3),
            "STEPS": 2,
            "PROMPTS": 1,
            "WARM_TOKENS": 300,
        },
        overlap_sides: {"SEQUENCES": 5, "CONTEXT_TOKENS": 8, "PROMPT_TOKENS": 70, "CHUNK_TOKENS": 32},
    }.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


def overlap_record(folder: Path) -> dict[str, Any]:
    options = Options(size_bytes=16 << 20, pairs=1, budgets=(4 << 20,))
    return overlapping.run(folder, options, REPOSITORY).to_dict()


CASES_OF_OVERLAP = ["small model, decode, 5 sequences", "small model, prefill of 70 tokens"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_overlap")
def test_two_builds_feed_the_same_model(folder: Path) -> None:
    record = overlap_record(folder)
    assert [part["case"] for part in record["comparisons"]] == CASES_OF_OVERLAP
    assert record["facts"]["the other is"]["package"] == str(REPOSITORY / "tierstore")


@pytest.mark.usefixtures("small_overlap")
def test_a_model_is_timed_on_a_placed_store_that_is_unplaced_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "overlap_model", overlap_model)
    from tierstore.tools.bench.against import overlapping_side

    epochs = []

    def measure(build: builds.Build, ask: dict[str, Any], side: Path) -> dict[str, Any]:
        assert side.name == "overlapping_side.py"
        assert (build.cwd / "overlap_model.py").read_text() == Path(overlap_model.__file__).read_text()
        epochs.append(read_catalog(Path(ask["store"])).epoch)
        return overlapping_side.measure(json.loads(json.dumps(ask)))

    monkeypatch.setattr(builds.Build, "measure", measure)
    record = overlap_record(folder)
    assert [part["case"] for part in record["comparisons"]] == CASES_OF_OVERLAP
    assert len(epochs) == 4
    assert None not in epochs
    for store in (folder / stores.FOLDER).glob("overlap-*"):
        assert read_catalog(store).epoch is None


def test_a_models_features_are_those_of_the_tables() -> None:
    assert overlap_model.FEATURES == stores.ROWS_PER_TOKEN * stores.DIM
