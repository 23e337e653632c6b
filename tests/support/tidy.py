"""What `make lint` checks that no linter knows: retired words, long lines, large classes, fractions, headers.

Input: the repository's text files. Output: findings, one `Finding` each; as a program, they are printed and the exit
status is 1 if there are any. Errors: none; a file that is not UTF-8 is a finding.

One pass over all files, in a second or two and without torch; `tests/test_tidy.py` runs the same. To retire a word, add
it to RETIRED or PHRASES.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as a program, this file finds `support` by itself
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.repository import REPOSITORY

COLUMNS_MAX = 120
CLASS_LINES_MAX = 200
SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".c", ".md", ".cfg", ".toml", ".yaml", ".yml", ".proto", ".service"}
TYPED_BORDER = ("kernels/__init__.py", "kernels/_cpu.pyi")
NAMES_RETIRED_WORDS = ("CHANGELOG.md", "tests/support/tidy.py", "tests/test_tidy.py")

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # of `num_lanes`, `LaneError` and `MAX_LANES`, each word
RETIRED = {
    ("lane", "lanes"): "page reader",
    ("wave", "waves"): "read batch",
    ("disown", "disowns", "disowned"): "abandon",
    ("settle", "settles", "settled", "settling"): "reclaim, or wait for the grace period",
    ("tally", "tallies", "tallied"): "item statistics",
    ("told", "tell", "tells"): "report, say, or name the actor",
    ("said",): "report, log, raise: name the actor",
    ("door", "doors"): "access policy",
    ("greeting", "greetings", "greet", "greets"): "handshake",
    ("spoil", "spoils", "spoiled", "spoilt"): "damage, invalidate",
    ("lent", "lend", "lends"): "writable export",
    ("linger", "lingers", "lingering"): "orphaned",
    ("fixing",): "number of residues",
    ("worth",): "expected accesses",
}
USUAL = {  # paths in which a word has its usual meaning
    "lane": r"kernels/gpu/|tests/gpu/|tierstore/tiers/hbm/|tools/bench/gpu/|codecs|decisions/replay",
    "wave": r"kernels/gpu/|tests/gpu/|tierstore/tiers/hbm/|tools/bench/gpu/",
    "door": r"\.md$",
    "lent": r"^FORMAT\.md$|^tierstore/ipc/messages\.py$|^tests/ipc/test_messages\.py$",  # a key that old clients read
    "linger": r"^tierstore/daemon/http\.py$",  # SO_LINGER
    "worth": r"\.md$|^tests/",
    "told": r"^tests/",
    "said": r"^tests/",
}
PHRASES = (  # a regular expression, letters that each match has (the fast test), and what to write
    (r"\bFlows (?:in|out)\b", "Flows", "Input, Output"),
    (r"(?:^|\. )Refuses\b", "Refuses", "Errors in a header, Raises in a docstring"),
    (r"\b_?(?:as|from)_record\b", "_record", "to_dict, from_dict"),
    (r"HeldStatic|[Hh]eld_epochs?\b|held_static", "eld", "pin"),
    (r"EpochHold|epoch_hold|hold_static|\b_can_hold\b", "old", "pin"),
    (r"\bk(?:Row|Page|Pair|Token)Unit\b", "Unit", "request kind"),
    (r"\basks\.py|\bimport asks\b|\.asks\b", "asks", "admin requests"),
    (r"\bis_late\b", "_late", "timed out"),
    (r"\b_?[A-Z][A-Z_]*_(?:PART|SHARE)\b", "_", "_FRACTION, and below one"),
    (r"\b(?:is|are) none\b(?! of)", " none", "is missing, there is not a"),
)
_USE = {word: use for words, use in RETIRED.items() for word in words}
_FIRST = {word: words[0] for words in RETIRED for word in words}


@dataclass(frozen=True)
class Finding:
    path: str
    line: int
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.remedy}"


def tidy(root: Path = REPOSITORY) -> list[Finding]:
    """Returns what is found in the text files of a repository."""
    return list(_all_findings(root))


def _all_findings(root: Path) -> Iterator[Finding]:
    for path in files_of(root):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield Finding(path, 1, "not UTF-8", "save it as UTF-8")
            continue
        yield from findings_of(path, text)


def files_of(root: Path) -> Sequence[str]:
    """Paths of the repository's text files, relative to it; of a copy without git, of all that lie there."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=root, check=True, capture_output=True
        )
        paths = listed.stdout.decode().splitlines()
    except (OSError, subprocess.CalledProcessError):
        paths = [str(path.relative_to(root)) for path in root.rglob("*") if not _hidden(path.relative_to(root))]
    return [path for path in sorted(paths) if _is_text(root / path)]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part in ("build", "dist") for part in path.parts)


