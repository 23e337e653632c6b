"""`make cases`: a script's exit status decides, a failure shows, and nothing that a script started outlives it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.repository import REPOSITORY

from tests import cases

SCRIPTS = {
    "good": "import os, tierstore; assert not os.listdir()",
    "skipped": "raise SystemExit(77)",
    "moved": "import tierstore.store, tierstore.build, tierstore.daemon.serving\n"
    "from tierstore.daemon.remote_access import read_certificate, read_token\n"
    "from tierstore.daemon.client_socket import ask\n"
    "tierstore.store.CLOSE_WAIT_S = 7\n"
    "assert tierstore.store.opened.CLOSE_WAIT_S == 7\n"
    "assert tierstore.build is tierstore.offline.build\n"
    "from tierstore.formats.checkpoint import Checkpoint\n"
    "assert getattr(Checkpoint, 'as_' + 'record') is Checkpoint.to_dict\n"
    "assert tierstore.build.__spec__.name == 'tierstore.offline.build' and tierstore.daemon.serving.Daemon",
    "bad": "assert False, 'these rows are wrong'",
    "late": "import time; time.sleep(600)",
    "not_yet": "raise SystemExit(1)",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in SCRIPTS.items():
        (tmp_path / "turn").mkdir(exist_ok=True)
        (tmp_path / "turn" / f"{name}.py").write_text(code)
    monkeypatch.setattr(cases, "FOLDER", tmp_path)
    monkeypatch.setitem(cases.EXCEPTIONS, "not_yet", "it belongs to what is not here yet")
    return tmp_path


def test_a_wrong_case_makes_the_command_fail_and_shows_what_it_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cases.main(["good", "skipped", "bad", "not_yet"]) == 1
    said = capsys.readouterr().out
    assert "AssertionError: these rows are wrong" in said
    assert "1 right, 1 skipped, 1 excepted, 1 WRONG" in said
    assert cases.EXCEPTIONS["not_yet"] in said
    assert cases.main(["good", "skipped", "not_yet"]) == 0
    assert cases.main(["nothing"]) == 2
    assert not list(folder.glob("*.pyc"))


def test_a_case_may_import_a_module_by_the_name_that_it_had(folder: Path) -> None:
    outcome = cases.run_case(folder / "turn" / "moved.py")
    assert outcome.how == "right", outcome.words


def test_a_case_that_does_not_end_is_wrong(folder: Path) -> None:
    outcome = cases.run_case(folder / "turn" / "late.py", timeout_s=0.5)
    assert (outcome.how, outcome.words) == ("WRONG", "it did not end within 0.5 s")


def test_an_exception_that_passes_says_that_it_leaves_the_list(folder: Path) -> None:
    outcome = cases.run_case(folder / "turn" / "good.py", {"good": "for a reason"})
    assert (outcome.how, outcome.words) == ("excepted", "for a reason; it passes: take it off the list")


def test_without_the_folder_the_projects_own_tests_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "FOLDER", REPOSITORY.parent / "no such folder")
    ran = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        ran.append(command[1:])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert cases.main([]) == 3
    assert ran == [["-m", "pytest"]]
    assert "there is no folder no such folder beside the repository" in capsys.readouterr().out
