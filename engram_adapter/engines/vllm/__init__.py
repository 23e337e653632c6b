"""tierstore in vLLM: the entry point of `vllm.general_plugins`, which does nothing unless it is configured.

Input: `--additional-config '{"tierstore": {"store": ...}}'`, else TIERSTORE_STORE. Output: Qwen4-Exp and DeepSeek-V4.1
models whose n-gram tables are never loaded, and whose rows come from the store. Errors: `EngineMismatchError` and
`ConfigError` when a worker starts, which end it.

`worker`: what happens when a worker starts · `checks`: configurations that cannot work · `qwen4_exp`: the layers.
Importing this imports nothing of vLLM; each file imports the engine's modules within its functions.
"""

from __future__ import annotations


def register() -> None:
    """Prepares this process of vLLM: when a worker starts in it, `worker.prepare` looks at its configuration."""
    from .worker import watch_workers

    watch_workers()
