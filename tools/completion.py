"""`tierstore completion`: the script with which a shell completes commands, options and files.

Input: a shell's name. Output: its script, which asks `tierstore` itself at each Tab. Errors: usage, for another shell.
"""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the script that completes tierstore's commands, options and files in SHELL.

    \b
    bash, in ~/.bashrc:  eval "$(tierstore completion bash)"
    zsh, in ~/.zshrc:    eval "$(tierstore completion zsh)"    (after compinit)
    fish, once:          tierstore completion fish > ~/.config/fish/completions/tierstore.fish
    """
    from click.shell_completion import get_completion_class

    from .cli import COMPLETE_VARIABLE, cli

    made_by = get_completion_class(shell)
    assert made_by is not None
    click.echo(made_by(cli, {}, "tierstore", COMPLETE_VARIABLE).source())
