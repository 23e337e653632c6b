"""A report on a profile: one HTML page that needs nothing else, for readers who have never seen this project.

Input: records of `tierstore.decisions.hit_rates.GroupCurves.to_dict`, one for each table group. Output: a file, or
tables for the terminal. The page has no scripts and loads nothing. Errors: `ConfigError` without matplotlib, which
draws the figures.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from tierstore.durable import replace_file
from tierstore.errors import ConfigError
from tierstore.version import VERSION

from . import tables
from .about import About
from .figures import figures_of, require_matplotlib, svg_of
from .tables import NumberTable, Record, cached_points, percent, short_bytes, whole_bytes
from .words import GLOSSARY, STYLE, words_of_figures

TABLES = {
    "policies": tables.policy_table,
    "orders": tables.order_table,
    "split": tables.split_table,
    "reads": tables.reads_table,
    "steps": tables.steps_table,
}

LEAD = (
    '<p class="lead">For every token that a language model reads or writes, it looks up entries in large tables. '
    "Entries that are in memory (DRAM) are there at once; the others have to be read from disk (NVMe). "
    "This page says how much memory answers how many of these look-ups, and what to choose.</p>"
)


def write_report(records: Sequence[Record], path: Path, about: About | None = None) -> None:
    """Writes the page to `path`, whole or not at all. Blocks, a second or two a record.

    about: what `report_about.about` returns; None leaves it out. Raises `ConfigError` without matplotlib,
    and without any record.
    """
    if not records:
        raise ConfigError(f"{path}: a report of 0 curves says nothing; profile text of which documents are held out")
    page = _page(records, about)
    replace_file(path, page.encode(), path.with_name(f"{path.name}.{os.getpid()}.tmp"))


def profile_tables(record: Record) -> list[Table]:
    """Returns the record's numbers for the terminal: recommended budgets, policies, orders, who answers,
    reads, steps."""
    numbers = [tables.recommended_table(record), *(TABLES[name](record) for name in TABLES)]
    return [_terminal_table(each) for each in numbers if each.lines]


def _terminal_table(numbers: NumberTable) -> Table:
    """Sentences stand below the table, so that 80 columns are enough for its numbers."""
    table = Table(title=numbers.title, caption_justify="left")
    columns = [index for index, column in enumerate(numbers.columns) if column != "why"]
    for index in columns:
        table.add_column(numbers.columns[index], justify="right" if index else "left", overflow="fold")
    for line in numbers.lines:
        table.add_row(*(line[index] for index in columns))
    if "why" in numbers.columns:
        why = numbers.columns.index("why")
        table.caption = "\n".join(f"{line[0]}: {line[why]}" for line in numbers.lines)
    return table


def check_report(path: Path) -> None:
    """Raises `ConfigError` if a report could not be written: before the work that it reports."""
    require_matplotlib()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{path}: a report is a file in a folder that there is; give another name")


def _page(records: Sequence[Record], about: About | None) -> str:
    parts = [_part(record) for record in records]
    if len(parts) > 1:
        parts = [_numbered(part, number) for number, part in enumerate(parts, 1)]
    glossary = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(meaning)}</dd>" for word, meaning in GLOSSARY)
    return (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<link rel="icon" href="data:,"/>'
        f"<title>What memory buys: hit rates and budgets</title><style>{STYLE}</style></head><body><main>"
        f"<h1>What memory buys</h1>{LEAD}{_about(about) if about else ''}"
        + "\n".join(parts)
        + f'<section id="glossary"><h2>Words</h2><dl>{glossary}</dl></section>'
        f"<footer>Made by tierstore {html.escape(VERSION)}</footer></main></body></html>\n"
    )


def _about(about: About) -> str:
    """Of what, from what, when, and what to do next."""
    lines = [("store", about["store"]), ("made from", ", ".join(about["inputs"])), ("profile", about["profile"])]
    lines.append(("made", f"{about['made']}, by tierstore {about['tierstore']}"))
    listed = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in lines)
    command = f"<dt>next</dt><dd><code>{html.escape(about['next'])}</code></dd>" if about["next"] else ""
    notes = "".join(f'<p class="note">{html.escape(note[0].upper() + note[1:])}.</p>' for note in about["notes"])
    return f'<dl id="about">{listed}{command}</dl>{notes}'


def _part(record: Record) -> str:
    """All about one group of tables."""
    words = words_of_figures(record) if cached_points(record) else {}
    sections = [
        f'<section id="{figure.name}"><h2>{html.escape(figure.title)}</h2><p>{words[figure.name]}</p>'
        f"<figure>{svg_of(figure, record)}</figure>{_table(TABLES[figure.name](record))}</section>"
        for figure in figures_of(record)
    ]
    return _summary(record) + "\n".join(sections)


def _numbered(part: str, number: int) -> str:
    """Makes the ids of a part unique among several."""
    return re.sub(r'(\bid="|url\(#|href="#|aria-labelledby="|aria-describedby=")', rf"\g<1>part{number}-", part)


def _summary(record: Record) -> str:
    """What was measured, in plain words, and the budgets to choose from."""
    replay, orders = record["replay"], record["orders"]
    tables_named = f"<h2>{html.escape(', '.join(record['tables']))}</h2>" if "tables" in record else ""
    kinds = f"{len(orders)} entries, one of each order" if len(orders) > 1 else "one entry"
    first = percent(record["first_touch"]["all"])
    sampled = ""
    if replay["sample_rate"] < 1:
        sampled = (
            f" Only {percent(replay['sample_rate'])} of all entries were followed, against as small a share of memory."
        )
    whole = ""
    if (num_bytes := whole_bytes(record)) is not None:
        whole = f" From {short_bytes(num_bytes)} on, memory holds the tables whole and answers every access."
    cards = "".join(_card(record, index) for index in range(len(record["recommended"])))
    source = "".join(
        f"<dt>{html.escape(str(name))}</dt>"
        f"<dd>{html.escape(f'{value:,}' if isinstance(value, int) else str(value))}</dd>"
        for name, value in record.get("source", {}).items()
    )
    return (
        f"{tables_named}<p>Every token looks up {kinds}. Which entries are used was counted in one part of real text. "
        f"Another part, {replay['tokens']:,} tokens of "
        f"{replay['documents']:,} documents held out of the counting, was then replayed access by access "
        f"({replay['accesses']:,} in all) through the very caches that the store runs, empty at first, "
        f"for every amount of memory below.{sampled} {first} of these accesses were to entries never seen before, "
        f"which no cache can answer.{whole}</p>"
        f'<section id="recommended"><h2>Recommended budgets</h2><div class="cards">{cards}</div>'
        f"{_table(tables.recommended_table(record), folded=False)}"
        f"<p>The intervals say where the hit rate of another {record['interval']['tokens']:,} tokens of the same kind "
        f"of text will lie in 95 of 100 cases. Text of another kind may lie outside.</p></section>"
        + (f'<section id="source"><h2>What was measured</h2><dl>{source}</dl></section>' if source else "")
    )


def _card(record: Record, index: int) -> str:
    choice = record["recommended"][index]
    (point,) = (point for point in record["points"] if point["dram_bytes"] == choice["dram_bytes"])
    if point.get("resident"):
        return (
            f'<div class="card"><h3>{html.escape(choice["name"])}</h3><p '
            f'class="number">{short_bytes(choice["dram_bytes"])}</p>'
            "<p>holds the tables whole: answers <strong>every</strong> access from memory "
            "and never reads the disk</p></div>"
        )
    mixed = point["mixed"]
    return (
        f'<div class="card"><h3>{html.escape(choice["name"])}</h3><p '
        f'class="number">{short_bytes(choice["dram_bytes"])}</p>'
        f"<p>answers <strong>{percent(mixed['hit_rate']['all'])}</strong> of accesses from memory and reads the disk "
        f"{mixed['reads_per_token']:.1f} times a token, "
        f"{mixed['packed_reads_per_token']:.1f} with packed entries</p></div>"
    )


def _table(table: NumberTable, *, folded: bool = True) -> str:
    head = "".join(f'<th scope="col"{_wraps(column)}>{html.escape(column)}</th>' for column in table.columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(line[0])}</th>'
        + "".join(f"<td{_wraps(cell)}>{html.escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in table.lines
    )
    written = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<details open=''><summary>The numbers</summary>{written}</details>" if folded else written


def _wraps(cell: str) -> str:
    return ' class="text"' if cell == "why" or len(cell) > 40 else ""
