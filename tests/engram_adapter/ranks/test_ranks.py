"""`Ranks`: exchanges of a process group in lock-step, and what is reported if a rank is late, gone or elsewhere."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.rank_processes import RankFailure, await_ranks, outcomes_of, run_ranks, start_ranks

from engram_adapter.exchange import Ranks
from tierstore.errors import ConfigError

LIMIT_S = 2.0


def exchanged(rank: int) -> Any:
    ranks = Ranks(timeout_s=30)
    counts = np.array([[10 * rank + other, rank] for other in range(ranks.size)])
    came = ranks.counts("numbers", counts)
    sizes = [rank + other for other in range(ranks.size)]  # rank 0 sends itself nothing
    sent = torch.cat([torch.full((size, 2), float(100 * rank + other)) for other, size in enumerate(sizes)])
    received = ranks.all_to_all("rows", sent, sizes, sizes)
    gathered = ranks.all_gather("norms", torch.tensor([rank, 7]))
    objects = ranks.gather_objects("places", {"rank": rank, "text": "x" * rank})
    return came.tolist(), received.tolist(), gathered.tolist(), objects


@pytest.mark.parametrize("size", [1, 3])
def test_rows_come_in_the_order_of_ranks_whatever_their_number(size: int, tmp_path: Path) -> None:
    for rank, (counts, rows, gathered, objects) in enumerate(run_ranks(exchanged, size, tmp_path)):
        assert counts == [[10 * other + rank, other] for other in range(size)]
        assert rows == [[float(100 * other + rank)] * 2 for other in range(size) for _ in range(rank + other)]
        assert gathered == [[other, 7] for other in range(size)]
        assert objects == [{"rank": other, "text": "x" * other} for other in range(size)]


def in_a_group_of_two(rank: int) -> Any:
    pair = dist.new_group([1, 2])
    if rank == 0:
        with pytest.raises(ConfigError, match="not a rank of the group"):
            Ranks(pair)
        return None
    ranks = Ranks.of(pair)
    assert Ranks.of(pair) is ranks
    assert Ranks.of(ranks) is ranks
    return ranks.rank, ranks.size, ranks.members, ranks.gather_objects("who", rank)


def test_a_group_may_be_of_some_ranks_and_the_others_need_not_know(tmp_path: Path) -> None:
    found = run_ranks(in_a_group_of_two, 3, tmp_path)
    assert found == [None, (0, 2, (1, 2), [1, 2]), (1, 2, (1, 2), [1, 2])]


def one_hangs(rank: int) -> Any:
    ranks = Ranks(timeout_s=LIMIT_S)
    ranks.counts("first", np.zeros((ranks.size, 1), dtype=np.int64))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    try:
        ranks.counts("forward of table layers.1", np.zeros((ranks.size, 1), dtype=np.int64))
    except BaseException as error:
        error.took_s = time.monotonic() - start  # type: ignore[attr-defined]
        raise
    return None


def test_a_rank_that_hangs_is_named_by_the_others_within_the_limit(tmp_path: Path) -> None:
    children = start_ranks(one_hangs, 3, tmp_path)
    try:
        assert await_ranks([children[0], children[2]]) == [0, 0]
    finally:
        os.kill(children[1], signal.SIGKILL)
        os.waitpid(children[1], 0)
    for outcome in (outcomes_of(tmp_path, 3)[each] for each in (0, 2)):
        assert isinstance(outcome, RankFailure)
        assert outcome.kind == "RankError"
        assert outcome.details["ranks"] == (1,)
        assert outcome.details["waited_for"] == "forward of table layers.1"
        assert "rank 1 did not come within 2 s" in outcome.message
        assert LIMIT_S <= outcome.details["took_s"] < LIMIT_S + 2.5


def one_dies(rank: int) -> Any:
    ranks = Ranks(timeout_s=30)
    ranks.counts("first", np.zeros((ranks.size, 1), dtype=np.int64))
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.counts("forward", np.zeros((ranks.size, 1), dtype=np.int64))


def test_a_rank_that_is_gone_is_named_long_before_the_limit(tmp_path: Path) -> None:
    start = time.monotonic()
    assert await_ranks(start_ranks(one_dies, 3, tmp_path)) == [0, 0, -9]
    assert time.monotonic() - start < 20
    for outcome in outcomes_of(tmp_path, 3)[:2]:
        assert outcome.kind == "RankError"
        assert outcome.details["ranks"] == (2,)
        assert "rank 2 left" in outcome.message


def in_different_places(rank: int) -> Any:
    ranks = Ranks(timeout_s=30)
    counts = np.zeros((ranks.size, 1), dtype=np.int64)
    ranks.counts("forward of table a", counts)
    ranks.counts("forward of table b" if rank == 1 else "forward of table c", counts)


def test_ranks_in_different_places_say_so_by_name(tmp_path: Path) -> None:
    assert await_ranks(start_ranks(in_different_places, 3, tmp_path)) == [0, 0, 0]
    for rank, outcome in enumerate(outcomes_of(tmp_path, 3)):
        assert "rank 1 is in forward of table b" in outcome.message
        assert "rank 2 is in forward of table c" in outcome.message
        assert outcome.details["ranks"] == ((0, 2) if rank == 1 else (1,))


def interrupted(rank: int) -> Any:
    ranks = Ranks(timeout_s=30)
    if rank == 1:
        time.sleep(6)
        os._exit(0)
    threading.Timer(0.3, _thread.interrupt_main).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ranks.counts("forward", np.zeros((2, 1), dtype=np.int64))
    took = time.monotonic() - start
    with pytest.raises(Exception, match=r"no exchange .* is possible any more: forward ended with KeyboardInterrupt"):
        ranks.counts("forward", np.zeros((2, 1), dtype=np.int64))
    return took


def test_ctrl_c_comes_through_a_wait_and_ends_the_exchange(tmp_path: Path) -> None:
    await_ranks(start_ranks(interrupted, 2, tmp_path))
    took = outcomes_of(tmp_path, 2)[0]
    assert isinstance(took, float), took
    assert took < 5, "what came was the other rank's end"


def test_without_torch_distributed_the_error_says_what_to_call() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        Ranks()
    with pytest.raises(ConfigError, match="init_process_group"):
        Ranks.of(None)
