# ruff: noqa: ARG002 - parameters are what these files are for
from types import SimpleNamespace

import torch
from torch import nn
from vllm.model_executor.custom_op import PluggableLayer


class Qwen4ExpPLEEmbedding(PluggableLayer):
    def __init__(
        self, num_embeddings, embedding_dim, *, params_dtype, padding_size, prefix, embedding_method,
        num_ngram_heads=1, max_total_tokens=0, data_parallel_rank=0, reduce_results=True,
    ):  # fmt: skip
        super().__init__()
        self.embedding_dim, self.reduce_results, self.params_dtype = embedding_dim, reduce_results, params_dtype
        self.shard_indices = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=num_embeddings // 2)
        if embedding_method == "nvfp4":
            self._pack(num_embeddings, embedding_dim)
            return
        weight = self.allocate_embedding_weight(num_embeddings, embedding_dim, params_dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if params_dtype == torch.float8_e4m3fn:
            self.weight_scale = nn.Parameter(torch.zeros(()), requires_grad=False)

    def _pack(self, num_embeddings, embedding_dim):
        weight = self.allocate_embedding_weight(num_embeddings, embedding_dim // 2, torch.uint8)
        scales = self.allocate_embedding_weight(num_embeddings, embedding_dim // 16, torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.weight_scale_2 = nn.Parameter(torch.zeros(()), requires_grad=False)

    def allocate_embedding_weight(self, num_embeddings, embedding_dim, dtype):
        return torch.zeros(num_embeddings, embedding_dim, dtype=dtype)

    def weight_loader(self, param, loaded_weight, checkpoint_start=None):
        param.data.copy_(loaded_weight)

    def dequantize(self, embeddings, output_dtype):
        return embeddings.to(output_dtype)

    def start_prefetch(self, ngram_ids):
        pass

    def finalize_prefetch(self, total_tokens):
        pass


class Qwen4ExpPLEDeviceEmbedding(Qwen4ExpPLEEmbedding):
    pass


class Qwen4ExpPLEPinnedHostEmbedding(Qwen4ExpPLEEmbedding):
    def __init__(
        self, num_embeddings, embedding_dim, *, params_dtype, padding_size, prefix, embedding_method,
        num_ngram_heads=1, max_total_tokens=0, data_parallel_rank=0, reduce_results=True,
    ):  # fmt: skip
        raise RuntimeError("Engram CPU offload requires UVA support")
