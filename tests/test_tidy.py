"""The repository is tidy: no retired words, long lines or large classes; and `tidy` finds what it is there for."""

from __future__ import annotations

import pytest
from support.tidy import RETIRED, findings_of, tidy


@pytest.mark.long
def test_the_repository_is_tidy() -> None:
    assert [str(finding) for finding in tidy()] == []


@pytest.mark.parametrize(
    ("path", "text", "rule"),
    [
        ("tierstore/a.py", "num_lanes = 3\n", "lanes"),
        ("kernels/cpu/a.h", "struct PageLane {};\n", "lane"),
        ("README.md", "A wave of reads.\n", "wave"),
        ("tierstore/a.py", 'MAX_LENT = "1"\n', "lent"),
        ("tools/a.py", '"""A file. Flows in: bytes."""\n', "Flows in"),
        ("tools/a.py", '"""A file. Refuses others."""\n', "Refuses"),
        ("tierstore/a.py", "def as_record(): ...\n", "as_record"),
        ("tests/a.py", "x" * 121, "long line"),
        ("docs/a.md", "y" * 121, "long line"),
        ("kernels/__init__.py", "native: Any = None\n", "Any"),
        ("tierstore/a.py", "STAGING_FRACTION = 16\n", "divisor"),
        ("tierstore/a.py", "STAGING_FRACTION: int = 4 / 4\n", "divisor"),
        ("tierstore/a.py", "STAGING_PART = 16\n", "STAGING_PART"),
        ("tierstore/a.py", "class Host:\n" + "    x = 1\n" * 200, "large class"),
        ("tierstore/spoil.py", "", "spoil"),
        ("tierstore/a.py", "STAGING_FRACTION = (\n", "syntax"),
    ],
)
def test_what_is_untidy_is_found(path: str, text: str, rule: str) -> None:
    assert [finding.rule for finding in findings_of(path, text)] == [rule]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/gpu/a.py", "lane = tl.arange(0, 32)\n"),
        ("tierstore/a.py", "planes = mainplanes\n"),
        ("FORMAT.md", "| " + "z" * 200 + " |\n"),
        ("tierstore/a.py", "STAGING_FRACTION = 1 / 16\n"),
        ("tierstore/a.py", "class Host:\n" + "    x = 1\n" * 199),
        ("CHANGELOG.md", "The metric of lanes is called page readers.\n"),
    ],
)
def test_what_is_tidy_is_left_alone(path: str, text: str) -> None:
    assert list(findings_of(path, text)) == []


def test_a_finding_says_where_it_is_and_what_to_write() -> None:
    (finding,) = findings_of("tierstore/a.py", "first = 1\nsecond = lanes\n")
    assert str(finding) == "tierstore/a.py:2: lanes: write: page reader"


def test_a_word_is_retired_once() -> None:
    words = [word for forms in RETIRED for word in forms]
    assert len(words) == len(set(words))
