"""Ranks to measure on: a part of `bench exchange` in W processes, which talk over gloo on the loopback.

Input: the name of a part, and what its ranks need to know. Output: what its rank 0 found. Errors: `DaemonError` if a
rank fails; its words are on standard error.

    python -m tierstore.tools.bench.exchange.rank_group lookups '{"folder": ...}'

Ranks are forks of one process that has imported torch: they start in milliseconds, and no thread is there yet.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from tierstore.errors import DaemonError

from ..pairs import WARM_UP_ROUNDS, Result, interleave
from ..train.work import Seconds

if TYPE_CHECKING:
    from engram_adapter.exchange import Ranks

SIZE = 2  # ranks
LIMIT_S = 1800.0
RANK_LIMIT_S = 120.0  # for another rank, in any exchange

Found = dict[str, Any]  # JSON


def run(part: str, given: Mapping[str, Any]) -> Found:
    """Runs a part, `exchange.PART`'s `work`, on ranks, and returns what rank 0 found. Blocks."""
    command = [sys.executable, "-m", __name__, part, json.dumps(given)]
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DaemonError(f"bench exchange, {part}: ranks took longer than {LIMIT_S:g} s; use fewer --pairs") from None
    if ended.returncode:
        raise DaemonError(f"bench exchange, {part}: a rank failed with status {ended.returncode}; its words are above")
    found: Found = json.loads(ended.stdout.splitlines()[-1])
    return found


def compare(ranks: Ranks, sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Runs sides in turn, each on all ranks at once; returns seconds by clock ("wall", "processor") and by side.

    By the wall until the last rank is done; of the processor, all ranks together.
    """
    found: dict[str, list[Seconds]] = {side: [] for side in sides}

    def kept(side: str) -> float:
        found[side].append(_timed(ranks, sides[side]))
        return found[side][-1].wall

    interleave({side: partial(kept, side) for side in sides}, rounds, WARM_UP_ROUNDS)
    return {
        "wall": {side: [each.wall for each in all_[-rounds:]] for side, all_ in found.items()},
        "processor": {side: [each.cpu for each in all_[-rounds:]] for side, all_ in found.items()},
    }


def _timed(ranks: Ranks, call: Callable[[], object]) -> Seconds:
    ranks.gather_objects("all are here", None)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    took = [time.perf_counter() - wall, time.process_time() - cpu]
    of_ranks = ranks.gather_objects("what it took", took)
    return Seconds(max(each[0] for each in of_ranks), sum(each[1] for each in of_ranks))


def add(
    result: Result, case: str, unit: str, work: float, clocks: Mapping[str, Any], targets: Mapping[str, float]
) -> None:
    """Adds what `compare` found to a result, a comparison for each clock. Targets are of the wall's."""
    from ..pairs import Comparison

    for clock, seconds in clocks.items():
        given = {side: least for side, least in targets.items() if side in seconds and clock == "wall"}
        result.comparisons.append(Comparison(f"{case}, {clock}", unit, work, dict(seconds), given))


def main() -> int:
    """Is the process whose forks are the ranks."""
    part, given = sys.argv[1], json.loads(sys.argv[2])
    work = importlib.import_module(f"{__package__}.{part}").work
    import torch
    import torch.distributed as dist

    size = int(given.get("size", SIZE))
    with tempfile.TemporaryDirectory(prefix="tierstore-bench-ranks-") as folder:
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                    torch.set_num_threads(int(given.get("threads", 1)))
                    meeting = f"file://{folder}/meeting"
                    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
                    from engram_adapter.exchange import Ranks

                    found = work(Ranks.of(timeout_s=RANK_LIMIT_S), given)
                    if rank == 0:
                        print(json.dumps(found), flush=True)
                    dist.barrier()
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
