"""How the documents read: mean length of sentences, and lines that are too long.

Input: Markdown. Output: as a program, a table with a row for each file, and exit status 1 if one is beyond a limit.
Errors: none.

A sentence ends with a full stop, a question mark, an exclamation mark, or the end of a paragraph, a list item or a
heading. A colon or a semicolon does not end one. Code blocks, tables, headings and comments are left out; code within
a sentence counts as one word.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as a program, this file finds `support` by itself
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.repository import REPOSITORY

MEAN_WORDS_MAX = 18.0
COLUMNS_MAX = 100
ROOT_FILES = ("README.md", "ARCHITECTURE.md", "BENCHMARKS.md", "FORMAT.md", "CHANGELOG.md")
FENCED = re.compile(
    r"^ *(```+|~~~+)[^\n]*\n.*?^ *\1 *$|^ *(:::+)\{[^\n]*\n|^ *:::+ *$|<!--.*?-->|\A---\n.*?\n---\n", re.M | re.S
)
ITEM = re.compile(r" *(?:[-*+]|\d+[.)]|: )\s+")
# Full stops that end no sentence.
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf|approx|No|Fig|Dr|al)\.(?=\s)|(?<=\d)\.(?=\d)")
END = re.compile(r"(?<=[.!?])[\"')\]*_]*\s+(?=[\"'(\[*_]*[A-Z0-9`~])")
WORD = re.compile(r"[^\W_][\w'/.,%+-]*|CODE")


@dataclass(frozen=True)
class Reading:
    """What was measured of one file."""

    path: str
    sentences: int
    words: int
    longest: str
    long_lines: tuple[int, ...]

    @property
    def mean_words(self) -> float:
        return self.words / self.sentences if self.sentences else 0.0

    @property
    def is_good(self) -> bool:
        return self.mean_words <= MEAN_WORDS_MAX and not self.long_lines


def documents() -> list[Path]:
    """The files that are measured."""
    docs = sorted(path for path in (REPOSITORY / "docs").rglob("*.md") if "builder" not in path.parts)
    return [*(REPOSITORY / name for name in ROOT_FILES), *docs]


def reading_of(path: str, text: str) -> Reading:
    """Measures one document. Pure."""
    sentences = list(sentences_of(text))
    counts = [len(WORD.findall(sentence)) for sentence in sentences]
    longest = sentences[counts.index(max(counts))] if counts else ""
    return Reading(path, len(counts), sum(counts), longest, tuple(_long_lines(text)))


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of a document's prose, code within them as one word."""
    for paragraph in _paragraphs(FENCED.sub("\n", text)):
        flat = re.sub(r"(`+).+?\1", "CODE", paragraph)
        flat = re.sub(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", flat)
        flat = ABBREVIATION.sub(lambda match: match[0].replace(".", ""), re.sub(r"https?://\S+", "CODE", flat))
        yield from (sentence for sentence in END.split(flat) if WORD.search(sentence))


def _paragraphs(text: str) -> Iterator[str]:
    """Runs of lines that are one text: a paragraph, or an item of a list."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        bare = line.strip()
        left_out = not bare or bare.startswith(("#", "|", "%", ":::", "[^")) or re.match(r"\[[^\]]+\]: ", bare)
        if left_out or ITEM.match(line):
            if lines:
                yield " ".join(lines)
            lines = []
        if not left_out:
            lines.append(ITEM.sub("", line, count=1).strip().lstrip("> "))


def _long_lines(text: str) -> Iterator[int]:
    """Numbers of lines beyond the limit, but for rows of tables and lines without a place to break."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS_MAX and not line.startswith("|") and " " in line.strip().lstrip("-*> ")[:COLUMNS_MAX]:
            yield number


def main() -> int:
    """Prints the table; returns 1 if a file is beyond a limit."""
    readings = [
        reading_of(path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")) for path in documents()
    ]
    width = max(len(each.path) for each in readings)
    print(f"{'file':{width}}  sentences  mean words  longest  long lines")
    for each in readings:
        longest = len(WORD.findall(each.longest))
        mark = "" if each.is_good else "  <-"
        numbers = f"{each.sentences:9}  {each.mean_words:10.1f}  {longest:7}  {len(each.long_lines):10}"
        print(f"{each.path:{width}}  {numbers}{mark}")
    if "--longest" in sys.argv[1:]:
        for each in sorted(readings, key=lambda each: -len(WORD.findall(each.longest))):
            print(f"\n{each.path}: {each.longest}")
    words, sentences = sum(each.words for each in readings), sum(each.sentences for each in readings)
    print(f"all: {words / max(1, sentences):.1f} words a sentence; at most {MEAN_WORDS_MAX:g} in each file")
    return 0 if all(each.is_good for each in readings) else 1


if __name__ == "__main__":
    sys.exit(main())
