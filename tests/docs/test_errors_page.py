"""The page of errors has every error of the code, and the messages that users see are on it."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builder import error_catalog
from builder.error_catalog import BUILT_IN, REMEDIES, Message
from builder.program import Program
from support.repository import REPOSITORY

import tierstore
from engram_adapter import build_checkpoint

MADE_ELSEWHERE = {"tierstore/errors.py"}  # classes, and no message


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(REPOSITORY)


@pytest.fixture(scope="module")
def messages(program: Program) -> list[Message]:
    return error_catalog.catalog(program)


def calls_in(path: Path, classes: set[str]) -> int:
    """How many times a file makes an error of these classes, counted in its tokens: `Name(` that is no definition."""
    text = path.read_text()
    if not any(name in text for name in classes):
        return 0
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)
    ]
    return sum(
        name.type == tokenize.NAME and name.string in classes and opening.string == "(" and before.string != "class"
        for before, name, opening in zip(tokens, tokens[1:], tokens[2:], strict=False)
    )


def test_no_error_of_the_code_is_missing(program: Program) -> None:
    classes = set(program.error_classes)
    assert len(classes) > 12
    total = 0
    for module in program.modules.values():
        found = sum(error in classes for _, _, error in error_catalog._calls(program, module))
        made = calls_in(REPOSITORY / module.path, classes)
        assert found == made, f"{module.path} makes {made} named errors, the page has {found}"
        total += made
    assert total > 700


def test_each_call_gives_a_message(program: Program, messages: list[Message]) -> None:
    on_page = {(each.error, each.module) for each in messages}
    for module in program.modules.values():
        for function, call, error in error_catalog._calls(program, module):
            if error in program.error_classes:
                own = list(error_catalog._messages(program, module, function, call, error))
                assert own, f"{module.path}:{call.lineno}: {error} has no message"
                assert {(each.error, each.module) for each in own} <= on_page


def test_every_class_has_a_general_remedy(program: Program) -> None:
    assert {*program.error_classes, *BUILT_IN} == set(REMEDIES)


def test_the_page_has_a_section_for_each_class_and_a_row_for_each_message(
    program: Program, messages: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(error_catalog, "Program", lambda: program)
    monkeypatch.setattr(error_catalog, "catalog", lambda _: messages)
    page = error_catalog.reference()
    assert [line for line in page.splitlines() if line.startswith("## ")][1:] == [
        f"## {name}" for name in (*error_catalog._ordered(program), *BUILT_IN)
    ]
    sections = page.partition("\n## TierStoreError")[2]
    rows = [line for line in sections.splitlines() if line.startswith("| ") and not line.startswith("| message |")]
    assert len(rows) == len(messages)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)  # three cells each


FAILING: dict[str, Callable[[Path], object]] = {
    "no store": lambda built: tierstore.open(built / "no"),
    "a budget below zero": lambda built: tierstore.open(built, dram=-1),
    "a budget too small": lambda built: tierstore.open(built, dram=1000),
    "an unknown way to read": lambda built: tierstore.open(built, io="telepathy"),
    "an unknown version": lambda built: tierstore.open(built, version=7),
    "no daemon": lambda built: tierstore.connect(built.parent / "no.sock", timeout_s=0.05),
    "a wrong address": lambda _: tierstore.connect("grpc://host"),
    "an option of another way": lambda _: tierstore.connect("grpc://host:1", hbm="1GiB"),
    "no checkpoint": lambda built: build_checkpoint(built / "no", built.parent / "new"),
    "never trained": lambda built: tierstore.open_training(built, at=3),
    "something else than a profile": lambda built: tierstore.open_profile(built / "catalog.mdb"),
    "keys of another type": lambda built: tierstore.open(built)["layers.1"].lookup(np.zeros((1, 2), np.float32)),
    "keys of another shape": lambda built: tierstore.open(built)["layers.1"].lookup(np.zeros(3, np.int64)),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_message_that_a_user_sees_is_on_the_page(name: str, messages: list[Message], built: Path) -> None:
    kinds = (tierstore.TierStoreError, ValueError, TypeError, TimeoutError)
    with pytest.raises(kinds) as raised:
        FAILING[name](built)
    text, error = str(raised.value), type(raised.value).__name__
    whole = [each for each in messages if each.error == error and re.fullmatch(each.template.pattern(), text)]
    within = [each for each in messages if each.template.words > 4 and re.search(each.template.pattern() + "$", text)]
    # Of a message that passes on another's text, that other is on the page too.
    assert any(each.template.words >= 2 for each in whole) or within, f"{error}: {text}"


def test_what_the_operating_system_refuses_is_on_the_page(program: Program, built: Path) -> None:
    rows = [line for line in error_catalog._refusals(program) if line.startswith("| `")]
    with pytest.raises(tierstore.ConfigError, match=r"No such file or directory; check the path$"):
        tierstore.open_profile(built / "no.profile")
    assert any("`ENOENT`" in row and row.endswith("| Check the path |") for row in rows)
    assert any("`ENOSPC`" in row and "are free on the disk of" in row for row in rows)


def test_a_message_is_split_where_it_turns_to_the_remedy() -> None:
    from builder.message_templates import Hole, Template

    def split(*parts: str | Hole) -> tuple[str, str]:
        what, remedy = Message("ConfigError", Template(parts), "m", 1).split()
        return "".join(map(str, what.parts)), "".join(map(str, remedy.parts))

    assert split("a; b is wrong; run it again") == ("a; b is wrong", "run it again")
    assert split("a is closed: look for it; then open it, or leave it") == (
        "a is closed",
        "look for it; then open it, or leave it",
    )
    assert split("a is 3, must be 4") == ("a is 3, must be 4", "")
    assert split("no answer; is it a tierstore?") == ("no answer", "is it a tierstore?")
