"""The page of errors and remedies: every error that the product raises by name, from the code that makes it.

Input: the product's source. Output: Markdown: the classes, the refusals of the operating system, then every message of
each class as a template, with what helps. Errors: `ValueError` for a class without a general remedy in REMEDIES.

A message says what is wrong, and behind its last semicolon or colon what helps. If it does not, the remedy of its
class stands instead.
"""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .message_templates import Choice, Hole, Place, Template
from .program import Function, Module, Program

REMEDIES = {  # what helps if a message does not say it
    "TierStoreError": "Read the message: it names the cause.",
    "StoreNotReadyError": "Build the store, resume its build, or open it again.",
    "FormatError": "Copy or download the file again, or make it anew. If its format is newer, update tierstore.",
    "CorruptPageError": "`tierstore verify STORE --repair --source CHECKPOINT`, or plan the placement anew.",
    "FingerprintMismatchError": "Use the store that was built for this model and tokenizer.",
    "BudgetError": "Give a larger budget, free memory or disk, or ask for less.",
    "ConfigError": "Change the option, the path or the checkpoint that the message names, and call again.",
    "DaemonError": "Start the daemon, wait for it, or correct the address. The store itself is unharmed.",
    "RankError": "See the log of the rank that the message names, then start all ranks again: they resume together.",
    "Refusal": "The remote server names the reason; the client raises it as the class that fits.",
    "OverdueError": "Wait longer (`timeout_s=`), or see what holds up the server that the message names.",
    "TryAgainError": "Call again: the server is busy or moves to another version.",
    "NotUnderstoodError": "Give the address of a tierstore server; see what answers there, and its log.",
    "StoreChangedError": "Connect again: another store is served under this address.",
    "VersionChangedError": "Look up again, or open the store anew: its version was taken away.",
    "ChannelClosed": "Connect again: the other side of the socket has ended.",
    "NothingChangedError": "Nothing needs to be done.",
    "EngineMismatchError": "Install a version of the engine that the plug-in was tested with.",
    "NoIdsError": "Give files of token ids, or name the field or the dtype that holds them.",
    "ValueError": "Correct the argument.",
    "TypeError": "Give an argument of the type that the message names.",
    "TimeoutError": "Wait longer, or look for what holds up the disk, the daemon or the rank.",
    "MemoryError": "Ask for less at once, or free memory.",
    "ImportError": "Install the extra that the message names.",
    "PermissionError": "Let this user read and write what the message names.",
}
BUILT_IN = {  # of Python, and when they are raised
    "ValueError": "An argument has a value, a shape or a range that is not allowed.",
    "TypeError": "An argument has a wrong type or dtype, or an object cannot be copied to another process.",
    "TimeoutError": "Something did not happen within its limit.",
    "MemoryError": "There is not enough memory for the work itself, beside all budgets.",
    "ImportError": "A package that this needs is not installed.",
    "PermissionError": "This user may not do that.",
}
IMPERATIVES = re.compile(
    r"(?P<more>then |or |first |and )?(?:"
    r"add|allow|apt-get|ask|await|begin|build|call|cast|change|check|choose|clear|clip|close|commit|compact|"
    r"compare|connect|convert|copy|correct|decode|decompress|delete|dequantize|do|download|drop|encode|end|export|"
    r"find|finish|free|get|give|go|have|install|keep|leave|let|list|load|look|lower|make|map|mend|merge|mount|move|"
    r"name|note|open|pass|pick|pickle|pin|plan|prefetch|profile|prune|publish|put|raise|read|rebuild|record|reduce|"
    r"remove|rename|repair|restart|restore|retry|run|save|say|see|send|serve|set|shorten|skip|split|start|stop|"
    r"take|train|try|turn|unset|update|use|wait|write"
    r")\b|is [^;]*\?$"
)
MESSAGES_NOT_LISTED = ("tierstore.tools.bench", "tierstore.kernels.gpu")  # built-in errors of benchmarks and launchers


