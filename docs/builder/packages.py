"""Prints the packages of the extra `docs`, one a line: what builds the site, and nothing of tierstore's own needs.

Input: setup.cfg. Output: requirements for pip. Errors: `KeyError` if there is no such extra.
"""

from __future__ import annotations

import configparser
from pathlib import Path

if __name__ == "__main__":
    config = configparser.ConfigParser()
    config.read(Path(__file__).resolve().parents[2] / "setup.cfg")
    print(config["options.extras_require"]["docs"].strip())
