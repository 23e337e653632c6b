"""The code blocks of the documents: found, run as a reader would run them, and compared with the output they show.

Input: Markdown. Output: blocks, and `Reader`, which runs a page's in order, in one folder. Errors: `AssertionError`
that names the page and the line of what went otherwise than the page says. How a page marks its blocks:
docs/writing.md.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.repository import REPOSITORY

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>[^\n]*)\n(?P<body>.*?)^ *(?P=fence) *$", re.M | re.S)
GIVEN = re.compile(r"^<!-- given: (.*) -->$", re.M)
TIMEOUT_S = 120.0
READY_S = 30.0  # for what a command in the background says when it is ready
POLL_S = 0.05
ELLIPSIS = "..."


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    words: frozenset[str]
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return "run" in self.words and not self.language.startswith("{")  # the title of a diagram is no mark


@dataclass(frozen=True)
class Command:
    """A command of a console block, and the output that the page shows below it."""

    line: str
    output: tuple[str, ...]
    fails: bool

    @property
    def is_background(self) -> bool:
        return self.line.rstrip().endswith("&")


def pages() -> list[Path]:
    """All documents whose blocks are looked at."""
    found = [path for path in (REPOSITORY / "docs").rglob("*.md") if "builder" not in path.parts]
    return sorted([*found, REPOSITORY / "README.md"])


def blocks_of(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text, found = path.read_text(encoding="utf-8"), []
    name = path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else path.name
    for match in FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        body = re.sub(rf"^ {{0,{len(match['indent'])}}}", "", match["body"], flags=re.M)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(name, line, language, frozenset(words), body))
    return found


def given_to(path: Path) -> list[str]:
    """What a page says lies in the reader's folder when it begins: names of `<!-- given: ... -->`."""
    match = GIVEN.search(path.read_text(encoding="utf-8"))
    return match[1].split() if match else []


def commands_of(text: str) -> list[Command]:
    """The commands of a console block: lines after `$ `, with what follows a `\\` at a line's end."""
    found: list[tuple[list[str], list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(([line[2:]], []))
        elif found and found[-1][0][-1].endswith("\\") and not found[-1][1]:
            found[-1][0].append(line.removeprefix("> "))
        elif found:
            found[-1][1].append(line)
    joined = [("\n".join(lines), tuple(output)) for lines, output in found]
    return [Command(line.removesuffix("  # fails"), output, line.endswith("  # fails")) for line, output in joined]


def differs(shown: tuple[str, ...], found: str) -> str | None:
    """Returns where a command's output is not what a page shows: `...` is anything, on a line of its own any lines."""
    wanted = [line.rstrip() for line in shown]
    while wanted and not wanted[-1]:
        wanted.pop()
    if not wanted:
        return None
    parts = [r"(?:.*\n)*?" if line == ELLIPSIS else _pattern(line) + r"[ ]*\n" for line in wanted]
    text = "".join(line.rstrip() + "\n" for line in found.rstrip().splitlines())
    if re.fullmatch("".join(parts), text):
        return None
    return f"the page shows\n{chr(10).join(wanted)}\nand the output is\n{text}"


def _pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.split(ELLIPSIS))


@dataclass
class Reader:
    """Who reads a page and does what it says: one folder, one Python session, one shell environment."""

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    _background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, blocks: list[Block]) -> int:
        """Runs the blocks that are marked so, in order; returns how many. Blocks; each command has a limit."""
        before, count = Path.cwd(), 0
        os.chdir(self.folder)
        try:
            printed: str | None = None
            for block in blocks:
                if block.is_run:
                    printed, count = self._run(block), count + 1
                elif "output" in block.words:
                    assert printed is not None, f"{block.where}: output of a block that is not run"
                    wrong = differs(tuple(block.text.splitlines()), printed)
                    assert wrong is None, f"{block.where}: {wrong}"
                    printed = None
        finally:
            os.chdir(before)
            self.close()
        return count

    def _run(self, block: Block) -> str:
        assert block.language in ("python", "console"), f"{block.where}: a block of {block.language!r} cannot be run"
        if block.language == "python":
            return self._python(block)
        for command in commands_of(block.text):
            self._command(command, block.where)
        return ""

    def _python(self, block: Block) -> str:
        code = compile("\n" * block.line + block.text, str(REPOSITORY / block.page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, self.names)  # an error's traceback has the page's own lines
        return printed.getvalue()

    def _command(self, command: Command, where: str) -> None:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "COLUMNS": "96",
        }
        if command.is_background:
            self._start(command, environment, where)
            return
        done = subprocess.run(
            ["bash", "-c", command.line],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert bool(done.returncode) == command.fails, (
            f"{where}: {command.line}: status {done.returncode}\n{done.stdout}"
        )
        wrong = differs(command.output, done.stdout)
        assert wrong is None, f"{where}: {command.line}: {wrong}"

    def _start(self, command: Command, environment: dict[str, str], where: str) -> None:
        """Starts a command that goes on beside the page, and waits until it has said what the page shows."""
        log = self.folder / f".background-{len(self._background)}"
        line = command.line.rstrip().removesuffix("&")
        with log.open("wb") as output:
            started = subprocess.Popen(
                ["bash", "-c", f"exec {line}"], env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self._background.append(started)
        until = time.monotonic() + READY_S
        while wrong := differs(command.output, log.read_text()):
            assert started.poll() is None, f"{where}: {line}: ended with status {started.returncode}; {wrong}"
            assert time.monotonic() < until, f"{where}: {line}: {wrong}"
            time.sleep(POLL_S)

    def close(self) -> None:
        """Ends what runs in the background."""
        for started in self._background:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGTERM)
            try:
                started.wait(READY_S)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
        self._background.clear()


def tierstore_lines(block: Block) -> Iterator[str]:
    """The lines of a block that call `tierstore`, continued ones as one."""
    text = re.sub(r"\\\n\s*(?:> )?", " ", block.text)
    for line in text.splitlines():
        line = re.sub(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+\s+)*", "", line)
        if re.match(r"tierstore [a-z]", line):
            yield line
