"""Curves as SVG for a page: direct labels, marks, bands and areas, in the page's own colours and fonts.

Input: a `Chart` in numbers, and a size in the pixels that it will have. Output: an `svg` element; text stays text,
colours are the page's variables, so that it is legible on dark and light. Errors: none; a chart has a curve or an area.

Across, every doubling takes the same room. Labels stand at the ends of their curves, and give way to each other.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Points = Sequence[tuple[float, float]]

FONT_PX, LABEL_GAP_PX = 13, 17
CHARACTER_PX = 7.3  # the widest usual font's average, so that labels are never cut
LEFT_PX, TOP_PX, BOTTOM_PX = 46, 34, 44
LABEL_APART_PX = 10  # between a curve's end and its label
MARK_APART_PX = 8  # between an upright and its words
TICK_PX = 62  # a label below the axis, and room beside it
BAND_OPACITY, AREA_OPACITY = 0.17, 0.85


@dataclass(frozen=True)
class Curve:
    """A curve and its name. band: its (x, low, high). dashes: as SVG has them. bold: the one to look at."""

    label: str
    colour: str
    points: Points
    band: Sequence[tuple[float, float, float]] = ()
    dashes: str = ""
    bold: bool = False


@dataclass(frozen=True)
class Area:
    """One layer of a stack: how much it adds at each x of the chart's areas."""

    label: str
    colour: str
    points: Points


@dataclass(frozen=True)
class Mark:
    """A point to look at, with an upright down to the axis. bold: the one."""

    x: float
    y: float
    label: str
    colour: str = "ink"
    bold: bool = False


@dataclass(frozen=True)
class Level:
    """A value that a curve cannot pass."""

    y: float
    label: str
    colour: str


@dataclass(frozen=True)
class Chart:
    """What is drawn. x_ticks: (x, label); those that find no room are left out, the last ones stay."""

    x_title: str
    y_title: str
    y_max: float
    x_ticks: Sequence[tuple[float, str]]
    y_unit: str = ""
    curves: Sequence[Curve] = ()
    areas: Sequence[Area] = ()
    marks: Sequence[Mark] = ()
    levels: Sequence[Level] = field(default=())


def svg_of(chart: Chart, width: int, height: int, name: str, title: str, description: str, css_class: str) -> str:
    """Returns the `svg` element. name: makes its ids, which are unique if it is."""
    labels = f'{name}-title" aria-describedby="{name}-description'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="{css_class}" role="img" '
        f'aria-labelledby="{labels}"><title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-description">{html.escape(description)}</desc>'
        + "".join(_Drawing(chart, width, height).parts())
        + "</svg>"
    )


