"""Whatever a site would load from another host is found; what a reader may click is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from builder.offline import loads_from_abroad


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://cdn.example.org/a.js"></script>'),
        ("a.html", '<img src="//example.org/a.png">'),
        ("a.html", '<img srcset="a.png 1x, https://example.org/b.png 2x">'),
        ("a.html", '<link rel="stylesheet" href="https://fonts.example.org/css">'),
        ("a.html", '<link rel="preconnect" href="https://fonts.example.org">'),
        ("a.html", '<meta http-equiv="refresh" content="0; url=https://example.org">'),
        ("a.html", "<p style=\"background: url('https://example.org/a.png')\">"),
        ("a.html", "<style>@import 'https://example.org/a.css';</style>"),
        ("a.html", '<script>fetch("https://example.org/a.json")</script>'),
        ("a.css", "a { background: url(//example.org/a.png) }"),
        ("a.js", 'const socket = new WebSocket("wss://example.org")'),
        ("a.js", 'image.src = "https://example.org/a.png"'),
    ],
)
def test_a_load_from_another_host_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert len(list(loads_from_abroad(tmp_path))) == 1


def test_links_and_own_files_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://example.org">web</a><link rel="canonical" href="https://example.org/a">'
        '<script src="_static/a.js"></script><img src="a.svg"><svg xmlns="http://www.w3.org/2000/svg"></svg>'
        '<code>curl https://example.org</code><script>const home = "https://example.org"</script>'
    )
    (tmp_path / "a.css").write_text("/* https://example.org */ a { background: url(a.png) }")
    assert list(loads_from_abroad(tmp_path)) == []
