"""The text of a message as the code makes it: fixed words, holes for values, and choices between texts.

Input: the expression that gives the message, and where it stands. Output: a `Template`. Errors: none; what cannot be
followed is a hole with the expression's name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .program import Function, Module, Program

DEPTH_MAX = 4
CHOICES_MAX = 6
FORMATTERS = ("format_bytes", "str", "repr", "ascii", "int", "float", "sorted", "list", "tuple", "max", "min", "round")
NAMES = {"geteuid": "uid", "st_uid": "uid", "st_mode": "mode", "st_size": "size", "tolist": "values"}
NAMES |= {"facts": "numbers", "remedy": "what the message says"}
UNFOLLOWED = ("tierstore.units", "tierstore.printable")  # they format values


@dataclass(frozen=True)
class Hole:
    """A value that differs from case to case."""

    name: str


@dataclass(frozen=True)
class Choice:
    """One of several texts."""

    texts: tuple[Template, ...]


@dataclass(frozen=True)
class Template:
    """A message: words, holes and choices in order."""

    parts: tuple[str | Hole | Choice, ...] = ()

    def __add__(self, other: Template) -> Template:
        return Template((*self.parts, *other.parts)).joined()

    def joined(self) -> Template:
        """The same with neighbouring words as one part."""
        parts: list[str | Hole | Choice] = []
        for part in self.parts:
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part != "":
                parts.append(part)
        return Template(tuple(parts))

    @property
    def words(self) -> int:
        """How many fixed words there are."""
        return sum(
            len(re.findall(r"[a-z]{2,}", part))
            if isinstance(part, str)
            else max((text.words for text in part.texts), default=0)
            if isinstance(part, Choice)
            else 0
            for part in self.parts
        )

    def holes(self) -> Iterator[str]:
        """The names of its holes, those of choices too."""
        for part in self.parts:
            if isinstance(part, Hole):
                yield part.name
            elif isinstance(part, Choice):
                for text in part.texts:
                    yield from text.holes()

    def pattern(self) -> str:
        """A regular expression of the messages that it may become."""
        return "".join(
            re.escape(part)
            if isinstance(part, str)
            else "(?:" + "|".join(text.pattern() for text in part.texts) + ")"
            if isinstance(part, Choice)
            else "(?s:.*?)"
            for part in self.parts
        )


@dataclass(frozen=True)
class Place:
    """Where an expression stands: its module, its function, and what is known of the function's arguments."""

    program: Program
    module: Module
    function: Function | None = None
    known: Mapping[str, Template] = field(default_factory=dict)
    depth: int = 0

    def template(self, node: ast.expr | None) -> Template:
        """The text that an expression gives."""
        if node is None:
            return Template()
        if isinstance(node, ast.Constant):
            return Template((str(node.value),)) if node.value is not None else Template()
        if isinstance(node, ast.JoinedStr):
            whole = Template()
            for value in node.values:
                whole += self.template(value.value if isinstance(value, ast.FormattedValue) else value)
            return whole
        if isinstance(node, ast.BinOp) and _is_text(node):
            return self.template(node.left) + self.template(node.right)
        if isinstance(node, ast.IfExp):
            return _choice([self.template(node.body), self.template(node.orelse)])
        if isinstance(node, ast.BoolOp):
            return _choice([self.template(value) for value in node.values])
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Subscript):
            return self._subscript(node)
        return _hole(node)

    def _name(self, node: ast.Name) -> Template:
        if node.id in self.known:
            return self.known[node.id]
        if self.depth < DEPTH_MAX:
            inner = Place(self.program, self.module, self.function, self.known, self.depth + 1)
            texts = [inner.template(value) for value in self._assigned(node)]
            if texts:
                return _choice(texts)
            found = self.program.constant(self.module, node.id)
            if found is not None and isinstance(found[1], ast.Constant | ast.JoinedStr | ast.BinOp):
                return Place(self.program, found[0], depth=self.depth + 1).template(found[1])
        return _hole(node)

    def _assigned(self, node: ast.Name) -> list[ast.expr]:
        """The texts that the function gives a local name before this use; none if one of them is no text."""
        if self.function is None:
            return []
        assigned = self.program.assigned(self.function).get(node.id, ())
        values = [value for value in assigned if value.lineno < node.lineno]
        return values if all(_is_text(value) for value in values) else []

    def _call(self, node: ast.Call) -> Template:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "join":
            return self._joined(node)
        if name == "strerror":
            return Template((Hole("reason"),))
        if name == "len" and node.args:
            return Template((Hole(f"number of {_words(node.args[0])}"),))
        if name in FORMATTERS and node.args:
            inner = self.template(node.args[0])
            return inner if inner.parts else _hole(node)
        if self.depth < DEPTH_MAX:
            texts = [text for text in self.returned(name, node) if text.words > 0]
            if 0 < len(texts) <= CHOICES_MAX:
                return _choice(texts)
        return _hole(node)

    def _joined(self, node: ast.Call) -> Template:
        """`", ".join(texts)`: the texts of a list that the function makes, else a value."""
        texts = list(self._elements(node.args[0])) if node.args else []
        between = self.template(node.func.value) if isinstance(node.func, ast.Attribute) else Template()
        if not texts:
            return _hole(node.args[0]) if node.args else Template((Hole("names"),))
        whole = texts[0]
        for text in texts[1:]:
            whole = whole + between + text
        return whole

    def _elements(self, node: ast.expr) -> Iterator[Template]:
        """The texts of a list: its own, or those that the function puts and appends to it."""
        if isinstance(node, ast.Starred):
            yield from self._elements(node.value)
        elif isinstance(node, ast.List | ast.Tuple):
            for each in node.elts:
                yield from self._elements(each) if isinstance(each, ast.Starred) else [self.template(each)]
        elif isinstance(node, ast.IfExp):
            yield from [*self._elements(node.body), *self._elements(node.orelse)]
        elif isinstance(node, ast.Name) and self.function is not None and self.depth < DEPTH_MAX:
            inner = Place(self.program, self.module, self.function, self.known, self.depth + 1)
            for value in self.program.assigned(self.function).get(node.id, ()):
                yield from inner._elements(value)
            for call in self.program.appended(self.function).get(node.id, ()):
                yield inner.template(call.args[0])

    def returned(self, name: str, call: ast.Call) -> Iterator[Template]:
        """What a function of the product returns as text, if all that it returns is text."""
        for module, function in self.program.functions(self.module, name):
            if module.name in UNFOLLOWED:
                return
            values = [each.value for each in ast.walk(function) if isinstance(each, ast.Return)]
            if not values or not all(value is not None and _is_text(value) for value in values):
                return
            there = Place(
                self.program, module, function, self.bound(function, call, with_defaults=True), self.depth + 1
            )
            yield from (there.template(value) for value in values)

    def bound(self, function: Function, call: ast.Call, *, with_defaults: bool = False) -> dict[str, Template]:
        """The texts of a call's arguments, by the function's parameters."""
        names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
        if names[:1] in (["self"], ["cls"]):
            names = names[1:]
        pairs = [*zip(names, call.args, strict=False), *((each.arg, each.value) for each in call.keywords if each.arg)]
        found = {name: self.template(value) for name, value in pairs}
        defaults = function.args.defaults
        if defaults and with_defaults:
            for name, default in zip(names[-len(defaults) :], defaults, strict=False):
                found.setdefault(name, self.template(default))
        return found

    def _subscript(self, node: ast.Subscript) -> Template:
        """An element of a dict of texts: any of them."""
        if isinstance(node.value, ast.Name):
            found = self.program.constant(self.module, node.value.id)
            tables = [found[1]] if found is not None else []
            if self.function is not None:
                tables += self.program.assigned(self.function).get(node.value.id, ())
            for table in tables:
                if isinstance(table, ast.Dict) and table.values and all(map(_is_text, table.values)):
                    return _choice([self.template(value) for value in table.values])
        return _hole(node)


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _choice(texts: list[Template]) -> Template:
    distinct = tuple(dict.fromkeys(texts))
    if len(distinct) == 1:
        return distinct[0]
    if not any(text.words for text in distinct):
        return next((text for text in distinct if text.parts), Template())
    return Template((Choice(distinct),))


def _hole(node: ast.expr) -> Template:
    return Template((Hole(_words(node)),))


def _words(node: ast.expr) -> str:
    """A name for the value of an expression."""
    if isinstance(node, ast.Attribute | ast.Name):
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        name = NAMES.get(name, name)
        return name.strip("_").replace("_", " ").lower() or "value"
    if isinstance(node, ast.Call):
        inner = node.args[0] if node.args else node.func
        return _words(inner)
    if isinstance(node, ast.Subscript | ast.Starred | ast.Await):
        return _words(node.value)
    if isinstance(node, ast.BinOp):
        return _words(node.left if not isinstance(node.left, ast.Constant) else node.right)
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _words(node.generators[0].iter)
    if isinstance(node, ast.BoolOp):
        return _words(node.values[0])
    return "value"