def spread(wanted: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """Returns places near the wanted ones, in the same order, at least `gap` apart and between the two ends if there
    is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = [wanted[index] for index in order]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + gap)
    if places and places[-1] > highest:
        places[-1] = highest
        for index in range(len(places) - 2, -1, -1):
            places[index] = min(places[index], places[index + 1] - gap)
    places = [max(place, lowest + gap * index) for index, place in enumerate(places)]
    return [places[order.index(index)] for index in range(len(wanted))]


def nice_step(most: float, about: int) -> float:
    """Returns a step of 1, 2, 2.5 or 5 times a power of ten that divides 0 to `most` into about so many parts."""
    power = 10.0 ** math.floor(math.log10(most / about))
    return power * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(math.log(most / about / power / factor)))


class _Drawing:
    """A chart at a size: where its numbers lie in pixels."""

    def __init__(self, chart: Chart, width: int, height: int) -> None:
        self._chart, self._width = chart, width
        drawn: list[Curve | Area] = [*chart.curves, *chart.areas]
        names = [each.label for each in drawn] + [level.label for level in chart.levels]
        self._right = width - LABEL_APART_PX - round(CHARACTER_PX * max(map(len, names)))
        self._bottom = height - BOTTOM_PX
        points = [point for each in drawn for point in each.points]
        xs = [x for x, _ in points] + [mark.x for mark in chart.marks]
        self._x_min, self._x_max = min(xs), max(xs)

    def x(self, value: float) -> float:
        doublings = math.log2(self._x_max / self._x_min) or 1.0
        return LEFT_PX + (self._right - LEFT_PX) * math.log2(value / self._x_min) / doublings

    def y(self, value: float) -> float:
        return self._bottom - (self._bottom - TOP_PX) * value / self._chart.y_max

    def parts(self) -> list[str]:
        """Returns all elements, what is below others first."""
        chart = self._chart
        return [
            *self._areas(),
            *self._axes(),
            *(self._band(curve) for curve in chart.curves if curve.band),
            *self._levels(),
            *(self._upright(mark) for mark in chart.marks),
            *(self._curve(curve) for curve in chart.curves),
            *self._labels(),
            *(self._ring(mark) for mark in chart.marks),
            *self._mark_labels(),
        ]

    def _axes(self) -> list[str]:
        chart, right = self._chart, self._right
        step = nice_step(chart.y_max, 5)
        parts = [_text(4, 14, chart.y_title, css="axis-title"), _text(right, self._bottom + 38, chart.x_title, "end")]
        for number in range(int(chart.y_max / step + 1e-6) + 1):
            y = self.y(number * step)
            parts.append(_line(LEFT_PX, y, right, y, "grid", "base" if not number else ""))
            parts.append(_text(LEFT_PX - 7, y + 4, f"{number * step:g}{chart.y_unit}", "end"))
        room_from = math.inf
        for value, label in reversed(chart.x_ticks):
            x = self.x(value)
            if x + TICK_PX / 2 <= room_from:
                anchor = "middle" if x - LEFT_PX > TICK_PX / 2 else "start"
                parts.append(_line(x, self._bottom, x, self._bottom + 5, "ink"))
                parts.append(_text(x if anchor == "middle" else LEFT_PX - 8, self._bottom + 20, label, anchor))
                room_from = x - TICK_PX / 2
        return parts

    def _areas(self) -> list[str]:
        parts, below = [], [0.0] * len(self._chart.areas[0].points) if self._chart.areas else []
        for area in self._chart.areas:
            above = [low + added for low, (_, added) in zip(below, area.points, strict=True)]
            xs = [x for x, _ in area.points]
            outline = [*zip(xs, above, strict=True), *reversed(list(zip(xs, below, strict=True)))]
            style = f"fill:var(--{area.colour});fill-opacity:{AREA_OPACITY}"
            parts.append(f'<path d="{self._path(outline)} Z" style="{style}"/>')
            below = above
        return parts

    def _band(self, curve: Curve) -> str:
        outline = [(x, high) for x, _, high in curve.band] + [(x, low) for x, low, _ in reversed(curve.band)]
        style = f"fill:var(--{curve.colour});fill-opacity:{BAND_OPACITY}"
        return f'<path d="{self._path(outline)} Z" style="{style}"/>'

    def _curve(self, curve: Curve) -> str:
        width = 3 if curve.bold else 1.8
        style = f"fill:none;stroke:var(--{curve.colour});stroke-width:{width}px;stroke-linejoin:round"
        style += f";stroke-dasharray:{curve.dashes}" if curve.dashes else ""
        dots = "".join(
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{3.4 if curve.bold else 2.2}" '
            f'style="fill:var(--{curve.colour})"/>'
            for x, y in curve.points
        )
        return f'<path d="{self._path(curve.points)}" style="{style}"/>{dots}'

    def _levels(self) -> list[str]:
        return [
            _line(LEFT_PX, self.y(level.y), self._right, self.y(level.y), level.colour, "level")
            for level in self._chart.levels
        ]

    def _labels(self) -> list[str]:
        """Names at the ends of curves, beside the middles of areas and at levels, moved apart."""
        ends = [(*curve.points[-1], curve.label, curve.colour, curve.bold) for curve in self._chart.curves]
        below = 0.0
        for area in self._chart.areas:
            x, added = area.points[-1]
            ends.append((x, below + added / 2, area.label, area.colour, False))
            below += added
        ends += [(self._x_max, level.y, level.label, level.colour, False) for level in self._chart.levels]
        places = spread([self.y(y) for _, y, *_ in ends], LABEL_GAP_PX, TOP_PX, self._bottom)
        parts = []
        for place, (x, y, label, colour, bold) in zip(places, ends, strict=True):
            from_x, from_y, to_x = self.x(x) + 6, self.y(y), self._right + LABEL_APART_PX
            if to_x - from_x > LABEL_APART_PX or abs(place - from_y) > FONT_PX / 2:
                parts.append(_line(from_x, from_y, to_x - 3, place, colour, "leader"))
            parts.append(_text(to_x, place + 4, label, css="bold" if bold else "", colour=colour))
        return parts

    def _upright(self, mark: Mark) -> str:
        x = self.x(mark.x)
        return _line(x, self.y(mark.y), x, self._bottom, mark.colour if mark.bold else "soft", "upright")

    def _ring(self, mark: Mark) -> str:
        style = f"fill:var(--card);stroke:var(--{mark.colour});stroke-width:{3 if mark.bold else 2}px"
        return (
            f'<circle cx="{self.x(mark.x):.1f}" cy="{self.y(mark.y):.1f}" r="{7 if mark.bold else 5}" style="{style}"/>'
        )

    def _mark_labels(self) -> list[str]:
        """Words at the foot of each upright, below the curves, the bold one lowest; of the last one above its ring."""
        parts, rows = [], 0
        for mark in sorted(self._chart.marks, key=lambda mark: (not mark.bold, -mark.x)):
            x, css = self.x(mark.x), "halo bold" if mark.bold else "halo"
            if mark.x == self._x_max:
                y = max(TOP_PX - 6, self.y(mark.y) - 13)
                parts.append(_text(x, y, mark.label, "end", css, mark.colour))
                continue
            room = MARK_APART_PX + CHARACTER_PX * len(mark.label)
            y = self._bottom - MARK_APART_PX - LABEL_GAP_PX * rows
            if x - room > LEFT_PX:
                place, anchor = x - MARK_APART_PX, "end"
            elif x + room < self._width:
                place, anchor = x + MARK_APART_PX, "start"
            else:  # on a phone: across its upright, so that no letter is cut off
                place, anchor = LEFT_PX + MARK_APART_PX, "start"
            parts.append(_text(place, y, mark.label, anchor, css, mark.colour))
            rows += 1
        return parts

    def _path(self, points: Points) -> str:
        return "M " + " L ".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, css: str = "") -> str:
    of_class = f' class="{css}"' if css else ""
    return f'<path d="M {x1:.1f} {y1:.1f} L {x2:.1f} {y2:.1f}"{of_class} style="stroke:var(--{colour})"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", css: str = "", colour: str = "soft") -> str:
    of_class = f' class="{css}"' if css else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of_class} style="fill:var(--{colour})">'
        f"{html.escape(text)}</text>"
    )
