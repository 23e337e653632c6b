# ruff: noqa: ARG002 - parameters are what these files are for
from types import SimpleNamespace

import torch
from torch import nn


class VocabParallelEmbedding(nn.Module):
    def __init__(self, num_embeddings, embedding_dim, params_dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_embeddings, embedding_dim, dtype=params_dtype), requires_grad=False)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=num_embeddings)

    def forward(self, ids):
        return self.weight[ids]


class NgramEmbedding(nn.Module):
    def __init__(self, config, base_embeddings):
        super().__init__()
        self.config, self.word_embeddings = config, base_embeddings
        self.m = config.ngram_vocab_size_ratio * config.vocab_size
        self.k, self.n, self.eos_token_id = config.emb_split_num, config.emb_neighbor_num, config.eos_token_id
        self._init_ngram_embeddings()

    def _init_ngram_embeddings(self):
        heads = self.k * (self.n - 1)
        mods = [int(self.m + 2 * head + 1) for head in range(heads)]
        self._offsets = [sum(mods[:head]) for head in range(heads + 1)]
        self.oe_embedder = VocabParallelEmbedding(
            self._offsets[-1], self.config.hidden_size // heads, params_dtype=self.config.dtype
        )
        powers = [[pow(self.config.vocab_size, back, mod) for back in range(self.n)] for mod in mods]
        self.register_buffer("ne_weights", torch.tensor(powers, dtype=torch.int32).view(-1, self.k, self.n))
        self.register_buffer("ne_mods", torch.tensor(mods, dtype=torch.int32).view(-1, self.k))
        self.register_buffer("exclusive_sizes", torch.tensor(self._offsets, dtype=torch.int32))

    def load_weight(self, weight_name, loaded_weight):
        head = int(weight_name.split("embedders.")[1].split(".")[0])
        shard = self.oe_embedder.shard_indices
        start = max(self._offsets[head], shard.org_vocab_start_index)
        end = min(self._offsets[head + 1], shard.org_vocab_end_index)
        if start < end:
            first = start - self._offsets[head]
            self.oe_embedder.weight.data[start:end] = loaded_weight[first : first + end - start]
        return "ngram_embeddings.oe_embedder.weight"

    def embed_batched(self, input_ids, oe_ids):
        return self.oe_embedder(oe_ids.permute(1, 0).contiguous())


class LongcatNgramModelState:
    def __init__(self, vllm_config, model, encoder_cache, device):
        self.ngram = next(each for each in model.modules() if isinstance(each, NgramEmbedding))

    def prepare_inputs(self, input_batch, req_states):
        return {"inputs_embeds": self.ngram.embed_batched(input_batch.input_ids, input_batch.oe_ids)}
