"""What shells complete: the script of each shell, typed at in that very shell."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from tierstore.tools.cli import COMMANDS, COMPLETE_VARIABLE, cli
from tierstore.tools.completion import SHELLS

WAIT_S = 60.0
PROMPT = "READY> "
SET_PROMPT = "PS1='READ''Y> '"  # the shell shows what is typed, which must not look like the prompt
# How a shell starts without anybody's settings, and what it is told before it is typed at.
INTERACTIVE = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], SET_PROMPT),
    "zsh": (["zsh", "-f", "-i"], f"autoload -U compinit; compinit -u -D; {SET_PROMPT}"),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A PATH with this very tierstore in front."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "tierstore").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tierstore.tools.cli "$@"\n')
    (folder / "tierstore").chmod(0o755)
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    return os.environ | home | {"PATH": f"{folder}:{os.environ['PATH']}", "TERM": "dumb"}


def script_of(shell: str) -> str:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0, result.output
    return result.stdout


def completed(words: str, environment: dict[str, str]) -> list[str]:
    """What the command line gives bash's script for words, the last of them unfinished."""
    asked = {COMPLETE_VARIABLE: "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-X", "importtime", "-m", "tierstore.tools.cli"]
    answer = subprocess.run(
        command, env=environment | asked, capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert not {"torch", "tierstore.tools.build", "matplotlib"} & imported, "a Tab must not take seconds"
    return [line.partition(",")[2] for line in answer.stdout.splitlines()]


def test_every_command_is_completed_and_none_is_imported_for_it(environment: dict[str, str]) -> None:
    assert completed("tierstore ", environment) == list(COMMANDS)
    assert completed("tierstore co", environment) == [name for name in COMMANDS if name.startswith("co")]


def test_options_of_a_command_and_their_choices_are_completed(environment: dict[str, str]) -> None:
    assert {"--dram", "--json", "--dry-run"} <= set(completed("tierstore plan --", environment))
    assert completed("tierstore completion ", environment) == list(SHELLS)


def test_another_shell_is_refused_with_those_that_there_are() -> None:
    result = CliRunner().invoke(cli, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert all(shell in result.stderr for shell in SHELLS)


class Typing:
    """A shell at a terminal: what is typed, and all that it shows."""

    def __init__(self, fd: int) -> None:
        self._fd, self.shown = fd, ""

    def type(self, keys: str, until: str) -> None:
        """Types, and waits until it shows a text that was not there yet."""
        seen = len(self.shown)
        os.write(self._fd, keys.encode())
        deadline = time.monotonic() + WAIT_S
        while until not in self.shown[seen:]:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{until!r} is not shown after {keys!r}: {self.shown[seen:]!r}"
            self.shown += os.read(self._fd, 65536).decode(errors="replace")


@contextmanager
def typing(shell: str, environment: dict[str, str]) -> Iterator[Typing]:
    command, settings = INTERACTIVE[shell]
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True
    )
    os.close(terminal)
    try:
        typed = Typing(controller)
        typed.type(settings + "\r", PROMPT)
        yield typed
    finally:
        process.kill()
        process.wait(WAIT_S)
        os.close(controller)


@pytest.mark.parametrize("shell", INTERACTIVE)
def test_a_tab_completes_a_command_an_option_and_a_file(
    shell: str, environment: dict[str, str], tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "profiled.tier").mkdir()
    (tmp_path / "script").write_text(script_of(shell))
    with typing(shell, environment) as shown:
        shown.type(f". {tmp_path}/script\r", PROMPT)
        shown.type("tierstore comp\t\t", "completion")
        assert "compact" in shown.shown
        shown.type("\x15tierstore inspect --js\t", "--json")
        shown.type(f"{tmp_path}/prof\t", "profiled.tier")


def test_fish_completes_commands_and_options(environment: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "tierstore.fish").write_text(script_of("fish"))

    def offered(words: str) -> list[str]:
        ask = f"source {tmp_path}/tierstore.fish; complete -C '{words}'"
        answer = subprocess.run(
            ["fish", "--no-config", "-c", ask], env=environment, capture_output=True, text=True, timeout=WAIT_S,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        return [line.partition("\t")[0] for line in answer.stdout.splitlines()]

    assert {"compact", "completion"} == set(offered("tierstore comp"))
    assert "--dram" in offered("tierstore plan --dr")
