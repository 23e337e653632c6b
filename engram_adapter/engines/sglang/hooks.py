"""Hooks in SGLang's registry, and the check that SGLang really applied them.

Input: what replaces what. Output: hooks, which SGLang applies once all plug-ins are loaded. Errors:
`EngineMismatchError`; after the hooks were applied, the end of the process, because SGLang only logs a hook that fails.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..gate import EngineMismatchError
from .stopping import stop


@dataclass(frozen=True)
class Hook:
    """One replacement. `replacement`: a class that takes the class's place, or a function around the method."""

    target: str
    replacement: Callable[..., Any]


def register_hooks(hooks: Sequence[Hook]) -> None:
    """Registers hooks, and a check that runs right after SGLang has applied them.

    Raises:
        EngineMismatchError: A target does not exist.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    before = {hook.target: _found(hook.target) for hook in hooks}
    for hook in hooks:
        kind = HookType.REPLACE if isinstance(hook.replacement, type) else HookType.AROUND
        HookRegistry.register(hook.target, hook.replacement, kind)
    apply_hooks = vars(HookRegistry)["apply_hooks"]

    def apply_and_check() -> None:
        HookRegistry.apply_hooks = apply_hooks
        HookRegistry.apply_hooks()
        try:
            check_in_use(hooks, before)
        except EngineMismatchError as error:
            stop(error)

    # SGLang calls this once all plug-ins have registered; the check hangs on that call, and takes itself off again.
    HookRegistry.apply_hooks = staticmethod(apply_and_check)


def check_in_use(hooks: Sequence[Hook], before: dict[str, Any]) -> None:
    """Raises `EngineMismatchError` unless each target is replaced; before: what each target was."""
    for hook in hooks:
        found = _found(hook.target)
        is_class = isinstance(hook.replacement, type)
        if not (found is hook.replacement if is_class else found is not before[hook.target]):
            raise EngineMismatchError(
                f"{hook.target} is {_name(found)} after SGLang applied its plug-ins' hooks, expected "
                f"{_name(hook.replacement)}: another plug-in replaces it too, or SGLang could not apply the hook (its "
                f"log says why); name the plug-ins to load in SGLANG_PLUGINS"
            )


def _found(target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise EngineMismatchError(
            f"{target}, which tierstore replaces, is not there ({error}); install a version of SGLang that this "
            f"tierstore was tested with, or a newer tierstore"
        ) from error


def _name(found: Any) -> str:
    return f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', found)}"
