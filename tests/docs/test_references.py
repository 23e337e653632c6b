"""The generated references are complete: every command and option, every metric, every public name."""

from __future__ import annotations

import importlib
import inspect
import re

import click
import pytest
from builder import command_line, metric_families, public_api
from support.repository import REPOSITORY

import engram_adapter
import tierstore
from tierstore.tools.cli import COMMANDS, cli


def test_every_command_and_each_of_its_options_is_there() -> None:
    page = command_line.reference()
    for name, (module, _) in COMMANDS.items():
        section = page.partition(f"\n## tierstore {name}\n")[2].partition("\n## ")[0]
        command: click.Command = importlib.import_module(module).command
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert all(f"`{each}`" in section for each in option.opts), f"{name} {option.opts}"
    assert page.count("\n## tierstore ") == len(COMMANDS) == len(cli.list_commands(click.Context(cli)))


def test_every_metric_of_the_dashboard_and_of_the_engines_is_there() -> None:
    page = metric_families.reference()
    dashboard = (REPOSITORY / "packaging" / "grafana-dashboard.json").read_text()
    used = set(re.findall(r"tierstore_[a-z_]+", dashboard))
    assert len(used) > 10
    for name in used:
        row = re.sub(r"_seconds_(?:sum|count)$", "_seconds_bucket", name)  # a histogram's row names its buckets
        assert f"| `{row}` |" in page, name
    for name in ("steps", "tokens", "rows", "wait_seconds", "keys", "read_bytes"):
        assert page.count(f"| `tierstore_engine_{name}_total` |") == 1
    assert "Labels: `table`, `order`, `tier`." in page


@pytest.mark.parametrize(("module", "names"), [(tierstore, tierstore.__all__), (engram_adapter, ["HashSpec"])])
def test_every_public_name_is_there_with_its_methods(module: object, names: list[str]) -> None:
    assert inspect.ismodule(module)
    names = [name for name in names if not name.startswith("_")]
    page = public_api.reference(module, names)
    for name in names:
        found = getattr(module, name)
        heading = name if inspect.isclass(found) else f"{module.__name__}.{name}"
        assert f"\n## {heading}\n" in page
        if inspect.isclass(found):
            own = [
                each for each, value in vars(found).items() if inspect.isfunction(value) and not each.startswith("_")
            ]
            for method in own:
                assert not inspect.getdoc(getattr(found, method)) or f"\n### {name}.{method}\n" in page


def test_sections_of_a_docstring_become_lists() -> None:
    arguments = "Args:\n    a: one thing,\n        over two lines.\n    b: [N, 2] and *more*.\n"
    text = f"What it does.\n\n{arguments}\nReturns:\n    A value."
    assert list(public_api.prose(text)) == [
        "What it does.\n",
        "**Args**\n",
        "`a`\n: One thing, over two lines.\n",
        "`b`\n: \\[N, 2\\] and \\*more\\*.\n",
        "**Returns**: A value.\n",
    ]
    assert list(public_api.prose("dram: bytes. io: how.", ["dram", "io"])) == ["`dram`\n: Bytes.\n", "`io`\n: How.\n"]
