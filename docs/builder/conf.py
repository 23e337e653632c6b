"""Sphinx's settings. Sphinx runs in an environment of its own and reads the staged pages; see `build.py`."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive, directives

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from builder import diagrams

project = "tierstore"
author = "the tierstore authors"
copyright = ""
html_title = "tierstore"
extensions = ["myst_parser"]
root_doc = "index"
exclude_patterns = ["files"]
source_suffix = {".md": "markdown"}
nitpicky = True
smartquotes = False  # `--option` is no dash

myst_enable_extensions = ["deflist", "colon_fence", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4  # the same anchors as on a code host
myst_fence_as_directive = ["diagram"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"font-stack": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"},
    "dark_css_variables": {"font-stack": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"},
    "footer_icons": [],
}
pygments_style = "friendly"
pygments_dark_style = "native"
highlight_language = "text"


class DiagramDirective(Directive):
    """A drawing of characters, as SVG in the page."""

    has_content = True
    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"accent": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        title = self.arguments[0]
        accents = [name.strip() for name in self.options.get("accent", "").split(",") if name.strip()]
        try:
            svg = diagrams.svg_of("\n".join(self.content), title, accents)
        except ValueError as error:
            raise self.error(str(error)) from error
        drawn = f'<div class="diagram-scroll">{svg}</div><figcaption>{escape(title)}</figcaption>'
        return [nodes.raw("", f'<figure class="diagram">{drawn}</figure>', format="html")]


def setup(app: Any) -> dict[str, bool]:
    """Adds the `{diagram}` block."""
    app.add_directive("diagram", DiagramDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
