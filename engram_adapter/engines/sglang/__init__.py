"""The plug-in of SGLang: its general plug-ins call `register` early in every process. It does nothing without a store.

Input: TIERSTORE_STORE and the other variables of `EngineSettings`. Output: classes of SGLang replaced by ours.
Errors: one line, and the process ends: SGLang itself only logs what a plug-in raises, and would load the whole table.

Importing this imports neither SGLang nor torch, so that nothing can fail before `register` is there to say so.
"""

from __future__ import annotations

from .stopping import stop


def register() -> None:
    """Replaces SGLang's n-gram embeddings by ones that look rows up in a store; the entry point of the plug-in.

    Raises:
        SystemExit: The settings, the store or SGLang's version do not fit; its text names what, both sides and the
            remedy. SGLang catches `Exception`, which this is not.
    """
    try:
        from ..settings import EngineSettings

        settings = EngineSettings.find(None)
        if settings is None:
            return
        from .plugin import install

        install(settings)
    except Exception as error:
        stop(error)
