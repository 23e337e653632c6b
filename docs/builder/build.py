"""`make docs`: the site, from the pages of docs/, the documents of the root, and the code.

Input: the repository, and an environment with Sphinx. Output: build/docs/html, which works without a network. Errors:
exit status 1, with page and line, for a broken link, a warning of Sphinx, and anything that a page would load from
another host.

This program runs where tierstore is installed, since it generates references from the code; Sphinx runs in an
environment of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

BUILDER = Path(__file__).resolve().parent
ROOT = BUILDER.parents[1]
SPHINX_TIMEOUT_S = 600

sys.path.insert(0, str(BUILDER.parent))

from builder.generators import GENERATORS  # noqa: E402
from builder.offline import loads_from_abroad  # noqa: E402
from builder.stage import BrokenLinkError, stage  # noqa: E402


def build(folder: Path, sphinx: Path) -> int:
    """Builds the site into `folder`/html. Blocks, some seconds.

    Args:
        folder: where the site and what it is made of lie.
        sphinx: the program sphinx-build.

    Returns:
        The exit status: 1 if anything is wrong, which it prints.
    """
    started = time.monotonic()
    try:
        count = stage(ROOT, folder / "source", GENERATORS)
    except BrokenLinkError as error:
        print(error, file=sys.stderr)
        return 1
    command = [sphinx, "-W", "--keep-going", "-q", "-j", "auto", "-c", BUILDER, "-d", folder / "doctrees"]
    done = subprocess.run([*command, "-b", "html", folder / "source", folder / "html"], timeout=SPHINX_TIMEOUT_S)
    if done.returncode:
        return 1
    abroad = list(loads_from_abroad(folder / "html"))
    for load in abroad:
        print(f"loaded from another host: {load}", file=sys.stderr)
    print(f"{count} pages in {time.monotonic() - started:.0f} s: {folder / 'html' / 'index.html'}")
    return 1 if abroad else 0


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).absolute()))
