"""A browser without a window: opens a page and says what became of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPENED_S_MAX = 120


def find_browser(profile: Path) -> str:
    """Returns a browser whose complaints would be seen; skips the test if none is installed."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    broken = profile / "broken.html"
    broken.write_text("<script>nothing.at.all()</script>")
    assert dumped(found, broken.as_uri(), profile)[1]
    return found


def dumped(browser: str, address: str, profile: Path, *, dark: bool = False, seconds: int = 0) -> tuple[str, list[str]]:
    """Opens a page, and returns it as it then is, and the lines of what the browser complained of.

    seconds: of the page's own clock, that it gets after loading. It ends sooner if nothing is waited for.
    """
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--virtual-time-budget={1000 * seconds}"] if seconds else []
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    opened = subprocess.run([*command, address], capture_output=True, text=True, timeout=OPENED_S_MAX, check=True)
    return opened.stdout, [line for line in opened.stderr.splitlines() if "CONSOLE" in line]
