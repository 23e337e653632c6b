"""Ranks that save one state with torch.distributed.checkpoint: `python distributed_ranks.py FOLDER WORLD ROWS DIM`.

Input: an empty folder, the number of ranks, the size of the table. Output: FOLDER/dcp, as `dcp.save` writes it;
FOLDER/shared, its safetensors files of ranks; and FOLDER/table.pt, the whole state. torch is imported once: ranks are
forks, which talk over gloo on the loopback and meet at a file.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DeviceMesh, DTensor, Shard


def state_of(rows: int, dim: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(rows, dim, generator=generator)
    return {"bf16": table.bfloat16(), "fp8": table.to(torch.float8_e4m3fn), "columns": table.half()}


def save_rank(folder: Path, rank: int, world: int, rows: int, dim: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    mesh = DeviceMesh("cpu", list(range(world)))
    whole = state_of(rows, dim)

    def part(tensor: torch.Tensor, axis: int) -> DTensor:
        mine = tensor.chunk(world, dim=axis)[rank].contiguous()
        shape, stride = tensor.shape, tensor.stride()
        return DTensor.from_local(mine, mesh, [Shard(axis)], run_check=False, shape=shape, stride=stride)

    by_rows = {name: part(whole[name], 0) for name in ("bf16", "fp8")}
    columns = part(whole["columns"], 1)
    model = {"embed.weight": by_rows["bf16"], "fp8.weight": by_rows["fp8"], "columns": columns}
    state = {"model": model | {"buffer": torch.arange(3)}, "step": 7, "optimizer": {"lr": torch.tensor(0.5)}}
    dcp.save(state, checkpoint_id=folder / "dcp")
    shared = {"embed.weight": by_rows["bf16"], "whole": whole["bf16"], "odd": torch.ones(3, dtype=torch.uint8)}
    writer = dcp.HuggingFaceStorageWriter(str(folder / "shared"), save_distributed=True)
    dcp.save(shared, storage_writer=writer)
    dist.destroy_process_group()


def main() -> int:
    folder, world, rows, dim = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    torch.save(state_of(rows, dim), folder / "table.pt")
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                save_rank(folder, rank, world, rows, dim)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
