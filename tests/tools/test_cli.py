"""The command line end to end: what a user types, what is printed where, and the exit status."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from engram_adapter import build_checkpoint
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.offline.verify import VerifyReport
from tierstore.tools import cli as cli_module
from tierstore.tools.cli import COMMANDS, Progress, cli, run
from tierstore.version import VERSION

FAMILIES = {
    "deepseek_v41": ["--family", "deepseek_v41", "--dim", "64", "--hidden", "16"],
    "engram": ["--family", "engram", "--dtype", "fp16"],
    "qwen4_exp": ["--family", "qwen4_exp", "--dtype", "bf16", "--parts", "4"],
    "qwen4_exp-fp8": ["--family", "qwen4_exp", "--dtype", "fp8", "--parts", "1"],
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def good(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its store in shards of 64 KiB. Tests must not change them."""
    folder = tmp_path_factory.mktemp(request.param)
    good("synth", folder / "model", *FAMILIES[request.param], "--rows-per-head", 200, "--layers", "1,3")
    good("build", folder / "model", folder / "store", "--shard-bytes", "64KiB")
    return folder / "model", folder / "store"


def test_verify_finds_nothing_wrong_with_a_fresh_store(built: tuple[Path, Path]) -> None:
    model, store = built
    result = good("verify", store, "--source", model)
    rows = json.loads(good("inspect", store, "--json").stdout)["num_rows"]
    assert f"{rows:,} rows compared with {model}" in result.stdout
    assert "nothing is wrong" in result.stdout


def test_verify_of_a_sample_compares_some_rows(built: tuple[Path, Path]) -> None:
    model, store = built
    rows = json.loads(good("inspect", store, "--json").stdout)["num_rows"]
    said = good("verify", store, "--source", model, "--sample", 3).stdout.split(" rows compared")[0]
    compared = int(said.split()[-1].replace(",", ""))
    assert 0 < compared < rows


def test_inspect_says_the_same_as_the_catalog_to_people_and_programs(built: tuple[Path, Path]) -> None:
    model, store = built
    record = json.loads(good("inspect", store, "--json").stdout)
    assert record["ready"] is True
    assert [table["name"] for table in record["tables"]] == ["layers.1", "layers.3"]
    assert "hash_spec" in record["attachments"]
    files = sorted(file.name for file in model.glob("*.safetensors"))
    assert [file["name"] for file in record["origin"]["files"]] == files
    text = good("inspect", store).stdout
    for table in record["tables"]:
        assert table["row_bytes"] * table["num_rows"] == table["table_bytes"]
        assert sum(shard["num_bytes"] for shard in table["shards"]) == table["store_bytes"]
        assert len(table["shards"]) == table["num_shards"] > 1
        for shard in table["shards"]:
            assert (store / shard["file"]).stat().st_size == shard["num_bytes"]
        assert table["name"] in text
        assert f"{table['num_rows']:,}" in text
        assert table["fingerprint"] in text


def test_a_flipped_byte_makes_verify_list_it_and_exit_with_1(built: tuple[Path, Path]) -> None:
    model, store = built
    shard = min((store / "shards").glob("*/*.shard"))
    healthy = shard.read_bytes()
    damaged = bytearray(healthy)
    damaged[5000] ^= 0x10
    shard.write_bytes(damaged)
    try:
        for arguments in (["verify", store], ["verify", store, "--source", model]):
            result = invoke(*arguments)
            assert result.exit_code == 1
            assert "fault: page 1 of table layers." in result.stdout
            assert "nothing is wrong" not in result.stdout
    finally:
        shard.write_bytes(healthy)
    good("verify", store)


def test_verify_against_another_checkpoint_exits_with_1(built: tuple[Path, Path], tmp_path: Path) -> None:
    model, store = built
    family = json.loads((model / "config.json").read_text())["model_type"]
    options = next(options for name, options in FAMILIES.items() if name.startswith(family))
    good("synth", tmp_path / "other", *options, "--rows-per-head", 200, "--layers", "1,3", "--seed", 9)
    result = invoke("verify", store, "--source", tmp_path / "other")
    assert result.exit_code == 1
    assert "built from another checkpoint" in result.stdout.split("fault: ")[1]  # first, before all rows that differ