@dataclass(frozen=True)
class Message:
    """One message of an error, and where the code makes it."""

    error: str
    template: Template
    module: str
    line: int

    def split(self) -> tuple[Template, Template]:
        """What is wrong, and what helps; the latter is empty if the message does not say it."""
        parts = self.template.parts
        spans = [
            (place, *span)
            for place, part in enumerate(parts)
            if isinstance(part, str)
            for span in _remedy_starts(part, parts[place + 1] if place + 1 < len(parts) else None)
        ]
        if not spans:
            return self.template, Template()
        place, start, end, _ = min(spans, key=lambda span: (span[3], -span[0], -span[1]))
        part = parts[place]
        assert isinstance(part, str)
        what, helps = (*parts[:place], part[:start]), (part[end:], *parts[place + 1 :])
        return Template(what).joined(), Template(helps).joined()


def _remedy_starts(text: str, following: object) -> Iterator[tuple[int, int, int]]:
    """Where a text may turn from what is wrong to what helps: start and end of the mark, and how doubtful it is."""
    for mark in re.finditer(r"; |: |, ", text):
        found = IMPERATIVES.match(text, mark.end())
        if found:
            yield *mark.span(), ("; ", ": ", ", ").index(mark[0]) + (3 if found["more"] else 0)
        elif mark.end() == len(text) and mark[0] != ", " and isinstance(following, Choice):
            if all(text.parts and IMPERATIVES.match(str(text.parts[0])) for text in following.texts):
                yield *mark.span(), 0
        elif mark.end() == len(text) and mark[0] == "; " and following is not None:
            yield *mark.span(), 2  # the remedy is a value


def catalog(program: Program) -> list[Message]:
    """Returns every message of every named error, and of the built-in ones that are raised for callers."""
    found = []
    for module in program.modules.values():
        for function, call, error in _calls(program, module):
            if error in program.error_classes or (error in BUILT_IN and not _is_internal(module)):
                found += _messages(program, module, function, call, error)
    return list({(each.error, each.template, each.module): each for each in found}.values())


def _is_internal(module: Module) -> bool:
    return module.name.startswith(MESSAGES_NOT_LISTED)


def _calls(program: Program, module: Module) -> Iterator[tuple[Function | None, ast.Call, str]]:
    """Each call of an error's class in a module: the function around it, the call, the class's name."""

    for name in (*program.error_classes, *BUILT_IN):
        yield from ((function, call, name) for function, call in module.calls.get(name, ()))


def _messages(
    program: Program, module: Module, function: Function | None, call: ast.Call, error: str
) -> Iterator[Message]:
    """The messages of one call: of a helper that others give a text, one for each text."""
    here = Place(program, module, function)
    plain = here.template(call.args[0] if call.args else None)
    expanded = []
    if function is not None:
        parameters = {each.arg for each in (*function.args.args, *function.args.kwonlyargs)} - {"self", "cls"}
        if parameters & {hole.replace(" ", "_") for hole in plain.holes()}:
            for caller, around, use in _uses(program, module, function):
                known = Place(program, caller, around).bound(function, use)
                given = Place(program, module, function, known).template(call.args[0])
                place = (caller.name, use.lineno) if given.words > plain.words else (module.name, call.lineno)
                expanded.append(Message(error, given if given.words > plain.words else plain, *place))
    for each in expanded or [Message(error, plain, module.name, call.lineno)]:
        parts = each.template.parts
        if len(parts) == 1 and isinstance(parts[0], Choice):
            yield from (Message(error, text, each.module, each.line) for text in parts[0].texts)
        else:
            yield each


def _uses(program: Program, owner: Module, function: Function) -> Iterator[tuple[Module, Function | None, ast.Call]]:
    """Each call of a function, by its name in its own module and in those that import it."""
    for module, name in [(owner, function.name), *program.importers.get((owner.name, function.name), ())]:
        yield from ((module, around, use) for around, use in module.calls.get(name, ()))


def reference() -> str:
    """Returns the whole page below its introduction."""
    program = Program()
    messages = catalog(program)
    classes = [*_ordered(program), *BUILT_IN]
    lines = ["| error | when | what to do |", "|---|---|---|"]
    for name in classes:
        if name not in REMEDIES:
            raise ValueError(f"error_catalog.REMEDIES has no remedy for {name}; add one")
        lines.append(f"| [`{name}`](#{name.lower()}) | {_when(program, name)} | {REMEDIES[name]} |")
    lines += ["", *_refusals(program)]
    for name in classes:
        own = sorted((each for each in messages if each.error == name), key=lambda each: (each.module, each.line))
        lines += [f"\n## {name}\n", f"{_when(program, name)}\n", f"{REMEDIES[name]}\n"]
        if own:
            lines += ["{.messages}", "| message | what to do | raised in |", "|---|---|---|", *map(_row, own)]
    return "\n".join([*lines, ""])


