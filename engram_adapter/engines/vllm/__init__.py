"""tierstore in vLLM: the entry point of `vllm.general_plugins`, which does nothing unless it is configured.

Input: `--additional-config '{"tierstore": {"store": ...}}'`, else TIERSTORE_STORE. Output: models of Qwen4-Exp,
DeepSeek-V4.1 and LongCat whose n-gram tables are never loaded, and whose rows come from the store. Errors:
`EngineMismatchError` and `ConfigError` when a worker starts, which end it.

`worker`: what happens when a worker starts · `checks`: what its configuration says · `qwen4_exp`, `deepseek_v41`,
`longcat`: the layers · `qwen4_staging`, `deepseek_staging`, `longcat_staging`: how they get into the engine, `staging`:
what these share · `capturing`: quiet while graphs are captured · `counters`, `stat_logger`: counters of the workers in
the engine's metrics. Importing this imports nothing of vLLM and no torch.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any

from .configured import is_configured

_WORKER = f"{__name__}.worker"


def register() -> None:
    """Has every worker that starts in this process prepared, if it is configured; a second call does nothing."""
    try:
        from vllm.v1.worker.worker_base import WorkerBase
    except ImportError as error:  # another vLLM; without settings, it must start all the same
        _no_workers(error)
        return
    stock = WorkerBase.__init__
    if getattr(stock, "of_tierstore", False):
        return

    @functools.wraps(stock)
    def start(self: Any, *arguments: Any, **named: Any) -> None:
        vllm_config = named["vllm_config"] if "vllm_config" in named else arguments[0]
        if is_configured(vllm_config) or _WORKER in sys.modules:  # imported: something may have to be put back
            from .worker import prepare

            prepare(vllm_config)
        stock(self, *arguments, **named)

    start.of_tierstore = True  # type: ignore[attr-defined]
    WorkerBase.__init__ = start


def _no_workers(error: ImportError) -> None:
    """Refuses to start if the environment configures tierstore; what additional_config says is not known here."""
    message = f"this vLLM has no worker that tierstore can prepare ({error}): its rows do not come from a store"
    if os.environ.get("TIERSTORE_STORE"):
        from ..gate import EngineMismatchError

        raise EngineMismatchError(f"{message}; install a version that it was tested with, or unset TIERSTORE_STORE")
    logging.getLogger("vllm.tierstore").warning(message)