def test_only_the_first_50_faults_are_printed_and_the_rest_counted(
    built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = importlib.import_module("tierstore.tools.verify")
    faults = [f"page {index} is bad" for index in range(53)]
    monkeypatch.setattr(verify.tierstore, "verify", lambda *_, **__: VerifyReport(pages_checked=60, faults=faults))
    result = invoke("verify", built[1])
    assert result.exit_code == 1
    assert result.stdout.count("fault: ") == 50
    assert "and 3 more faults" in result.stdout


def test_build_says_what_it_will_write_and_keeps_what_is_there(built: tuple[Path, Path]) -> None:
    model, store = built
    result = good("build", model, store, "--shard-bytes", "64KiB")
    record = json.loads(good("inspect", store, "--json").stdout)
    assert "layers.3" in result.stdout
    assert "0 B needed" in result.stdout
    shards = sum(table["num_shards"] for table in record["tables"])
    assert f"0 shards built, {shards} kept" in result.stdout


def test_build_and_verify_print_one_json_document_with_the_numbers_that_people_see(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    model, store = built
    record = json.loads(good("build", model, tmp_path / "store", "--shard-bytes", "64KiB", "--json").stdout)
    inspected = json.loads(good("inspect", store, "--json").stdout)
    for table, other in zip(record["tables"], inspected["tables"], strict=True):
        assert table == {name: other[name] for name in table}
    num_shards = sum(table["num_shards"] for table in record["tables"])
    assert (record["store"], record["shards_built"], record["shards_kept"]) == (str(tmp_path / "store"), num_shards, 0)
    assert record["store_bytes"] == record["bytes_written"] == sum(t["store_bytes"] for t in inspected["tables"])
    checked = json.loads(good("verify", tmp_path / "store", "--source", model, "--json").stdout)
    assert (checked["sound"], checked["faults"], checked["remedy"]) == (True, [], "")
    assert checked["shards_checked"] == num_shards
    assert checked["rows_compared"] == inspected["num_rows"]


def test_the_command_that_verify_names_repairs_the_store_as_it_is_printed(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    model, store = built
    own = tmp_path / "a store's copy"
    shutil.copytree(store, own)
    first, second = sorted((own / "shards").glob("0-*/*.shard"))[:2]
    healthy = first.read_bytes(), second.read_bytes()
    first.write_bytes(healthy[0][:5000] + b"????" + healthy[0][5004:])
    second.unlink()
    result = invoke("verify", own, "--source", model)
    assert result.exit_code == 1
    (remedy,) = re.findall(r"^repair it: tierstore (.*)$", result.stdout, re.MULTILINE)
    record = json.loads(invoke("verify", own, "--source", model, "--json").stdout)
    assert record["remedy"] == f"tierstore {remedy}"
    assert [(part["table"], part["shard"]) for part in record["damaged_shards"]] == [("layers.1", 0), ("layers.1", 1)]
    assert own / record["damaged_shards"][1]["file"] == second
    mended = good(*shlex.split(remedy))
    assert mended.stdout.count("repaired: ") == 2
    assert "nothing is wrong" in mended.stdout
    assert (first.read_bytes(), second.read_bytes()) == healthy


def test_a_repair_from_another_checkpoint_is_refused_with_exit_status_1(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    model, store = built
    own = tmp_path / "own"
    shutil.copytree(store, own)
    min((own / "shards").glob("*/*.shard")).unlink()
    family = json.loads((model / "config.json").read_text())["model_type"]
    options = next(options for name, options in FAMILIES.items() if name.startswith(family))
    good("synth", tmp_path / "other", *options, "--rows-per-head", 200, "--layers", "1,3", "--seed", 9)
    assert run(["verify", str(own), "--repair", "--source", str(tmp_path / "other")]) == 1
    assert run(["verify", str(own), "--repair", "--sample", "3"]) == 2
    assert run(["verify", str(own), "--repair"]) == 1


def test_a_plain_tensor_is_built_verified_and_inspected_by_its_name(tmp_path: Path) -> None:
    rows = np.arange(100 * 8, dtype=np.float32).reshape(100, 8)
    save_file({"some.embedding": rows, "other": rows[:10].copy()}, tmp_path / "t.safetensors")
    good("build", tmp_path / "t.safetensors", tmp_path / "store", "--tensor", "some.embedding")
    assert "100 rows compared" in good("verify", tmp_path / "store", "--source", tmp_path / "t.safetensors").stdout
    (table,) = json.loads(good("inspect", tmp_path / "store", "--json").stdout)["tables"]
    assert (table["name"], table["num_rows"], table["codec"], table["orders"]) == ("some.embedding", 100, "fp32", [1])


def test_names_with_brackets_are_printed_as_they_are(tmp_path: Path) -> None:
    save_file({"x[red]y[/a]": np.zeros((10, 8), dtype=np.float32)}, tmp_path / "t.safetensors")
    built = good("build", tmp_path / "t.safetensors", tmp_path / "store", "--tensor", "x[red]y[/a]")
    assert "x[red]y[/a]" in built.stdout
    assert "x[red]y[/a]" in good("inspect", tmp_path / "store").stdout.split("fingerprint")[0]


def test_the_whole_job_works_in_folders_and_files_whose_names_are_no_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"work-\xff")
    folder.mkdir()
    synth = ["synth", "model", "--family", "engram", "--rows-per-head", "50", "--dim", "8"]
    jobs = [synth, ["build", "model", "store"], ["verify", "store", "--source", "model"], ["inspect", "store"]]
    for job in (*jobs, ["inspect", "store", "--json"], ["doctor", "store"], ["verify", "nothing"]):
        arguments = [
            str(folder / os.fsdecode(b"model-\xfe"))
            if word == "model"
            else str(folder / word)
            if word == "store"
            else word
            for word in job
        ]
        command = [sys.executable, "-m", "tierstore.tools.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
        assert done.returncode == (job[-1] == "nothing"), done.stderr
        assert "Traceback" not in done.stderr
        if job[0] == "synth":
            first = min(Path(arguments[1]).glob("*.safetensors"))
            index = Path(arguments[1], "model.safetensors.index.json")
            index.unlink()  # without it, files may be called anything
            first.rename(first.with_name(os.fsdecode(b"first-\xfd.safetensors")))


def test_a_path_that_may_not_be_looked_at_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", refuse)
    assert run(["synth", str(tmp_path / "locked"), "--family", "engram", "--rows-per-head", "50"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: .*locked: Permission denied; make it readable", error), error


def test_family_and_tensor_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        build_checkpoint(tmp_path, tmp_path / "store", family="engram", tensor="t")


def test_a_store_that_does_not_say_its_family_is_refused(
    built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = read_catalog(built[1])
    image.attachments["hash_spec"] = b"[]"
    monkeypatch.setattr("tierstore.offline.repair.read_catalog", lambda _: image)
    assert run(["verify", str(built[1]), "--source", str(built[0])]) == 1
    assert "does not say which family" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "{}/none", "{}/store"],
        ["build", "{}/model", "{}/store", "--shard-bytes", "1.5B"],
        ["build", "{}/model", "{}/store", "--family", "longcat"],
        ["build", "{}/model", "{}/store", "--jobs", "0"],
        ["verify", "{}/none"],
        ["verify", "{}/store", "--source", "{}/none"],
        ["inspect", "{}/model"],
        ["synth", "{}/model", "--family", "engram"],
        ["synth", "{}/new", "--family", "engram", "--size", "many"],
        ["synth", "{}/new", "--family", "engram", "--size", "1MiB", "--rows-per-head", "50"],
        ["synth", "{}/new", "--family", "engram", "--size", "1KiB"],
    ],
    ids=" ".join,
)
def test_errors_are_one_line_on_standard_error_with_status_1(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good("synth", tmp_path / "model", "--family", "engram", "--rows-per-head", 50, "--dim", 8)
    assert run([argument.format(tmp_path) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["nope"], ["build"], ["synth", "out"], ["synth", "out", "--family", "engram", "--layers", "1,x"]]
)
def test_wrong_usage_has_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ConfigError("the option is wrong"), 1, "error: the option is wrong"),
        (ValueError("the argument is wrong"), 1, "error: the argument is wrong"),
        (
            PermissionError(13, "Permission denied", "/x"),
            1,
            "error: /x: Permission denied; make it readable for this user, or give another path",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_command_raises_becomes_a_status_and_a_line(
    error: BaseException,
    status: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setitem(sys.modules, "tests_failing_command", SimpleNamespace(command=command))
    monkeypatch.setitem(cli_module.COMMANDS, "fail", ("tests_failing_command", "Fails."))
    assert run(["fail"]) == status
    assert capsys.readouterr().err.strip() == printed


def test_a_defect_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "tests_failing_command", SimpleNamespace(command=command))
    monkeypatch.setitem(cli_module.COMMANDS, "fail", ("tests_failing_command", "Fails."))
    with pytest.raises(ZeroDivisionError):
        run(["fail"])


def test_the_script_builds_and_verifies_without_loading_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tierstore.tools.cli import run\n"
        "for arguments in (\n"
        "    ['synth', 'model', '--family', 'engram', '--rows-per-head', '50', '--dim', '8'],\n"
        "    ['build', 'model', 'store'], ['verify', 'store', '--source', 'model'], ['inspect', 'store'], ['doctor']\n"
        "):\n"
        "    assert run(arguments) == 0, arguments\n"
        "loaded = {'torch', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_and_version_import_no_command() -> None:
    code = (
        "import sys\n"
        "from tierstore.tools.cli import run\n"
        "assert run(['--help']) == 0 and run(['--version']) == 0\n"
        "loaded = {'torch', 'rich', 'tokenizers', 'engram_adapter', 'tierstore.tools.synth'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert VERSION in done.stdout
    for name, (_, line) in COMMANDS.items():
        assert f"{name} " in done.stdout
        assert line in done.stdout


def test_python_m_runs_the_command_line_with_its_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tierstore.tools.cli", "inspect", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no store at")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    text = good(name, "--help").stdout
    assert f"tierstore {name} " in text


def test_doctor_gives_its_findings_as_json(tmp_path: Path) -> None:
    findings = json.loads(good("doctor", tmp_path, "--json").stdout)
    assert {"compiled kernels", "io_uring", "O_DIRECT", "memory", "GPU"} <= {finding["what"] for finding in findings}
    assert all(set(finding) == {"what", "state", "fact", "remedy"} for finding in findings)


def test_doctor_exits_with_1_only_where_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = importlib.import_module("tierstore.tools.doctor")
    for state, status in (("ok", 0), ("warn", 0), ("fail", 1)):
        monkeypatch.setattr(doctor, "examine", lambda _, state=state: [doctor.Finding("disk", state, "full", "free")])
        assert invoke("doctor").exit_code == status
        assert invoke("doctor", "--json").exit_code == status


def test_progress_without_a_terminal_is_a_line_for_every_twentieth(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_module, "PLAIN_SECONDS", 0.0)
    with Progress("building") as progress:
        for done in range(1001):
            progress(done << 20, 1000 << 20)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert [line.split(",")[0].split(":")[1].strip() for line in lines] == [f"{5 * step} %" for step in range(1, 21)]
    assert "1000.00 MiB of 1000.00 MiB" in lines[-1]
    assert "s left" in lines[0]


def test_progress_of_what_is_over_in_a_moment_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_module, "PLAIN_SECONDS", 3600.0)
    monkeypatch.setattr(cli_module.time, "monotonic", lambda: 7.0)
    with Progress("tracing") as progress:
        for done in range(101):
            progress(done, 100)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_progress_counts_no_rate_of_what_was_done_before_or_of_other_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(cli_module, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(cli_module.time, "monotonic", lambda: float(next(now)))
    with Progress("building") as progress:
        for done in (900, 901, 950):  # 900 were there when the command began
            progress(done << 20, 950 << 20)
        for done in (950, 1000, 2000):  # from here on, it is written: before, it was compared
            progress(done << 20, 2000 << 20)
        for done in (0, 500):
            progress(done << 20, 2000 << 20)
    rates = [line.split(", ")[2] for line in capsys.readouterr().err.splitlines()]
    for rate, most in zip(rates, (50, 50, 1050, 500), strict=True):
        number, unit = rate.split()
        assert unit == "MiB/s"
        assert 0 < float(number) <= most


def test_progress_of_nothing_and_of_one_step_ends_at_100(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("verifying", "shards") as progress:
        progress(0, 0)
        progress(1, 1)
    assert capsys.readouterr().err.startswith("verifying: 100 %, 1 of 1 shards")


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for unit, done in (("bytes", "64.00 MiB of 128.00 MiB"), ("rows", "67,108,864 of 134,217,728 rows")):
        with Progress("building", unit) as progress:
            progress(0, 128 << 20)
            progress(32 << 20, 128 << 20)
            progress(64 << 20, 128 << 20)
        shown = capsys.readouterr().err
        assert done in shown
        assert re.search(r"[MGT]iB/s, \d+ s left" if unit == "bytes" else r"\d rows/s, \d+ s left", shown)
