"""One of several processes that train a model together: `python ranks_client.py WAY RANK RANKS CHECKPOINT STORE MEET`.

Input: a way to share the work, "ddp" or "fsdp2"; a checkpoint of transformers and its store; a file where the ranks
meet. Output: exit status 0 if loss and gradients are those of one process that has the whole batch; else what differs.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tierstore
from engram_adapter import load_pretrained

WAIT_S = 120


def shared(model: Any, way: str, num_ranks: int) -> Any:
    """The model, its work shared among the ranks."""
    if way == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (num_ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loss_of(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(token_ids, labels=token_ids).loss
    loss.backward()
    return loss.detach()


def gradient_of(model: Any) -> torch.Tensor:
    """Of the projection that the table's rows go through first."""
    gradient = model.model.layers[1].ple.value_proj.weight.grad
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def main(way: str, rank: int, num_ranks: int, checkpoint: str, store_path: str, meet: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=WAIT_S)
    )
    batch = torch.randint(4, 97, (num_ranks, 9), generator=torch.Generator().manual_seed(1))
    with tierstore.open(store_path, dram="192KiB") as store:
        whole, part = (load_pretrained(checkpoint, store).train() for _ in range(2))
        losses = [loss_of(whole, batch[each : each + 1]) / num_ranks for each in range(num_ranks)]
        expected = gradient_of(whole) / num_ranks
        wrapped = shared(part, way, num_ranks)
        loss = loss_of(wrapped, batch[rank : rank + 1])
        assert torch.equal(loss / num_ranks, losses[rank]), f"loss {loss}, {losses[rank] * num_ranks} expected"
        # Sums of bfloat16 in another order.
        torch.testing.assert_close(gradient_of(part), expected, rtol=0.02, atol=1e-5)
        assert expected.abs().max() > 1e-4
        assert store.stats()["keys"] > 0
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
