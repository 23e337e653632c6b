"""What the documents show is so: blocks that are marked are run, and all others name only what there is."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from support.blocks import Block, Reader, blocks_of, commands_of, differs, given_to, pages, tierstore_lines
from support.repository import REPOSITORY
from support.text_store import TextStore

from tierstore.tools.cli import cli

PAGES = pages()
PRODUCT = ("tierstore", "engram_adapter")


def named(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def give(text: TextStore, names: list[str], folder: Path) -> None:
    """Puts what a page asks for into its reader's folder: links to files that no page changes, stores of its own."""
    model = text.store.parent / "model"
    known = {
        "model": lambda path: shutil.copytree(model, path, copy_function=os.link),
        "model.tier": text.copy,
        "text.trace": lambda path: os.link(text.trace, path),
        "text.profile": lambda path: shutil.copyfile(text.profile, path),
    }
    for name in names:
        assert name in known, f"'{name}' cannot be given to a page; there are {', '.join(known)}"
        known[name](folder / name)


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("path", [path for path in PAGES if any(block.is_run for block in blocks_of(path))], ids=named)
def test_a_page_does_what_it_shows(path: Path, text: TextStore, tmp_path: Path) -> None:
    give(text, given_to(path), tmp_path)
    assert Reader(tmp_path).run(blocks_of(path)) > 0


@pytest.mark.slow
@pytest.mark.process
def test_the_example_of_how_to_test_a_block_is_one(text: TextStore, tmp_path: Path) -> None:
    examples = [block.text for block in blocks_of(REPOSITORY / "docs" / "writing.md") if "<!-- given:" in block.text]
    page = tmp_path / "page.md"
    page.write_text(examples[0])
    give(text, given_to(page), tmp_path)
    assert Reader(tmp_path).run(blocks_of(page)) == 2


def python_blocks() -> list[Block]:
    return [block for path in PAGES for block in blocks_of(path) if block.language == "python"]


@pytest.mark.long
def test_every_python_block_is_python_and_names_only_what_there_is() -> None:
    for block in python_blocks():
        try:
            tree = ast.parse(block.text)
        except SyntaxError as error:
            pytest.fail(f"{block.page}:{block.line + (error.lineno or 0)}: {error.msg}")
        for node in ast.walk(tree):
            where = f"{block.page}:{block.line + getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PRODUCT:
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{where}: {node.module} has no {alias.name}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PRODUCT:
                module = importlib.import_module(node.value.id)
                assert hasattr(module, node.attr), f"{where}: {node.value.id} has no {node.attr}"


def test_every_command_in_a_block_has_its_options() -> None:
    for path in PAGES:
        for block in blocks_of(path):
            if block.language not in ("python", "text"):  # text: what a program says
                for line in tierstore_lines(block):
                    check_command(line, block.where)


def check_command(line: str, where: str) -> None:
    """Fails if a line calls a command, or gives an option, that there is not."""
    line = re.split(r"\s(?:\||&&?|;|>>?)(?:\s|$)", re.sub(r"\$\([^)]*(?:\([^)]*\)[^)]*)*\)", "X", line))[0]
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return  # a quoted text goes on in the next line
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None, f"{where}: there is no command 'tierstore {words[1]}'"
    context = click.Context(command, info_name=words[1])
    if isinstance(command, click.Group):
        return
    known = {name for option in command.get_params(context) for name in (*option.opts, *option.secondary_opts)}
    for word in words[2:]:
        if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
            assert word.partition("=")[0] in known, f"{where}: 'tierstore {words[1]}' has no option {word}"


def test_output_is_compared_and_dots_stand_for_anything() -> None:
    assert differs(("built in ... s", "...", "ready"), "built in 3 s\na\nb\nready\n") is None
    assert differs(("...", "ready"), "ready\n") is None
    assert differs(("built",), "built\nand more\n") is not None
    assert differs(("built in ... s",), "built at 3 o'clock\n") is not None


def test_commands_go_on_behind_a_backslash_and_may_fail() -> None:
    first, second = commands_of("$ echo a \\\n    b\na b\n$ false  # fails\n")
    assert (first.line, first.output, first.fails) == ("echo a \\\n    b", ("a b",), False)
    assert (second.line, second.output, second.fails) == ("false", (), True)


def test_a_page_that_shows_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.blocks.READY_S", 0.1)

    def block(language: str, text: str, *words: str) -> Block:
        return Block("docs/a.md", 1, language, frozenset(words), text)

    console, python = block("console", "$ echo one\none\n", "run"), block("python", "x = 1\nprint(x)\n", "run")
    assert Reader(tmp_path).run([console, python, block("text", "1\n", "output")]) == 2
    for wrong in (
        [block("console", "$ echo one\ntwo\n", "run")],
        [block("console", "$ false\n", "run")],
        [block("console", "$ true  # fails\n", "run")],
        [python, block("text", "2\n", "output")],
        [block("console", "$ sleep 60 &\nready\n", "run")],
    ):
        with pytest.raises(AssertionError, match=r"docs/a\.md:1"):
            Reader(tmp_path).run(wrong)
