"""`--json`: every command that reports has it, and prints what docs/reference/json.md says, and nothing else."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from support.committed import Committed
from support.repository import REPOSITORY
from support.text_store import TextStore

from tierstore import RowWiseAdagrad
from tierstore.daemon.record import StatRecord
from tierstore.ipc import client_socket
from tierstore.ipc.messages import ReplanAnswer, SwapAnswer
from tierstore.offline.mooncake import PutReport
from tierstore.tools.cli import COMMANDS, cli

PAGE = REPOSITORY / "docs" / "reference" / "json.md"
REPORT_NOTHING = {"completion", "packaging", "serve", "top", "bench"}
ELSEWHERE = {"stat", "replan", "swap", "mooncake"}  # of a daemon, or of a cluster
SMALL = ("--family", "deepseek_v41", "--dim", 64, "--hidden", 16, "--rows-per-head", 200, "--layers", "1,3")


def documented() -> dict[str, list[str]]:
    """The names of the page, by its headings: a command, or a command and what it was given."""
    found: dict[str, list[str]] = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        found[heading] = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    return found


def printed(*arguments: object) -> Any:
    """What a command prints with --json; the whole of standard output is one value."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def names_of(value: Any) -> list[str]:
    """Of a list, those of any of its elements, in the order of the longest."""
    records = value if isinstance(value, list) else [value]
    return list(max(records, key=len))


def model_slice(model: Path, folder: Path) -> Path:
    """A store of the whole model, which is one slice of one."""
    printed("build", model, folder / "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def reports(text: TextStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command prints that reports on files, of a store that was trained, published and placed."""
    folder = tmp_path_factory.mktemp("json")
    model, store, ids = folder / "model", folder / "store", folder / "ids.npy"
    np.save(ids, np.arange(5000) % 400)
    found = {"synth": printed("synth", model, *SMALL), "build": printed("build", model, store)}
    trained = Committed(store, RowWiseAdagrad(lr=0.1))
    trained.write("layers.1", 50)
    trained.commit()
    planned = text.copy(folder / "planned")
    found |= {
        "init": printed("init", model, folder / "init"),
        "verify": printed("verify", store),
        "inspect": printed("inspect", store),
        "trace": printed("trace", ids, "-o", folder / "ids.trace"),
        "inspect of a trace": printed("inspect", folder / "ids.trace"),
        "inspect of a profile": printed("inspect", text.profile),
        "profile": printed("profile", planned, text.trace, "-o", folder / "p.profile", "--report", folder / "r.html"),
        "plan": printed("plan", planned, text.profile, "--dram", "16MiB"),
        "plan of a training": printed("plan", store, folder / "ids.trace", "--training", "--dram", "8MiB"),
        "epochs": printed("epochs", planned),
        "commits": printed("commits", store),
        "publish": printed("publish", store),
        "versions": printed("versions", store),
        "compact": printed("compact", store, folder / "compact"),
        "reslice": printed("reslice", model_slice(model, folder), "-o", folder / "resliced-{}", "--slices", 2),
        "delta": printed("delta", store, "0..1", "-o", folder / "delta"),
        "export": printed("export", store, folder / "out", "--source", model),
        "doctor": printed("doctor", folder),
    }
    return found


def test_every_command_that_reports_has_json() -> None:
    commands = {name: importlib.import_module(module).command for name, (module, _) in COMMANDS.items()}
    without = {name for name, command in commands.items() if not _has_json(command)}
    assert without == REPORT_NOTHING
    assert {heading.split(" ")[0] for heading in documented()} == set(COMMANDS) - REPORT_NOTHING


def _has_json(command: click.Command) -> bool:
    if isinstance(command, click.Group):
        return all(map(_has_json, command.commands.values()))
    return any(
        "--json" in option.opts and option.is_flag for option in command.params if isinstance(option, click.Option)
    )


@pytest.mark.parametrize("heading", [each for each in documented() if each.split(" ")[0] not in ELSEWHERE])
def test_a_command_prints_the_names_that_are_documented(heading: str, reports: dict[str, Any]) -> None:
    assert sorted(names_of(reports[heading])) == sorted(documented()[heading])


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("replan", "socket"), ReplanAnswer(at=1.0, entered=1, left=2, seconds=0.5, steps=3)),
        (("swap", "socket", "store"), SwapAnswer(version=2, store="/s", warmed=1, filled=2, seconds=0.5)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_a_daemon_answers_has_the_names_that_are_documented(
    arguments: tuple[str, ...], answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_socket, "ask", lambda *_, **__: answer)
    assert sorted(printed(*arguments)) == sorted(documented()[arguments[0]])


def test_the_record_of_a_daemon_has_the_names_that_are_documented() -> None:
    assert list(StatRecord.__struct_fields__) == documented()["stat"]


def test_what_a_put_reports_has_the_names_that_are_documented() -> None:
    assert [each.name for each in fields(PutReport)] == documented()["mooncake put"]


def test_a_delta_that_is_applied_prints_the_same_names(reports: dict[str, Any]) -> None:
    store = Path(reports["delta"]["store"])
    applied = printed("delta", store, "--apply", reports["delta"]["delta"])
    assert sorted(applied) == sorted(documented()["delta"])
    assert applied["first_version"] > applied["last_version"], "it had all of them"


def test_a_command_that_fails_prints_no_json(tmp_path: Path) -> None:
    for name in ("verify", "inspect", "epochs", "versions"):
        result = CliRunner().invoke(cli, [name, str(tmp_path / "nothing"), "--json"])
        assert result.exit_code
        assert not result.stdout
