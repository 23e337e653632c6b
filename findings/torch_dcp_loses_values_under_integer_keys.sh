#!/usr/bin/env bash
# torch.distributed.checkpoint loads a number that was saved under an integer key under the key's string instead.
# Optimizers number their state by integers, and SparseAdam counts its steps in a Python int. So its step is not
# loaded: the target keeps its own, the saved one lies beside it under "0", nothing is raised, and training goes on to
# other weights.
#
# Likely guess: what load fills in is what was saved, key by key, or it raises as it does for a tensor of another
# shape.
# Seen: tensors come back under the integer; numbers under the string. Adam's step is a tensor, and so is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import torch.distributed.checkpoint as dcp

warnings.simplefilter("ignore")
print("torch", torch.__version__)


def trained(optimizer_class, steps):
    table = torch.nn.Embedding(4, 1, sparse=optimizer_class is torch.optim.SparseAdam)
    torch.nn.init.ones_(table.weight)
    optimizer = optimizer_class(table.parameters(), lr=0.1)
    train(table, optimizer, steps)
    return table, optimizer


def train(table, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        table(torch.tensor([1])).sum().backward()
        optimizer.step()


def resumed(optimizer_class):
    """Returns the state as loaded, and whether 5 steps, a save, a load and 3 steps are as 8 steps."""
    table, optimizer = trained(optimizer_class, 5)
    folder = optimizer_class.__name__
    dcp.save({"table": table.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder, no_dist=True)
    train(table, optimizer, 3)
    again, again_optimizer = trained(optimizer_class, 1)  # one step, so that there is a state to load into
    state = {"table": again.state_dict(), "optimizer": again_optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    steps = {repr(key): int(value["step"]) for key, value in state["optimizer"]["state"].items()}
    again.load_state_dict(state["table"])
    again_optimizer.load_state_dict(state["optimizer"])
    train(again, again_optimizer, 3)
    return steps, torch.equal(table.weight, again.weight)


print("guess: after load the step is 5 under the key 0, and training goes on as if it had not stopped")
adam, sparse = resumed(torch.optim.Adam), resumed(torch.optim.SparseAdam)
print("seen: Adam: steps by key", adam[0], "as undisturbed:", adam[1])
print("seen: SparseAdam: steps by key", sparse[0], "as undisturbed:", sparse[1])
assert adam == ({"0": 5}, True), adam
assert sparse == ({"0": 1, "'0'": 5}, False), sparse
PY
