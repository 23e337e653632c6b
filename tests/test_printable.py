"""No control character of a name reaches a terminal."""

from __future__ import annotations

import io

import pytest

from tierstore.printable import PrintableStream, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers.1 [bold] ä 表 😀", "layers.1 [bold] ä 表 😀"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nerror: all is lost", "a\\nerror: all is lost"),
        ("a\rb\x07\x08\x7f", "a\\rb\\x07\\x08\\x7f"),
        ("csi \x9b31m", "csi \\x9b31m"),
        ("gpj.\u202etxt", "gpj.\\u202etxt"),
        ("a\u2028b\u200b", "a\\u2028b\\u200b"),
        ("tag \U000e0041", "tag \\U000e0041"),
        ("\x00", "\\x00"),
    ],
)
def test_what_a_terminal_obeys_is_escaped_and_all_else_stays(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_line_ends_and_tabs_of_our_own_stay_in_whole_lines() -> None:
    assert printable("one\n\ttwo\x1b[0m\r\n", lines=True) == "one\n\ttwo\\x1b[0m\\r\n"


def test_every_control_character_of_ascii_and_latin_1_is_escaped() -> None:
    for code in (*range(0x20), *range(0x7F, 0xA0)):
        assert printable(chr(code)).isprintable(), hex(code)


def test_a_stream_escapes_what_is_written_and_is_otherwise_the_one_below() -> None:
    below = io.StringIO()
    stream = PrintableStream(below)
    assert stream.write("a\x1b[2J\n") == 6
    print("b\x07", file=stream)  # type: ignore[call-overload]
    stream.writelines(["c\x00", "d\n"])
    assert below.getvalue() == "a\\x1b[2J\nb\\x07\nc\\x00d\n"
    assert stream.isatty() is below.isatty()
    with pytest.raises(TypeError):
        stream.write(b"bytes")  # type: ignore[arg-type]
