"""Fine-tunes a store's tables with a small model: python examples/fine_tune.py STORE IDS.npy CHECKPOINT.pt

IDS.npy holds token ids of the store's model, one after the other. Killed at any moment and started again, it goes on
from the last checkpoint, and ends with the same bits. Replace `Scores` by your model: a module that calls the
embeddings as it would call any other.
"""

import os
import sys

import numpy as np
import torch

import tierstore
from engram_adapter import HashSpec, TableOptimizer, TrainableEmbedding, dense_parameters

STEPS, SAVE_EVERY, SEQUENCES, TOKENS = 30, 10, 4, 16
store_path, ids_path, checkpoint = sys.argv[1:]


class Scores(torch.nn.Module):
    def __init__(self, embeddings, vocab_size):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = torch.nn.ModuleList(embeddings)
        features = sum(each.features for each in embeddings)
        self.out = torch.nn.Sequential(torch.nn.Linear(features, 32), torch.nn.Linear(32, vocab_size))

    def forward(self, ids):
        rows = torch.cat([each(ids[:, :-1]).flatten(-2) for each in self.embeddings], dim=-1)
        return torch.nn.functional.cross_entropy(self.out(rows).flatten(0, 1), ids[:, 1:].flatten())


ids = torch.from_numpy(np.load(ids_path))
with tierstore.open_training(store_path, tierstore.RowWiseAdagrad(lr=0.05), dram="64MiB") as training:
    spec = HashSpec.from_store(training)
    embeddings = [TrainableEmbedding(training, layer, spec) for layer in spec.layers]
    model = Scores(embeddings, spec.vocab_size)
    tables, dense = TableOptimizer(embeddings), torch.optim.AdamW(dense_parameters(model), lr=1e-3)
    if os.path.exists(checkpoint):
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        dense.load_state_dict(state["dense"])
        tables.load_state_dict(state["tables"])  # goes back to the commit that was saved with the weights
    for step in range(tables.num_steps + 1, STEPS + 1):
        starts = np.random.default_rng(step).integers(0, len(ids) - TOKENS - 1, SEQUENCES)
        loss = model(torch.stack([ids[start : start + TOKENS + 1] for start in starts]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # over tables and dense weights
        for optimizer in (tables, dense):
            optimizer.step()
            optimizer.zero_grad()
        if step % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "dense": dense.state_dict(), "tables": tables.state_dict()}
            torch.save(state, checkpoint + ".new")
            os.replace(checkpoint + ".new", checkpoint)  # whole or not at all
            print(f"step {step}: loss {loss.item():.3f}, commit {state['tables']['commit']}", flush=True)
    print(f"published version {training.publish()}")
