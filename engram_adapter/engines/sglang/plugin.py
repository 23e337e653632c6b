"""The gate before SGLang, and which of its parts are replaced.

Input: settings, and the installed SGLang. Output: hooks. Errors: `EngineMismatchError`.

The parts of every family are replaced, whatever the store was built from: if the model is of another family, its
layers refuse the store by name. Otherwise SGLang would load the whole table, and nobody would know.
"""

from __future__ import annotations

import importlib
from typing import Any

import tierstore
from tierstore.formats.catalog import read_catalog

from ...hash_spec import HashSpec
from ..gate import EngineMismatchError, check_signatures, check_version
from ..settings import EngineSettings
from .hooks import register_hooks

TESTED = ("0.5.23", "0.5.24")
FAMILIES = {"deepseek_v41": ".deepseek_v41", "qwen4_exp": ".qwen4_exp"}  # and the module that serves each
EVERY_MODEL = ".batches"


def install(settings: EngineSettings) -> None:
    """Registers the hooks of all families, behind the gate.

    Args:
        settings: What the user set.

    Raises:
        EngineMismatchError: SGLang's version or a signature is not one that was tested, or the store serves no model
            that SGLang looks up by n-grams.
        ConfigError: What reading the store's catalog raises.
    """
    engine = f"sglang {check_version('sglang', TESTED, forced=not settings.strict)}"
    family = _family_of(settings)
    if family not in FAMILIES:
        raise EngineMismatchError(
            f"{settings.store} is of family {family!r}; tierstore serves {', '.join(FAMILIES)} in SGLang: unset "
            f"TIERSTORE_STORE, or give it a store of one of these"
        )
    modules = [_served(name, engine) for name in (*FAMILIES.values(), EVERY_MODEL)]
    for module in modules:
        for owner, methods in module.SIGNATURES.items():
            check_signatures(owner, methods, engine)
    register_hooks([hook for module in modules for hook in module.HOOKS])


def _family_of(settings: EngineSettings) -> str:
    """Returns the family of models that a store, or a daemon's, was built for."""
    if not settings.is_daemon:
        return HashSpec.from_catalog(read_catalog(settings.store)).family
    with tierstore.connect(settings.store) as store:
        return HashSpec.from_store(store).family


def _served(name: str, engine: str) -> Any:
    """Imports a module that replaces classes or methods, and with it SGLang's."""
    try:
        return importlib.import_module(name, __package__)
    except (ImportError, AttributeError) as error:
        raise EngineMismatchError(
            f"{engine}: what tierstore replaces is not where it was ({error}); install a version of the engine that "
            f"this tierstore was tested with, or a newer tierstore"
        ) from error
