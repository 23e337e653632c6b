"""Marks stay right when files move, and an expression that excludes a mark spares its files being loaded."""

from __future__ import annotations

import subprocess
from pathlib import PurePath

import pytest
from support.marks import MARKERS, MARKS, USES, excluded_by, marks_by_use, marks_of
from support.repository import TESTS


def starts_a_program() -> None:
    subprocess.run(["true"], check=True)


def by_a_helper_inside() -> None:
    def act() -> None:
        starts_a_program()

    act()


def does_neither() -> None:
    assert TESTS.is_dir()


@pytest.mark.parametrize("path", MARKS)
def test_each_marked_path_is_a_folder_or_a_file_of_tests(path: str) -> None:
    assert (TESTS / path).is_dir() or (TESTS / f"{path}.py").is_file(), "it has moved: change MARKS in support/marks.py"


def test_every_mark_that_is_given_is_registered() -> None:
    assert {mark for marks in (*MARKS.values(), *USES.values()) for mark in marks} <= MARKERS.keys()


def test_a_file_has_the_marks_of_its_folder_too() -> None:
    assert marks_of(PurePath("attached/test_gpu_clients.py")) == {"daemon", "gpu", "process"}
    assert marks_of(PurePath("test_units.py")) == frozenset()


def test_a_test_is_marked_by_what_it_and_its_helpers_use() -> None:
    assert marks_by_use(by_a_helper_inside, ()) == {"process"}
    assert marks_by_use(does_neither, ()) == frozenset()
    assert marks_by_use(does_neither, ("starts_a_program",)) == {"process"}


@pytest.mark.parametrize(
    ("expression", "excluded"),
    [("not gpu and not slow", {"gpu", "slow"}), ("not slow", {"slow"}), ("gpu", set()), ("", set()),
     ("not gpu or slow", set()), ("not (gpu and slow)", set())],
)  # fmt: skip
def test_only_files_that_no_test_is_taken_of_are_passed_over(expression: str, excluded: set[str]) -> None:
    assert excluded_by(expression) == excluded
