"""A drawing of characters becomes the boxes, lines, arrows and words that one sees in it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from builder.diagrams import Box, Drawing, svg_of

SVG = "{http://www.w3.org/2000/svg}"
DRAWING = """
  +------------+        +-----------------+
  | client     |------->| daemon          |
  | --socket S |  keys  |  +-----------+  |     a-b
  +------------+        |  | static    |  |
       ^                |  | set       |<---+  rows
       |                |  +-----------+  | |
       |                +-----------------+ |
       |                         |          |
       +-------------------------+----------+
"""


def elements(svg: str, tag: str, style: str = "") -> list[ElementTree.Element]:
    return [each for each in ElementTree.fromstring(svg).iter(SVG + tag) if style in each.get("class", "")]


def test_boxes_are_found_also_within_others() -> None:
    assert Drawing(DRAWING).boxes() == [Box(0, 24, 6, 42), Box(0, 2, 3, 15), Box(2, 27, 5, 39)]


def test_words_are_kept_and_lines_are_not_words() -> None:
    svg = svg_of(DRAWING, "Title & more", ["client"])
    texts = {text.text: text.get("class") for text in elements(svg, "text")}
    assert texts == {
        "client": "title", "--socket S": "text", "daemon": "text", "static": "title", "set": "text",
        "keys": "text", "a-b": "text", "rows": "text",
    }  # fmt: skip
    assert elements(svg, "title")[0].text == "Title & more"
    assert len(elements(svg, "rect", "accent-1")) == 1


def test_arrows_point_where_they_are_drawn() -> None:
    heads = elements(svg_of(DRAWING, "t"), "polygon")
    points = [[tuple(map(float, point.split(","))) for point in head.get("points", "").split()] for head in heads]
    directions = [
        "right" if tip[0] > one[0] and tip[0] > two[0]
        else "left" if tip[0] < one[0] and tip[0] < two[0]
        else "up" if tip[1] < one[1] else "down"
        for tip, one, two in points
    ]  # fmt: skip
    assert sorted(directions) == ["left", "right", "up"]


def test_boxes_above_each_other_stay_apart() -> None:
    svg = svg_of("+---+\n| a |\n+---+\n+---+\n| b |\n+---+", "t")
    assert len(elements(svg, "rect")) == 2
    assert not elements(svg, "path", "line")


def test_one_column_with_two_boxes_that_share_an_edge() -> None:
    assert Drawing("+---+---+\n| a | b |\n+---+---+").boxes() == [Box(0, 0, 2, 4), Box(0, 4, 2, 8)]


def test_no_colour_stands_in_a_drawing() -> None:
    assert not re.search(r"#[0-9a-fA-F]{3,6}|fill=|stroke=", svg_of(DRAWING, "t"))


@pytest.mark.parametrize(
    ("text", "accents", "why"), [("\t+--+", [], "tab"), ("  \n", [], "empty"), (DRAWING, ["HBM"], "no box .* 'HBM'")]
)
def test_what_cannot_be_drawn_is_refused(text: str, accents: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        svg_of(text, "t", accents)
