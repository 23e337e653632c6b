"""A report on a profile: one HTML page that needs nothing else, for readers who have never seen this project.

Input: records of `tierstore.decisions.hit_rates.GroupCurves.to_dict`, one for each table group. Output: a file, or
tables for the terminal. The page has no scripts and loads nothing. Errors: `ConfigError` without any record, or
for a place where no page can be written.
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
from .figures import figures_of, svgs_of
from .style import STYLE
from .tables import NumberTable, Record, cached_points, percent, short_bytes, whole_bytes
from .words import GLOSSARY, answer, knee_bytes, name_of, words_of_figures

TABLES = {
    "policies": tables.policy_table,
    "orders": tables.order_table,
    "split": tables.split_table,
    "reads": tables.reads_table,
    "steps": tables.steps_table,
}

LEAD = (
    '<p class="lead">For every token that a language model reads or writes, it looks up entries in large tables. '
    "Entries that are in memory (DRAM) are there at once; the others have to be read from disk (NVMe).</p>"
)


def write_report(records: Sequence[Record], path: Path, about: About | None = None) -> None:
    """Writes the page to `path`, whole or not at all. Blocks for the disk.

    about: what `report_about.about` returns; None leaves it out. Raises `ConfigError` without any record.
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
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{path}: a report is a file in a folder that there is; give another name")


def _page(records: Sequence[Record], about: About | None) -> str:
    parts = [_part(record, is_alone=len(records) == 1) for record in records]
    if len(parts) > 1:
        parts = [_numbered(part, number) for number, part in enumerate(parts, 1)]
    glossary = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(meaning)}</dd>" for word, meaning in GLOSSARY)
    size, brings = answer(records)
    return (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<link rel="icon" href="data:,"/>'
        f"<title>How much memory should I buy? {size}</title><style>{STYLE}</style></head><body><main>"
        f'<p class="brand">tierstore profile</p><h1>How much memory should I buy?</h1>'
        f'<p class="answer"><strong>Buy {size}:</strong> {brings}.</p>{_next(about) if about else ""}{LEAD}'
        + "\n".join(parts)
        + f'<section id="glossary"><h2>Words</h2><dl>{glossary}</dl></section>{_about(about) if about else ""}'
        f"<footer>Made by tierstore {html.escape(VERSION)}</footer></main></body></html>\n"
    )


def _next(about: About) -> str:
    """What to do with the answer, and what to know of it."""
    command = f"<pre>{html.escape(about['next'])}</pre>" if about["next"] else ""
    notes = "".join(f'<p class="note">{html.escape(note[0].upper() + note[1:])}.</p>' for note in about["notes"])
    return f"{command}{notes}"


def _about(about: About) -> str:
    """Of what, from what, and when."""
    lines = [("store", about["store"]), ("made from", ", ".join(about["inputs"])), ("profile", about["profile"])]
    lines.append(("made", f"{about['made']}, by tierstore {about['tierstore']}"))
    listed = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in lines)
    return f'<section id="about"><h2>Where this comes from</h2><dl>{listed}</dl></section>'


def _part(record: Record, *, is_alone: bool) -> str:
    """All about one group of tables."""
    named = "" if is_alone or "tables" not in record else f"<h2>{html.escape(', '.join(record['tables']))}</h2>"
    words = words_of_figures(record) if cached_points(record) else {}
    sections = [
        f'<section id="{figure.name}"><h2>{html.escape(figure.title)}</h2><p>{words[figure.name]}</p>'
        f"<figure>{svgs_of(figure, record)}</figure>{_table(TABLES[figure.name](record))}</section>"
        for figure in figures_of(record)
    ]
    return "\n".join([named + _recommended(record), *sections, _measured(record)])


def _numbered(part: str, number: int) -> str:
    """Makes the ids of a part unique among several."""
    return re.sub(r'(\bid="|url\(#|href="#|aria-labelledby="|aria-describedby=")', rf"\g<1>part{number}-", part)


def _recommended(record: Record) -> str:
    """The budgets to choose from."""
    cards = "".join(_card(record, index) for index in range(len(record["recommended"])))
    return (
        f'<section id="recommended"><h2>Budgets to choose from</h2><div class="cards">{cards}</div>'
        f"{_table(tables.recommended_table(record))}</section>"
    )


def _measured(record: Record) -> str:
    """What was measured, in plain words."""
    replay, orders = record["replay"], record["orders"]
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
    source = "".join(
        f"<dt>{html.escape(str(name))}</dt>"
        f"<dd>{html.escape(f'{value:,}' if isinstance(value, int) else str(value))}</dd>"
        for name, value in record.get("source", {}).items()
    )
    return (
        f'<section id="measured"><h2>What was measured</h2><p>Every token looks up {kinds}. '
        f"Which entries are used was counted in one part of real text. "
        f"Another part, {replay['tokens']:,} tokens of "
        f"{replay['documents']:,} documents held out of the counting, was then replayed access by access "
        f"({replay['accesses']:,} in all) through the very caches that the store runs, empty at first, "
        f"for every amount of memory shown.{sampled} {first} of these accesses were to entries never seen before, "
        f"which no cache can answer.{whole}</p>"
        f"<p>The intervals say where the hit rate of another {record['interval']['tokens']:,} tokens of the same kind "
        f"of text will lie in 95 of 100 cases. Text of another kind may lie outside.</p>"
        + (f"<dl>{source}</dl></section>" if source else "</section>")
    )


def _card(record: Record, index: int) -> str:
    choice = record["recommended"][index]
    (point,) = (point for point in record["points"] if point["dram_bytes"] == choice["dram_bytes"])
    mixed = point["mixed"]
    if point.get("resident"):
        brings = "holds the tables whole: answers <strong>every</strong> access from memory and never reads the disk"
    else:
        brings = (
            f"answers <strong>{percent(mixed['hit_rate']['all'])}</strong> of accesses from memory and reads the disk "
            f"{mixed['reads_per_token']:.1f} times a token, {mixed['packed_reads_per_token']:.1f} with packed entries"
        )
    chosen = " chosen" if choice["dram_bytes"] == knee_bytes(record) else ""
    return (
        f'<div class="card{chosen}"><h3>{html.escape(name_of(choice, record))}</h3>'
        f'<p class="number">{short_bytes(choice["dram_bytes"])}</p><p>{brings}</p></div>'
    )


def _table(table: NumberTable) -> str:
    head = "".join(f'<th scope="col"{_wraps(column)}>{html.escape(column)}</th>' for column in table.columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(line[0])}</th>'
        + "".join(f"<td{_wraps(cell)}>{html.escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in table.lines
    )
    written = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<details><summary>The numbers</summary>{written}</details>"


def _wraps(cell: str) -> str:
    return ' class="text"' if cell == "why" or len(cell) > 40 else ""
