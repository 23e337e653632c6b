"""`python -m tierstore.tools.demo`."""

from .run import command

command()
