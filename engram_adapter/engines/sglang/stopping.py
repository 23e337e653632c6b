"""The end of a process whose plug-in does not fit: SGLang only logs what a plug-in raises, and would go on without it.

Input: an error. Output: none. Errors: `SystemExit`, which SGLang does not catch.
"""

from __future__ import annotations

import logging
from typing import NoReturn

logger = logging.getLogger("sglang.tierstore")  # below the engine's logger, whose handlers show it


def stop(error: Exception) -> NoReturn:
    """Ends the process with one line that names the error."""
    message = f"tierstore stops SGLang: {type(error).__name__}: {error}"
    logger.critical(message)
    raise SystemExit(message) from error
