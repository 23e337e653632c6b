"""Where the repository and its tests lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
SUPPORT = TESTS / "support"  # programs that tests start as processes lie here, too
