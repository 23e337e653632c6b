"""The reference of the command line, from its click commands.

Input: the group `tierstore`. Output: Markdown, one section a command: usage, what it does, examples, arguments and
options with their defaults. Errors: none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from tierstore.tools.cli import COMMANDS, cli


def reference() -> str:
    """Returns the reference of every command, in the order of `tierstore --help`."""
    with click.Context(cli, info_name="tierstore") as context:
        table = ["| command | what it does |", "|---|---|"]
        table += [f"| [`{name}`](#tierstore-{name}) | {_cell(line)} |" for name, (_, line) in COMMANDS.items()]
        sections = []
        for name in cli.list_commands(context):
            command = cli.get_command(context, name)
            assert command is not None
            sections += _section(command, context, name, level=2)
        return "\n".join([*table, "", *sections])


def _section(command: click.Command, parent: click.Context, name: str, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    yield f"{'#' * level} {context.command_path}\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{context.command_path} {usage}\n```\n"
    yield from _prose(inspect.cleandoc(command.help or ""))
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    yield "| option | what it does |"
    yield "|---|---|"
    for option in options:
        if not option.hidden:
            yield f"| {_names(option, context)} | {_what(option, context)} |"
    yield ""
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None and not found.hidden:
                yield from _section(found, context, below, level + 1)


def _prose(text: str) -> Iterator[str]:
    """A help text: paragraphs as they are, and what stands behind click's mark of fixed lines as a block."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        if lines and lines[0].strip() == "\b":
            yield "```text\n" + "\n".join(lines[1:]) + "\n```\n"
        else:
            yield _escaped(paragraph) + "\n"


def _names(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    value = "" if option.is_flag or option.count else f" `{option.make_metavar(context)}`"
    return _cell_of_code(names + value)


def _what(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    text = _cell(record[1] if record else option.help or "")
    return text + (" May be given more than once." if option.multiple and "more than once" not in text else "")


def _cell(text: str) -> str:
    """Text in a cell of a table."""
    return _escaped(" ".join(text.split())).replace("|", "\\|")


def _cell_of_code(text: str) -> str:
    return text.replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text whose characters mean nothing in Markdown; what stands in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]#~$])", r"\\\1", part) for part in parts)
