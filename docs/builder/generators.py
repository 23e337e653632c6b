"""The parts of pages that are generated from the code, by the name that a page calls them by.

A page says `<!-- generated: NAME -->` on a line of its own. Input: none but the code. Output: Markdown. Errors: those
of the generators.
"""

from __future__ import annotations

from collections.abc import Callable

from . import benchmark_chart, command_line, error_catalog, metric_families, public_api

GENERATORS: dict[str, Callable[[], str]] = {
    "api-store": public_api.of_tierstore,
    "api-model": public_api.of_engram_adapter,
    "benchmarks": benchmark_chart.reference,
    "command-line": command_line.reference,
    "errors": error_catalog.reference,
    "metrics": metric_families.reference,
}
