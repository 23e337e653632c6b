"""Builds a store from a checkpoint, checks it, and looks rows up: python examples/build_and_look_up.py CHECKPOINT STORE

CHECKPOINT is a model's folder (or `tierstore synth model --family deepseek_v41 --size 64MiB`). Run again, it goes on
where it stopped; a finished store is only looked up in.
"""

import sys

import numpy as np
import torch

import engram_adapter
import tierstore

checkpoint, path = sys.argv[1:]
report = engram_adapter.build_checkpoint(checkpoint, path)
print(f"{path}: {report.shards_built} shards built, {report.shards_kept} kept")
verdict = tierstore.verify(path, source=engram_adapter.open_checkpoint(checkpoint))
print(f"{verdict.rows_compared} rows are those of {checkpoint}")

with tierstore.open(path, dram="64MiB") as store:
    spec = engram_adapter.HashSpec.from_store(store)
    name = next(iter(store.tables))
    embedding = engram_adapter.TieredEmbedding(store, name, spec)

    prompt = torch.arange(12).reshape(1, 12)  # ids of a prompt: [sequences, tokens]
    values = embedding(prompt)  # prefill: [sequences, tokens, rows a token, values a row]
    print(f"{name}: {list(values.shape)} in {values.dtype}")
    following = embedding(prompt[:, -1:], history=prompt[:, :-1])  # decode: the last token again, by itself
    assert torch.equal(following[:, 0], values[:, -1]), "a token's rows depend on the tokens before it, and on no more"

    keys = spec.keys(prompt.numpy(), name)[0]  # the same rows as bytes, by key: [tokens, orders]
    rows = store[name].lookup(keys)
    print(f"{rows.nbytes} bytes of {len(np.unique(keys[keys >= 0]))} keys; hits by tier: {store.stats()['hits']}")
