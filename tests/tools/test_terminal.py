"""Tables fit the terminal without losing a digit, and nothing that a name holds steers it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from rich.live import Live
from rich.table import Table
from rich.text import Text
from safetensors.numpy import save_file

from tierstore.printable import PrintableStream
from tierstore.tools import cli as cli_module
from tierstore.tools.cli import console, run
from tierstore.tools.terminal import SafeConsole

ROWS = [("layers.1", "123,456,789,012", "12.34 TiB"), ("model.layers.14.engram.embed.weight", "98,765", "7.00 B")]


def shown(table: Table, width: int) -> str:
    stream = io.StringIO()
    SafeConsole(stream, width).print(table)
    return stream.getvalue()


def table_of_numbers(*, title: str | None = None) -> Table:
    table = Table("table", title=title)
    table.add_column("rows of all", justify="right")
    table.add_column("on disk", justify="right")
    for row in ROWS:
        table.add_row(*row)
    return table


@pytest.mark.parametrize("width", [25, 30, 46, 50, 60, 80, 120])
def test_a_table_keeps_to_the_width_and_its_numbers_whole(width: int) -> None:
    text = shown(table_of_numbers(title="sizes"), width)
    assert max(map(len, text.splitlines())) <= width
    for _, rows, size in ROWS:
        assert rows in text
        assert size in text
    assert "…" not in text
    letters = re.sub(r"[^a-z0-9.]", "", text)
    assert "layers.1" in letters


def test_a_table_that_fits_is_printed_as_it_is() -> None:
    plain = io.StringIO()
    from rich.console import Console

    Console(file=plain, width=120, highlight=False).print(table_of_numbers())
    assert shown(table_of_numbers(), 120) == plain.getvalue()


def test_one_that_is_far_too_wide_becomes_a_block_a_row() -> None:
    table = Table(*(f"column {i}" for i in range(9)))
    for column in table.columns:
        column.justify = "right"
    table.add_row(*(f"{i},000,000,000" for i in range(9)))
    text = shown(table, 60)
    assert [line.split() for line in text.splitlines() if line.strip()] == [
        ["column", str(i), f"{i},000,000,000"] for i in range(9)
    ]


def test_names_in_tables_and_live_displays_are_escaped_and_our_colours_stay() -> None:
    stream = io.StringIO()
    where = SafeConsole(stream, 80)
    where._force_terminal = True
    table = Table("table")
    table.add_row(Text("evil\x1b]0;title\x07\x1b[2J", style="bold"))
    where.print(table)
    assert "evil\\x1b]0;title" in stream.getvalue()
    with Live(table, console=where, auto_refresh=False) as live:
        live.refresh()
    assert not re.search(r"\x1b\[2J|\x1b\]|\x07", stream.getvalue())


def test_the_console_looks_through_the_stream_that_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    below = io.StringIO()
    monkeypatch.setattr(sys, "stdout", PrintableStream(below))
    assert console().file is below


def test_columns_says_how_wide_output_is_that_is_not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == 120
    monkeypatch.setenv("COLUMNS", "77")
    assert console().width == 77


def test_whatever_a_command_prints_or_raises_is_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        click.echo("out \x1bc")
        print("print \x9b2J", file=sys.stderr)
        raise ValueError("no such table: a\x1b]0;t\x07")

    module = type(sys)("tests_command")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests_command", module)
    monkeypatch.setitem(cli_module.COMMANDS, "evil", ("tests_command", "Prints names."))
    streams = sys.stdout, sys.stderr
    assert run(["evil"]) == 1
    assert (sys.stdout, sys.stderr) == streams
    out, err = capsys.readouterr()
    assert out == "out \\x1bc\n"
    assert err == "print \\x9b2J\nerror: no such table: a\\x1b]0;t\\x07\n"


def test_names_in_a_checkpoint_are_escaped_by_every_command_that_prints_them(tmp_path: Path) -> None:
    """A tensor, and a file, that are named as to clear the screen; in processes of their own, as a user runs them."""
    evil = "w\x1b[2Jx"
    (tmp_path / "m").mkdir()
    save_file({evil: np.zeros((40, 8), np.float32)}, tmp_path / "m" / "a\x1b[31m.safetensors")
    store = tmp_path / "s\x07"

    def output(*arguments: object) -> str:
        line = [sys.executable, "-m", "tierstore.tools.cli", *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, timeout=60)
        assert done.returncode in (0, 1), done.stderr
        return (done.stdout + done.stderr).decode()

    said = [
        output("build", tmp_path / "m", store, "--tensor", evil),
        output("build", tmp_path / "m", tmp_path / "other", "--tensor", "none"),
        output("inspect", store),
        output("inspect", store, "--json"),
        output("verify", store, "--source", tmp_path / "m"),
        output("doctor", store),
        output("epochs", store),
        output("inspect", tmp_path / "gone\x1b[2J"),
    ]
    for text in said:
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), text
    assert "w\\x1b[2Jx" in said[2]
