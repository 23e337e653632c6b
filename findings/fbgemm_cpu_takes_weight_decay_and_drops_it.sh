#!/usr/bin/env bash
# FBGEMM's fused embedding optimizers take weight_decay, max_norm and stochastic_rounding on a CPU too, and apply none
# of them there. A run that was tried out on a CPU trains by another rule than the one on GPUs, and TorchRec passes
# these options on as they are.
#
# Likely guess: what the constructor takes is applied; what a device cannot do is refused, as bfloat16 weights and
# Adam are.
# Seen: for row-wise Adagrad and Adagrad, the weights after a step are the same bits with and without weight decay and
# max_norm, and a float16 weight never moves by steps below half its spacing, with stochastic rounding (the default)
# or without it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 fbgemm-gpu-cpu==1.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>errors.txt <<'PY' || { cat errors.txt; exit 1; }
import fbgemm_gpu
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

print("fbgemm-gpu-cpu", fbgemm_gpu.__version__, "torch", torch.__version__)


def trained(optimizer, steps=1, **options):
    """Rows of 4 ones after steps with a gradient of 1 for rows 1 and 2."""
    spec = [(4, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    bags = SplitTableBatchedEmbeddingBagsCodegen(spec, optimizer=optimizer, **options)
    weights = bags.split_embedding_weights()[0]
    with torch.no_grad():
        weights.fill_(1.0)
    for _ in range(steps):
        out = bags(torch.tensor([1, 2]), torch.tensor([0, 1, 2]))
        out.backward(torch.ones_like(out))
    return weights.float()


for optimizer in (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD):
    print(f"guess: {optimizer.value} with weight_decay=0.5 gives other weights, and max_norm=0.5 others again")
    plain = trained(optimizer, learning_rate=0.1)
    for mode in (WeightDecayMode.L2, WeightDecayMode.DECOUPLE):
        decayed = trained(optimizer, learning_rate=0.1, weight_decay=0.5, weight_decay_mode=mode)
        print(f"seen: with weight decay ({mode.name}) the same bits: {torch.equal(plain, decayed)}")
        assert torch.equal(plain, decayed)
    bounded = trained(optimizer, learning_rate=0.1, max_norm=0.5)
    print(f"seen: with max_norm=0.5 the same bits: {torch.equal(plain, bounded)}, norms {bounded[1].norm().item():.2f}")
    assert torch.equal(plain, bounded)
    assert bounded[1].norm() > 0.5
print("guess: 64 steps of 2**-14 move a float16 weight by about 64 * 2**-14 if it is rounded stochastically")
for stochastic in (True, False):
    half = trained(EmbOptimType.EXACT_SGD, steps=64, learning_rate=2.0**-14, weights_precision=SparseType.FP16,
                   stochastic_rounding=stochastic)
    print(f"seen: stochastic_rounding={stochastic}: weights are {half[1].tolist()}")
    assert half[1].tolist() == [1.0] * 4
PY
