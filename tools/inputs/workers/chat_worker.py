"""A worker that renders chats through a chat template, in jinja2's sandbox, as transformers does.

Input: a request {"do": "load", "template", "variables"}, then requests {"do": "render"} with a chat's messages in JSON.
Output: the text of each, in UTF-8. Errors: `RefusedError` with the template's own words.

A template that asks for the time has none here: the same chats are the same trace on any day.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

if __package__:
    from .worker_messages import Message, RefusedError, memory_argument, serve
else:  # as a program
    from worker_messages import Message, RefusedError, memory_argument, serve  # type: ignore[import-not-found,no-redef]

_loaded: list[tuple[Template, dict[str, Any]]] = []  # the one template, and its variables


class _Generation(Extension):
    """{% generation %} marks what the model writes, for masks in training; its text is as it stands."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def handle(head: dict[str, Any], body: memoryview) -> Iterator[Message]:
    """Answers one request."""
    try:
        if head["do"] == "load":
            _loaded[:] = [(_environment().from_string(head["template"]), head["variables"])]
            return
        template, variables = _loaded[0]
        text = template.render(messages=json.loads(bytes(body)), add_generation_prompt=False, **variables)
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise RefusedError("template", f"{type(error).__name__}: {error}") from error
    yield {}, (text.encode(errors="replace"),)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Not jinja2's own filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    serve(handle, memory_argument())
