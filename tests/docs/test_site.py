"""`make docs` builds the whole site: no broken link, no warning, nothing loaded from another host."""

from __future__ import annotations

import subprocess

import pytest
from support.repository import REPOSITORY

TIMEOUT_S = 1200


@pytest.mark.slow
@pytest.mark.process
def test_the_site_builds_and_has_every_page() -> None:
    done = subprocess.run(["make", "docs"], cwd=REPOSITORY, timeout=TIMEOUT_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    html = REPOSITORY / "build" / "docs" / "html"
    pages = [path for path in (REPOSITORY / "docs").rglob("*.md") if "builder" not in path.parts]
    for path in pages:
        assert (html / path.relative_to(REPOSITORY / "docs").with_suffix(".html")).is_file()
    assert "CorruptPageError" in (html / "reference" / "errors.html").read_text()
