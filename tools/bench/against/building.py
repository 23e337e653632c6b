"""`tierstore bench build --against OTHER`: two builds of tierstore build the same store in turn, beside cp.

Input: the other build of tierstore. Output: of each cache state of the checkpoint's files the ratio of rates to the
other build, and to copying the files with cp and syncing them. Errors: as of `against` and of `bench build`; if the
stores differ in a byte of a shard, the figures are refused.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tierstore.units import format_bytes

from ...synth import write_checkpoint
from .. import build
from ..pairs import Comparison, Options, Result
from .builds import OTHER, THIS, Build, in_turn
from .ratios import compare

COPY = "cp and sync"
COPY_RATE_MIN = 1.0  # of a build whose files are not in the page cache
SIDE = Path(__file__).with_name("building_side.py")
FILES = 4  # of the checkpoint
MIB = 1 << 20


def run(folder: Path, options: Options, other: Path) -> Result:
    """Measures pairs in each cache state. Needs twice the size and a little, as `bench build`. Blocks, minutes."""
    size_bytes = options.size_bytes or build.SIZE_BYTES
    build.check_room(folder, size_bytes)
    result = Result(f"build of {format_bytes(size_bytes)}, this build beside {other}, {options.pairs} pairs")
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-build-") as name:
        work = Path(name).absolute()
        checkpoint = work / "checkpoint"
        write_checkpoint(checkpoint, "deepseek_v41", table_bytes=size_bytes, file_bytes=max(size_bytes // FILES, MIB))
        files = [file for file in checkpoint.iterdir() if file.suffix == ".safetensors"]
        builds = {THIS: Build.this(work), OTHER: Build.at(other, work)}
        for state in build.CACHE_STATES:
            _measure(state, builds, files, work, options.pairs, result)
    return result


def _measure(state: str, builds: dict[str, Build], files: list[Path], work: Path, pairs: int, result: Result) -> None:
    """Adds what the builds, and cp, take while the files are in the page cache, or out of it."""
    case = f"build, files {state}"
    store = work / "store"
    copies: list[float] = []

    def built(side: str) -> dict[str, Any]:
        if side == THIS:  # once a pair, beside it
            build.set_cache(files, state)
            copies.append(build.copy(files, work / "copy"))
        build.set_cache(files, state)
        return builds[side].measure({"bench": case, "checkpoint": str(files[0].parent), "store": str(store)}, SIDE)

    found = in_turn({side: partial(built, side) for side in builds}, pairs, store)
    num_mib = sum(file.stat().st_size for file in files) / MIB
    compare(result, found, "MiB", num_mib)
    seconds = {THIS: [one["seconds"][case] for one in found[THIS]], COPY: copies[1:]}
    targets = {COPY: COPY_RATE_MIN} if state == "cold" else {}
    result.comparisons.append(Comparison(f"{case}, beside cp", "MiB", num_mib, seconds, targets, THIS))
    for side, of_side in found.items():
        result.facts[f"{case}: seconds of processor, {side}"] = sorted(round(one["cpu_s"], 2) for one in of_side)
