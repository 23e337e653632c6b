"""How a failed call of lookups by gRPC ends: a status, a text, and trailers that name the error's class.

Input: the exception that a call raised. Output: the end of the call. lookup.proto says what the trailers mean.
"""

from __future__ import annotations

import logging
from typing import Any

from ..errors import CorruptPageError, TierStoreError
from .answers import StoreChangedError
from .limits import Refusal
from .messages import ERROR_TRAILER, RETRY_TRAILER

logger = logging.getLogger("tierstore")

ERROR_CHARS_MAX = 2000  # of an error's text; gRPC sends it as a header of 8 KiB at most


def abort(grpc: Any, context: Any, error: Exception) -> None:
    """Ends a call with an error's class and words, unless its client has gone. Raises: grpc ends calls so."""
    if not context.is_active():
        return
    code, name = _status(grpc, error)
    if name is None:
        logger.exception("a lookup by gRPC failed")
        name = "DaemonError"
    trailers = [(ERROR_TRAILER, name)]
    if (isinstance(error, Refusal) and error.retry) or isinstance(error, StoreChangedError):
        trailers.append((RETRY_TRAILER, "1"))
    context.set_trailing_metadata(trailers)
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    context.abort(code, text[:ERROR_CHARS_MAX])


def _status(grpc: Any, error: Exception) -> tuple[Any, str | None]:
    """Returns an error's status, and the name of the class that a client raises; None for an error of ours."""
    code = grpc.StatusCode
    named = {  # the first that fits
        Refusal: (code.RESOURCE_EXHAUSTED, "DaemonError"),
        PermissionError: (code.UNAUTHENTICATED, "DaemonError"),
        StoreChangedError: (code.ABORTED, "DaemonError"),
        CorruptPageError: (code.DATA_LOSS, None),
        TimeoutError: (code.DEADLINE_EXCEEDED, "TimeoutError"),
        TierStoreError: (code.FAILED_PRECONDITION, None),
        ValueError: (code.INVALID_ARGUMENT, "ValueError"),
        TypeError: (code.INVALID_ARGUMENT, "TypeError"),
        KeyError: (code.INVALID_ARGUMENT, "KeyError"),
    }
    for kind, (status, name) in named.items():
        if isinstance(error, kind):
            return status, name or type(error).__name__
    return code.INTERNAL, None
