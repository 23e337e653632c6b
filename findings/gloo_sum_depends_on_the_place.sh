#!/usr/bin/env bash
# all_reduce(SUM) over gloo adds the ranks' values in an order that depends on the element's place in the tensor. The
# same four numbers, one a rank, repeated over a tensor of 1,000, come out as several different sums; and a tensor
# reduced in pieces of 100 differs from one reduced whole. So another bucket size, or a parameter added before it,
# changes a run's bits.
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

RANKS, ELEMENTS, PIECE = 4, 1000, 100


def summed(values):
    dist.all_reduce(values)
    return values


def look(rank):
    dist.init_process_group("gloo", init_method="file://" + __file__ + ".store", rank=rank, world_size=RANKS)
    sums = summed(torch.full((ELEMENTS,), [1e8, 1.0, -1e8, 1.0][rank])).unique().tolist()
    values = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(rank))
    whole = summed(values.clone())
    pieces = torch.cat([summed(piece.clone()) for piece in values.split(PIECE)])
    differ = (whole != pieces).sum().item()
    if rank == 0:
        print("torch", torch.__version__, "with gloo,", RANKS, "ranks")
        print("guess: the ranks are added in one order everywhere, so that equal columns have equal sums")
        print(f"seen: 1e8 + 1 - 1e8 + 1, {ELEMENTS} times in one tensor: {sums}")
        print("guess: elements do not care in which bucket they are reduced")
        print(f"seen: reduced in pieces of {PIECE}, {differ} of {ELEMENTS} sums have other bits than reduced whole")
    assert len(sums) > 1, sums
    assert 0 < differ < ELEMENTS, differ
    dist.destroy_process_group()


if __name__ == "__main__":
    processes.spawn(look, nprocs=RANKS)
PY
"$folder/venv/bin/python" look.py
