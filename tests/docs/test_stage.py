"""Pages reach the site with their links, their files and their generated parts; broken links do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from builder.stage import BrokenLinkError, generated, links_of, pages_of, relinked, stage
from support.repository import REPOSITORY


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A repository with three pages, a document of its root, and a script."""
    for path in ("docs/guides", "docs/builder", "examples"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "docs/index.md").write_text("# Book\n\n[guide](guides/use.md#start)\n\n[formats]: ../FORMAT.md\n")
    (tmp_path / "docs/guides/use.md").write_text(
        "[up](../index.md) [bytes](../../FORMAT.md#page) [run](../../examples/a.py)\n"
    )
    (tmp_path / "docs/builder/notes.md").write_text("of the builder, in no site\n")
    (tmp_path / "FORMAT.md").write_text(
        "# Format\n\n[use](docs/guides/use.md), [web](https://example.org), [below](#page)\n"
    )
    (tmp_path / "examples/a.py").write_text("print()\n")
    return tmp_path


def test_links_lead_to_where_pages_lie_in_the_site(book: Path) -> None:
    assert stage(book, book / "site", {}) == 3
    read = {path: (book / "site" / path).read_text() for path in ("index.md", "guides/use.md", "reference/format.md")}
    assert read["index.md"] == "# Book\n\n[guide](guides/use.md#start)\n\n[formats]: reference/format.md\n"
    assert (
        read["guides/use.md"]
        == "[up](../index.md) [bytes](../reference/format.md#page) [run](../files/examples/a.py)\n"
    )
    assert "[use](../guides/use.md), [web](https://example.org), [below](#page)" in read["reference/format.md"]
    assert (book / "site/files/examples/a.py").read_text() == "print()\n"
    assert not (book / "site/builder").exists()


@pytest.mark.parametrize(
    ("link", "why"), [("no.md", "not there"), ("../examples", "a folder"), ("../../outside.md", "not there")]
)
def test_a_broken_link_names_page_and_line(book: Path, link: str, why: str) -> None:
    (book / "docs/index.md").write_text(f"# Book\n\nText, and a [link]({link}).\n")
    with pytest.raises(BrokenLinkError, match=rf"docs/index\.md:3: .*{why}"):
        stage(book, book / "site", {})


def test_links_and_generated_parts_in_code_are_examples() -> None:
    text = (
        "`[a](b.md)`\n\n````\n```x\n[c](d.md)\n<!-- generated: x -->\n```\n````\n\n[e](f.md) and `$ ` and [g](h.md)\n"
    )
    assert [link for _, _, link in links_of(text)] == ["f.md", "h.md"]
    assert generated(text + "<!-- generated: x -->\n", {"x": lambda: "made"}) == text + "made\n"
    with pytest.raises(KeyError):
        generated("<!-- generated: y -->\n", {})


def test_every_link_of_the_documents_leads_somewhere() -> None:
    pages = pages_of(REPOSITORY)
    assert len(pages) > 30
    for path in pages:
        relinked((REPOSITORY / path).read_text(), path, REPOSITORY, pages, None)
