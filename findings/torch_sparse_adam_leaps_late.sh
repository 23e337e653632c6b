#!/usr/bin/env bash
# torch.optim.SparseAdam corrects the bias of its moments by the table's number of steps, not by the row's. The first
# step of a row moves each weight by lr if it comes first; by 3.16 lr, (1 - beta1) / sqrt(1 - beta2), if it comes
# after some thousand steps of others. Rare rows of a large table all are met late: their first steps are the largest
# ones of the run.
#
# Likely guess: Adam's first step has the size of lr, whatever the gradient; that is what the correction is for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch

LR = 2.0**-7
print("torch", torch.__version__)
print("guess: the first step of a row moves it by lr, early or late")


def first_move(steps_before: int, gradient: float) -> float:
    """How far row 0 moves in its first step, after steps of row 1, in units of lr."""
    table = torch.nn.Embedding(2, 1, sparse=True)
    torch.nn.init.zeros_(table.weight)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=LR)
    for step in range(steps_before + 1):
        optimizer.zero_grad()
        (table(torch.tensor([int(step < steps_before)])).sum() * gradient).backward()
        optimizer.step()
    return -table.weight[0].item() / LR


moves = {steps: first_move(steps, 0.5) for steps in (0, 1, 100, 5000)}
for steps, move in moves.items():
    print(f"seen: after {steps:,} steps of another row: {move:.3f} lr")
assert abs(moves[0] - 1) < 1e-4
assert moves[1] < 0.8
assert 3.1 < moves[5000] < 3.2
assert abs(first_move(5000, 1e-3) - moves[5000]) < 0.01
PY
