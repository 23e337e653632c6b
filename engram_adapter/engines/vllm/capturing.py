"""While vLLM captures CUDA graphs, the stores that its model's layers use are quiet.

Input: the class of the engine's model runner. Output: its `capture_model`, within `Store.quiet` of every store that the
model's layers use. Errors: `EngineMismatchError` for another signature; what `Store.quiet` raises.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from ..gate import check_signatures

_RUNNER = {"capture_model": ("profile_only",)}


def quiet_captures(engine: str) -> None:
    """Replaces the runner's method in this process; engine: package and version. Raises `EngineMismatchError`."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    stock = GPUModelRunner.capture_model
    if hasattr(stock, "of_tierstore"):
        return
    check_signatures(GPUModelRunner, _RUNNER, engine)

    @functools.wraps(stock)
    def capture_model(self: Any, *, profile_only: bool = False) -> int:
        staged = getattr(self.model_state, "of_tierstore", None)
        with contextlib.nullcontext() if staged is None else staged.quiet():
            return int(stock(self, profile_only=profile_only))

    capture_model.of_tierstore = True  # type: ignore[attr-defined]
    GPUModelRunner.capture_model = capture_model