def _ordered(program: Program) -> list[str]:
    """The classes: the public ones in the order of `tierstore.errors`, then those that derive from them."""
    public = list(program.modules["tierstore.errors"].classes)
    return public + sorted(set(program.error_classes) - set(public))


def _when(program: Program, name: str) -> str:
    found = program.error_classes.get(name)
    if found is None:
        return BUILT_IN[name]
    text = (ast.get_docstring(found) or "").partition("\n\n")[0]
    base = ast.unparse(found.bases[0])
    kind = f" Is a `{base}`." if base not in ("Exception", "TierStoreError") else ""
    return "".join(part if part.startswith("`") else _plain(part) for part in re.split(r"(`[^`]*`)", text)) + kind


def _row(message: Message) -> str:
    what, remedy = message.split()
    helps = _sentence(_shown(remedy)) if remedy.parts else "as above"
    return f"| {_shown(what) or '(no text)'} | {helps} | `{message.module}` |"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _shown(template: Template) -> str:
    """A template in a cell: values in italics, choices with bars between them."""
    shown = []
    for part in template.parts:
        if isinstance(part, str):
            shown.append(_plain(part))
        elif isinstance(part, Hole):
            shown.append(f"*{_plain(part.name)}*")
        elif isinstance(part, Choice):
            texts = [_shown(text) or "nothing" for text in part.texts]
            ends_with_blank = any(text.parts and str(text.parts[-1]).endswith(" ") for text in part.texts)
            shown.append(f"[{' / '.join(texts)}]" + (" " if ends_with_blank else ""))
    text = "".join(shown)
    return re.sub(r"\*\*", "*\u200b*", " ".join(text.split()))


def _plain(text: str) -> str:
    """Text that means nothing in Markdown and stands in a cell."""
    return re.sub(r"([\\*_`<>\[\]|#$~{}])", r"\\\1", text.replace("\n", " "))


def _refusals(program: Program) -> Iterator[str]:
    """What the operating system refuses, from the table of `tierstore.causes`: one remedy for each cause."""
    module = program.modules["tierstore.causes"]
    table = module.constants["_CAUSES"]
    assert isinstance(table, ast.Dict)
    yield "## If the operating system refuses\n"
    yield (
        "A message names the file, and then the system's own words with the numbers that matter. "
        "The class is that of the cause, unless the row of a class below says otherwise.\n"
    )
    yield "| code | the system says | numbers | what to do |"
    yield "|---|---|---|---|"
    codes: dict[tuple[str, str], list[str]] = {}
    for key, value in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Attribute)
        for facts, remedy in _answers(program, module, value):
            of_answer = codes.setdefault((_shown(facts), _sentence(_shown(remedy))), [])
            if key.attr not in of_answer:
                of_answer.append(key.attr)
    for (facts, remedy), names in codes.items():
        words = ", ".join(os.strerror(getattr(errno, name)) for name in names)
        yield f"| {', '.join(f'`{name}`' for name in names)} | {words} | {facts} | {remedy} |"


def _answers(program: Program, module: Module, value: ast.expr) -> Iterator[tuple[Template, Template]]:
    """Facts and remedies of one cause: of a function, one pair for each of its returns."""
    if isinstance(value, ast.Call):  # _always(remedy, kind, facts)
        place = Place(program, module)
        facts = next((each.value for each in value.keywords if each.arg == "facts"), None)
        yield place.template(facts), place.template(value.args[0])
    elif isinstance(value, ast.Name):
        for owner, function in program.functions(module, value.id):
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                    place = Place(program, owner, function)
                    facts, *rest = node.value.elts
                    of_file = isinstance(rest[0], ast.Starred) and isinstance(rest[0].value, ast.Call)
                    remedy = rest[0].value.args[0] if of_file else rest[0]  # type: ignore[attr-defined]
                    yield place.template(facts), place.template(remedy)
