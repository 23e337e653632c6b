#!/usr/bin/env bash
# A backward pass that raises leaves what it had not reached in the queue of its thread: the graph's functions, with the
# tensors that they saved, live on without any name, and no collector frees them. The next backward pass of the thread
# does, of whatever graph. Who catches an error of backward and goes on without one holds a batch's memory for nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import gc
import weakref

import torch


class Saved:
    """Stands for what a function keeps for its backward."""


class Passes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, saved, fails):
        ctx.saved, ctx.fails = saved, fails
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.fails:
            raise ValueError("this gradient is refused")
        return gradient, None, None


def two_branches(fails):
    weight = torch.nn.Parameter(torch.ones(3))
    both = [Saved(), Saved()]
    living = [weakref.ref(saved) for saved in both]
    first, second = Passes.apply(weight, both[0], False), Passes.apply(weight, both[1], fails)
    try:
        (first.sum() + second.sum()).backward()
    except ValueError:
        pass
    return living


print("torch", torch.__version__)
print("guess: once the error is handled and no tensor is left, the graph is gone")
kept = two_branches(fails=True)
gc.collect()
after_error = [each() is not None for each in kept]
print("seen: after the error, and gc.collect(), the two branches live:", after_error)
whole = two_branches(fails=False)
gc.collect()
after_another = [each() is not None for each in kept]
print("seen: after a backward pass of another graph:", after_another)
print("seen: that pass, which ended well, left of itself:", [each() is not None for each in whole])
assert after_error == [True, False]
assert after_another == [False, False]
assert not any(each() for each in whole)
PY
