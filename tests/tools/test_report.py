"""The report: one page that needs nothing else, well-formed, whole, and that a browser opens without a complaint."""

from __future__ import annotations

import io
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.browsers import dumped, find_browser
from support.text_store import TextStore, good

from tierstore import ConfigError
from tierstore.decisions.choose import ItemClasses, item_hash
from tierstore.decisions.curves import build_curves
from tierstore.decisions.hit_rates import EntryCost
from tierstore.decisions.item_statistics import TableGroup
from tierstore.decisions.ranking import Ranking
from tierstore.decisions.recommend import Recommendation, default_choice
from tierstore.decisions.replay import Replay
from tierstore.tools.report.about import about
from tierstore.tools.report.chart import nice_step, spread
from tierstore.tools.report.page import check_report, profile_tables, write_report
from tierstore.tools.report.words import answer

XHTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
FIGURES = ["policies", "orders", "split", "reads", "steps"]
GIB = 1 << 30


def record_of(
    sample_rate: float = 1.0, source: dict[str, str] | None = None, whole_bytes: int | None = None
) -> dict[str, Any]:
    """Curves of a small skewed replay, whose budgets are scaled up to gibibytes."""
    rng = np.random.default_rng(0)
    num_tokens, num_items = 3000, 900
    drawn = (rng.pareto(0.7, (2, num_tokens, 3)) * 5).astype(np.int64) % (num_items // 3) * 3 + [0, 1, 2]
    replay = Replay(
        (2, 3, 4),
        np.tile(np.arange(3, dtype=np.uint8), num_tokens),
        drawn[0].reshape(-1),
        np.bincount(drawn[1].reshape(-1), minlength=num_items),
        (np.arange(num_items) % 3).astype(np.uint8),
        np.repeat(np.arange(num_tokens), 3),
        np.arange(100, num_tokens + 1, 100),
        sample_rate,
    )
    cost = EntryCost(GIB // 10, GIB, 8, 1)
    budgets = [GIB << place for place in range(7)]
    curves = build_curves(
        Ranking(group_of(replay)), cost, budgets, 2000, np.random.default_rng(1), whole_bytes=whole_bytes
    )
    return curves.described(["t"], {}, None, source or {}).to_dict()


def group_of(replay: Replay) -> TableGroup:
    """The replay's own items as all that was counted."""
    uses = np.bincount(replay.items, minlength=len(replay.counts))
    columns = np.stack([replay.counts, uses, np.ones_like(uses)])
    of_order = [columns[:, replay.item_order == order] for order in range(3)]
    classes = ItemClasses.of_parts((order, *part) for order, part in enumerate(of_order))
    hashes = item_hash(np.arange(2 * len(uses), dtype=np.uint64).reshape(-1, 2))
    places = classes.class_of(replay.item_order, replay.counts)
    distinct = (len(uses) // 3,) * 3
    return TableGroup(("t",), replay.orders, classes, replay.sample_rate, distinct, replay, places, hashes)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return record_of(source={"model": "<made up> & small", "counted": "3,000 tokens"})


@pytest.fixture(scope="module")
def page_file(record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report([record], path)
    return path


@pytest.fixture(scope="module")
def page(page_file: Path) -> ElementTree.Element:
    return ElementTree.fromstring(page_file.read_text(encoding="utf-8"))


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_the_page_holds_every_figure_with_title_description_and_numbers(page: ElementTree.Element) -> None:
    sections = {section.get("id"): section for section in page.iter(f"{XHTML}section")}
    assert [name for name in sections if name in FIGURES] == FIGURES
    for name in FIGURES:
        assert [svg.get("class") for svg in sections[name].iter(f"{SVG}svg")] == ["wide", "narrow"]
        for svg in sections[name].iter(f"{SVG}svg"):
            title, description = svg.find(f"{SVG}title"), svg.find(f"{SVG}desc")
            assert title is not None
            assert description is not None
            assert svg.get("role") == "img"
            assert title.get("id") == svg.get("aria-labelledby")
            assert description.get("id") == svg.get("aria-describedby")
            assert text_of(title)
            assert len(list(svg.iter(f"{SVG}text"))) > 5, "text of figures stays text"
        assert len(list(sections[name].iter(f"{XHTML}tr"))) > 3


def test_recommended_budgets_come_first_with_real_numbers(page: ElementTree.Element, record: dict[str, Any]) -> None:
    first = next(page.iter(f"{XHTML}section"))
    assert first.get("id") == "recommended"
    for choice in record["recommended"]:
        mixed = next(point["mixed"] for point in record["points"] if point["dram_bytes"] == choice["dram_bytes"])
        assert choice["name"] in text_of(first)
        assert f"{choice['dram_bytes'] // GIB} GiB" in text_of(first)
        assert f"{100 * mixed['hit_rate']['all']:.1f} %" in text_of(first)
        assert f"{mixed['packed_reads_per_token']:.1f}" in text_of(first)


def test_the_answer_comes_first_and_is_the_budget_that_plan_takes(
    page: ElementTree.Element, record: dict[str, Any]
) -> None:
    (said,) = (text_of(each) for each in page.iter(f"{XHTML}p") if each.get("class") == "answer")
    choice = default_choice([[Recommendation(**each) for each in record["recommended"]]])
    here, after = (
        point["mixed"]["hit_rate"]["all"]
        for point in record["points"]
        if point["dram_bytes"] in (choice.dram_bytes, 2 * choice.dram_bytes)
    )
    assert said == (
        f"Buy {choice.dram_bytes // GIB} GiB: it answers {100 * here:.1f} % of all look-ups from memory, and "
        f"{2 * choice.dram_bytes // GIB} GiB would add {100 * (after - here):.1f} points."
    )
    (heading,) = page.iter(f"{XHTML}h1")
    assert text_of(heading) == "How much memory should I buy?"


def test_the_answer_fits_whatever_was_tried(record: dict[str, Any]) -> None:
    whole = record_of(whole_bytes=100 * GIB)
    only_whole = whole | {"points": whole["points"][-1:], "recommended": whole["recommended"][-1:]}
    assert answer([only_whole])[1].startswith("it holds the tables whole")
    last = {"name": "knee", "dram_bytes": 64 * GIB, "why": ""}
    assert answer([record | {"recommended": [last]}])[1].endswith("; nothing larger was tried")
    assert "holds the tables whole" in answer([whole | {"recommended": [last]}])[1]
    smaller = record | {"recommended": [last | {"dram_bytes": GIB}]}
    assert answer([smaller, record | {"recommended": [last]}, smaller])[0] == "64\N{NO-BREAK SPACE}GiB"


def test_the_knee_is_marked_on_the_curve_with_its_size_and_rate(
    page: ElementTree.Element, record: dict[str, Any]
) -> None:
    choice = default_choice([[Recommendation(**each) for each in record["recommended"]]])
    rate = next(p["mixed"]["hit_rate"]["all"] for p in record["points"] if p["dram_bytes"] == choice.dram_bytes)
    (section,) = (each for each in page.iter(f"{XHTML}section") if each.get("id") == "policies")
    bold = [text_of(each) for each in section.iter(f"{SVG}text") if each.get("class") == "halo bold"]
    assert bold == [f"knee: {choice.dram_bytes // GIB} GiB, {100 * rate:.1f} %"] * 2


def test_every_curve_is_named_at_its_end_and_no_names_touch(page: ElementTree.Element) -> None:
    (section,) = (each for each in page.iter(f"{XHTML}section") if each.get("id") == "policies")
    for svg in section.iter(f"{SVG}svg"):
        names = {"mixed", "static alone", "recency alone", "LRU"}
        places = [float(each.get("y", "nan")) for each in svg.iter(f"{SVG}text") if text_of(each) in names]
        assert len(places) == 4
        assert min(b - a for a, b in itertools.pairwise(sorted(places))) >= 15
        right = float(svg.get("viewBox", "").split()[2])
        ends = [
            float(each.get("x", "nan")) + 6 * len(text_of(each))
            for each in svg.iter(f"{SVG}text")
            if each.get("text-anchor") == "start"
        ]
        assert max(ends) < right, "no word is cut off"


def test_labels_give_way_to_each_other_and_keep_their_order() -> None:
    assert spread([10, 100, 200], 15, 0, 300) == [10, 100, 200]
    assert spread([100, 100, 101], 15, 0, 300) == [100, 115, 130]
    assert spread([295, 290, 299], 15, 0, 300) == [285, 270, 300]
    assert spread([], 15, 0, 300) == []


@pytest.mark.parametrize(("most", "step"), [(100, 20), (28.2, 5), (5, 1), (1, 0.2), (1.05, 0.2), (0.3, 0.05)])
def test_axes_have_round_numbers(most: float, step: float) -> None:
    assert nice_step(most, 5) == pytest.approx(step)


def test_ids_are_unique_and_what_is_referred_to_is_there(page: ElementTree.Element, page_file: Path) -> None:
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', page_file.read_text())) <= set(ids)


def test_the_page_loads_and_runs_nothing(page: ElementTree.Element, page_file: Path) -> None:
    text = page_file.read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {XHTML[1:-1], SVG[1:-1], "http://www.w3.org/1999/xlink"}, "names of formats only"
    assert not list(page.iter(f"{XHTML}script"))
    for element in page.iter():
        assert not (element.get("src") or "").strip()
        assert (element.get("href") or "#").startswith(("#", "data:"))
    assert "@import" not in text


def test_colours_are_the_pages_own_so_that_dark_and_light_are_legible(page_file: Path) -> None:
    text = page_file.read_text()
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert set(re.findall(r"var\(--(\w+)\)", figures)) >= {"ink", "grid", "a", "b", "c", "d"}
    assert not re.findall(r"#[0-9a-f]{6}\b", figures), "a colour that no theme changes"


def test_names_from_outside_are_text_and_no_markup(page: ElementTree.Element) -> None:
    assert "<made up> & small" in text_of(page)


def test_a_share_of_the_items_is_said_and_steps_are_left_out(tmp_path: Path) -> None:
    write_report([record_of(sample_rate=0.5)], tmp_path / "r.html")
    page = ElementTree.fromstring((tmp_path / "r.html").read_text())
    assert "50.0 % of all entries were followed" in text_of(page)
    assert "steps" not in {section.get("id") for section in page.iter(f"{XHTML}section")}


def test_tables_that_are_asked_differently_share_a_page_and_no_ids(record: dict[str, Any], tmp_path: Path) -> None:
    write_report([record | {"tables": [name]} for name in ("layers.1", "plain")], tmp_path / "r.html")
    page = ElementTree.fromstring((tmp_path / "r.html").read_text())
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(svg.get("aria-labelledby") in ids for svg in page.iter(f"{SVG}svg"))
    assert [text_of(heading) for heading in page.iter(f"{XHTML}h2")][:2] == ["layers.1", "Budgets to choose from"]
    assert "plain" in text_of(page)


def test_the_budget_that_holds_the_tables_whole_is_on_the_page(tmp_path: Path) -> None:
    write_report([record_of(whole_bytes=100 * GIB + GIB // 4)], tmp_path / "r.html")
    text = text_of(ElementTree.fromstring((tmp_path / "r.html").read_text()))
    assert "From 100.25 GiB on, memory holds the tables whole and answers every access" in text
    assert text.count("tables whole: 100.25 GiB") == 2 * 4, "every curve marks it, on wide pages and on phones"
    assert "100.25 GiB (whole)" in text
    assert "holds the tables whole: answers every access from memory" in text
    for words in ("which no cache can answer", "No cache passes them"):
        assert words in text
    assert "unlimited" not in text


def test_a_page_of_tables_that_only_fit_whole_has_no_curves(tmp_path: Path) -> None:
    whole = record_of(whole_bytes=100 * GIB)
    only = whole | {"points": whole["points"][-1:], "recommended": whole["recommended"][-1:], "steps": []}
    write_report([only], tmp_path / "r.html")
    page = ElementTree.fromstring((tmp_path / "r.html").read_text())
    assert not list(page.iter(f"{SVG}svg"))
    assert "100 GiB" in text_of(page)
    assert len(profile_tables(only)) == 5


def test_a_record_of_an_older_version_is_shown_as_far_as_it_goes(record: dict[str, Any], tmp_path: Path) -> None:
    points = [{name: part for name, part in point.items() if name != "resident"} for point in record["points"]]
    write_report([record | {"points": points}], tmp_path / "r.html")
    text = text_of(ElementTree.fromstring((tmp_path / "r.html").read_text()))
    assert "holds the tables whole" not in text
    assert "64 GiB" in text


def test_the_report_names_its_store_and_traces_and_the_next_command(record: dict[str, Any], tmp_path: Path) -> None:
    counts = {"documents": 10, "held_out_documents": 1}
    footer = {"analysis": {"groups": [record]}, "counts": counts}
    told = about(
        Path("a <b>.tier"),
        [Path("x.trace"), Path("y\x07.trace"), Path("\udcff")],
        Path("p.profile"),
        footer,
        ["of the caller's"],
    )
    write_report([record], tmp_path / "r.html", told)
    page = ElementTree.fromstring((tmp_path / "r.html").read_text())
    shown = text_of(page)
    for words in (
        "a <b>.tier",
        "x.trace, y\\x07.trace, \N{REPLACEMENT CHARACTER}",
        told["made"],
        "tierstore plan 'a <b>.tier' p.profile",
    ):
        assert words in shown
    assert "Of the caller's." in text_of(page)
    assert "Intervals are 0 to 100 %, because one document was held out" in text_of(page)


def test_in_80_columns_no_number_is_broken() -> None:
    console = Console(width=80, file=io.StringIO())
    wide = record_of(whole_bytes=1234 * GIB)
    for table in profile_tables(wide):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    words = set(" ".join(lines).replace("(", " ").replace(")", " ").split())
    for point in wide["points"]:
        assert f"{100 * point['lru']['all']:.1f}" in words
        assert f"{point['mixed']['recency_entries']:,}" in words or point["resident"]


def test_a_report_of_nothing_or_to_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 curves"):
        write_report([], tmp_path / "r.html")
    for path in (tmp_path, tmp_path / "no such folder" / "r.html"):
        with pytest.raises(ConfigError, match="a folder that there is"):
            check_report(path)
    check_report(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_leaves_the_old_one(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old one")
    with pytest.raises(KeyError):
        write_report([{**record, "cost": {}}], path)
    with pytest.raises(OSError, match="no such folder"):
        write_report([record], tmp_path / "no such folder" / "report.html")
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_the_terminal_shows_every_budget_and_every_policy(record: dict[str, Any]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    for table in profile_tables(record):
        console.print(table)
    shown = console.export_text()
    for words in ("Recommended budgets", "static alone", "LRU", "order 4", "64 GiB", "steps without a read"):
        assert words in shown
    for point in record["points"]:
        assert f"{100 * point['lru']['all']:.1f} %" in shown


@pytest.fixture
def browser(tmp_path: Path) -> str:
    return find_browser(tmp_path)


def assert_opens(browser: str, page_file: Path, profile: Path) -> None:
    page, complaints = dumped(browser, page_file.as_uri(), profile)
    assert not complaints
    assert page.count("<svg") == 2 * len(FIGURES)
    assert page.rstrip().endswith("</html>")


def test_a_browser_opens_the_page_without_a_complaint(browser: str, page_file: Path, tmp_path: Path) -> None:
    assert_opens(browser, page_file, tmp_path)


def test_a_browser_opens_what_the_command_writes_of_real_text(browser: str, text: TextStore, tmp_path: Path) -> None:
    page_file = tmp_path / "text.html"
    shown = good("profile", text.store, text.trace, "-o", tmp_path / "p.profile", "--report", page_file).stdout
    assert f"report: {page_file}" in shown
    assert_opens(browser, page_file, tmp_path)
    page = ElementTree.fromstring(page_file.read_text(encoding="utf-8"))
    first = next(page.iter(f"{XHTML}section"))
    record = json.loads(good("profile", text.store, text.trace, "-o", tmp_path / "p.profile", "--json").stdout)
    (group,) = record["analysis"]["groups"]
    for choice in group["recommended"]:
        assert choice["why"] in text_of(first)
    assert f"tokens{sum(map(len, text.documents)):,}" in text_of(page), "what was measured is said"