def _is_text(path: Path) -> bool:
    return (path.suffix in SUFFIXES or path.name == "Makefile") and path.is_file() and not path.is_symlink()


def findings_of(path: str, text: str) -> Iterator[Finding]:
    """All findings in one file's text. Pure."""
    yield from _long_lines(path, text)
    if path not in NAMES_RETIRED_WORDS:
        yield from _retired_words(path, text)
        yield from _phrases(path, text)
    if path in TYPED_BORDER:
        yield from _untyped(path, text)
    may_be_large = text.count("\n") > CLASS_LINES_MAX and "class " in text
    if path.endswith(".py") and not path.startswith("tests/") and (may_be_large or "_FRACTION" in text):
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            yield Finding(path, error.lineno or 1, "syntax", error.msg)
            return
        yield from _large_classes(path, tree)
        yield from _divisors(path, tree)


def _long_lines(path: str, text: str) -> Iterator[Finding]:
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS_MAX and not (path.endswith(".md") and line.startswith("|")):  # a table's row is one line
            yield Finding(path, number, "long line", f"{len(line)} columns, at most {COLUMNS_MAX}")


def _retired_words(path: str, text: str) -> Iterator[Finding]:
    stem = Path(path).stem
    for retired in _words_in(path, stem):
        yield Finding(path, 1, retired[1], f"is in the file's name; write: {_USE[retired[1]]}")
    for start, word in _words_in(path, text):
        yield Finding(path, _line_of(text, start), word, f"write: {_USE[word]}")


def _words_in(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Where retired words begin in a text, and which they are."""
    if not any(word.lower() in _USE for word in set(WORD.findall(text))):
        return  # the fast way for most files
    calls = {match.start(1) for match in re.finditer(r"\.(tell)\(\)", text)}  # of a file
    for match in WORD.finditer(text):
        word = match[0].lower()
        if word in _USE and not _is_usual(path, word) and match.start() not in calls:
            yield match.start(), word


def _is_usual(path: str, word: str) -> bool:
    paths = USUAL.get(_FIRST[word])
    return paths is not None and re.search(paths, path) is not None


def _phrases(path: str, text: str) -> Iterator[Finding]:
    for pattern, letters, use in PHRASES:
        if letters in text:
            for match in re.finditer(pattern, text, re.M):
                yield Finding(path, _line_of(text, match.start()), match[0].strip(". "), f"write: {use}")


def _untyped(path: str, text: str) -> Iterator[Finding]:
    for match in re.finditer(r"\bAny\b", text):
        yield Finding(path, _line_of(text, match.start()), "Any", "type the native border")


def _line_of(text: str, start: int) -> int:
    return text.count("\n", 0, start) + 1


def _large_classes(path: str, tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > CLASS_LINES_MAX:
                yield Finding(path, node.lineno, "large class", f"{node.name} has {lines}, at most {CLASS_LINES_MAX}")


def _divisors(path: str, tree: ast.Module) -> Iterator[Finding]:
    """Constants named *_FRACTION that are one or more: a divisor under a fraction's name."""
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if (
            any(name.endswith("_FRACTION") for name in names)
            and (value := _number(node.value)) is not None
            and value >= 1
        ):
            yield Finding(path, node.lineno, "divisor", f"{names[0]} is {value:g}; a fraction is below one")


def _number(node: ast.expr | None) -> float | None:
    """The value of a literal, or of a quotient of two; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        left, right = _number(node.left), _number(node.right)
        return None if left is None or not right else left / right
    return None


def main() -> int:
    """Prints the findings; returns 1 if there are any."""
    findings = tidy()
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
