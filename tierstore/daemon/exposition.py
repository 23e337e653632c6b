"""Which text format metrics are served in: what a scraper's header Accept wants most of what prometheus_client offers.

Input: a header Accept. Output: an encoder and the Content-Type. Errors: none; a scraper that asks for no known format
gets the text format 0.0.4, which every scraper reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client.exposition import choose_encoder

# Formats of an Accept header, with their versions: those that the text format 0.0.4 answers, and those beyond it.
_PLAIN = {("text/plain", None), ("text/plain", "0.0.4"), ("text/*", None), ("*/*", None)}
_NEWER = {
    ("text/plain", "1.0.0"),
    ("application/openmetrics-text", None),
    ("application/openmetrics-text", "1.0.0"),
}


def encoder_of(accept: str) -> tuple[Callable[[Any], bytes], str]:
    """Returns what encodes metrics, and the Content-Type, for a header Accept."""
    ranges = [(_weight_of(text), text) for text in accept.split(",")]
    for _, text in sorted((each for each in ranges if each[0]), key=lambda each: each[0], reverse=True):
        kind, *parameters = (part.strip().lower() for part in text.split(";"))
        version = next((each.partition("=")[2] for each in parameters if each.startswith("version=")), None)
        if (kind, version) in _PLAIN:
            break
        if (kind, version) in _NEWER:  # prometheus_client considers neither weights nor other acceptable formats
            encode, content_type = choose_encoder(text)
            return encode, content_type
    encode, content_type = choose_encoder("")
    return encode, content_type


def _weight_of(media_range: str) -> float:
    """Returns the weight ("q") of one format of an Accept header, 0 to 1; 0: not acceptable."""
    for parameter in media_range.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                weight = float(value)
            except ValueError:
                return 0.0
            return weight if 0.0 <= weight <= 1.0 else 0.0
    return 1.0
