"""The documents are easy to read: short sentences, lines that fit; and the measure measures what it says."""

from __future__ import annotations

import pytest
from support.prose import MEAN_WORDS_MAX, documents, reading_of, sentences_of
from support.repository import REPOSITORY


def test_sentences_are_short_and_lines_fit() -> None:
    for path in documents():
        reading = reading_of(path.relative_to(REPOSITORY).as_posix(), path.read_text())
        assert not reading.long_lines, f"{reading.path}: lines {reading.long_lines} have more than 100 columns"
        assert "page is being written" not in path.read_text(), reading.path
        assert reading.mean_words <= MEAN_WORDS_MAX, (
            f"{reading.path}: {reading.mean_words:.1f} words; {reading.longest}"
        )


def test_a_sentence_ends_where_a_reader_stops() -> None:
    text = (
        "# A heading stays out\n\nOne two three. Four five `code with words` six!\nSeven, eight: nine; ten\n\n"
        "- An item\n  that goes on. 1.5 GiB are one word and a unit.\n- e.g. this one\n\n"
        "| a | table |\n|---|---|\n\n```python\nno = words. Here.\n```\n\n"
        "[A link of five words](to/a/page.md) ends. <!-- not. this. -->\n"
    )
    assert list(sentences_of(text)) == [
        "One two three.",
        "Four five CODE six!",
        "Seven, eight: nine; ten",
        "An item that goes on.",
        "15 GiB are one word and a unit.",
        "eg this one",
        "A link of five words ends.",
    ]


def test_the_mean_and_the_long_lines_of_a_document() -> None:
    reading = reading_of("a.md", "One two three. Four.\n\n" + "word " * 21 + "\n| " + "x " * 60 + "|\n")
    assert (reading.sentences, reading.words, reading.long_lines) == (3, 25, (3,))
    assert reading.mean_words == pytest.approx(25 / 3)
    assert not reading.is_good
