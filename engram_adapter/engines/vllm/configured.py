"""Whether a configuration of vLLM names tierstore at all: asked of every worker, so this imports nothing.

Input: a `VllmConfig`. Output: a truth. Errors: none.
"""

from __future__ import annotations

import os
from typing import Any

SETTINGS_KEY = "tierstore"  # in additional_config


def is_configured(vllm_config: Any) -> bool:
    """Returns whether the plug-in has settings, right or wrong."""
    additional = getattr(vllm_config, "additional_config", None)
    return bool(os.environ.get("TIERSTORE_STORE")) or (isinstance(additional, dict) and SETTINGS_KEY in additional)
