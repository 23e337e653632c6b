"""`tierstore packaging`: the files that an operator installs beside the package, printed ready for use.

Input: the name of a file. Output: its text. In the systemd unit the command is that of this very installation.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

import click

FILES = {
    "systemd": "packaging/tierstore@.service",
    "grafana": "packaging/grafana-dashboard.json",
    "proto": "remote/lookup.proto",
}
EXAMPLE_COMMAND = "/usr/local/bin/tierstore"  # of the unit as it lies in the repository


def packaged_text(name: str) -> str:
    """Returns the text of a file of FILES; in the unit, ExecStart is this installation's."""
    text = resources.files("tierstore").joinpath(FILES[name]).read_text(encoding="utf-8")
    return text.replace(EXAMPLE_COMMAND, str(own_command())) if name == "systemd" else text


def own_command() -> Path:
    """Returns the path of this installation's `tierstore`, as a service can call it."""
    called = Path(sys.argv[0]).absolute()
    return called if called.name == "tierstore" and called.is_file() else Path(sys.executable).parent / "tierstore"


@click.command("packaging")
@click.argument("name", type=click.Choice(list(FILES)))
def command(name: str) -> None:
    """Print a file for operators: the systemd unit, the Grafana dashboard, or the gRPC interface (proto).

    \b
    Example: tierstore packaging systemd > /etc/systemd/system/tierstore@.service
    """
    click.echo(packaged_text(name), nl=False)
