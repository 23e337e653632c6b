#!/usr/bin/env bash
# all_reduce(MAX) over gloo of a tensor that is NaN on one rank: whether NaN or the other ranks' number comes out
# depends on which rank had it and on the element's place in the tensor. torch.maximum and torch.max return NaN
# always. A check of "is any rank's loss or gradient norm NaN" by the largest value passes on one rank's NaN and stops
# on another's; reduce a flag of `isnan` instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

RANKS, ELEMENTS = 2, 8


def largest(rank, size, where):
    """Returns how many of the elements come out as NaN if they all are NaN on the rank `where`."""
    values = torch.full((size,), float("nan") if rank == where else 1.0)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values.isnan().sum())


def look(rank):
    dist.init_process_group("gloo", init_method="file://" + __file__ + ".store", rank=rank, world_size=RANKS)
    seen = {(size, where): largest(rank, size, where) for size in (1, ELEMENTS) for where in range(RANKS)}
    if rank == 0:
        print("torch", torch.__version__, "with gloo,", RANKS, "ranks")
        print("guess: the largest of NaN and 1 is NaN, as torch.maximum says")
        for (size, where), count in seen.items():
            print(f"seen: {size} element(s), NaN on rank {where} and 1 on the other: {count} come out as NaN")
    assert seen == {(1, 0): 1, (1, 1): 0, (ELEMENTS, 0): ELEMENTS // 2, (ELEMENTS, 1): ELEMENTS // 2}, seen
    dist.destroy_process_group()


if __name__ == "__main__":
    processes.spawn(look, nprocs=RANKS)
PY
"$folder/venv/bin/python" look.py
