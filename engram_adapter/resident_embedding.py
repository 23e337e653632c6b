"""The resident counterpart of a store's embedding: the same call, the same rows, bit for bit, of a table in memory.

Input: token ids. Output: rows, without gradient. Errors: `ValueError` for a table of another size than the hash says.
"""

from __future__ import annotations

import torch

from .hash_spec import HashSpec
from .lookup_call import LookupCall


class HashedEmbedding(torch.nn.Module):
    """The resident counterpart of `TieredEmbedding`: a whole table in memory, addressed by the same hash.

    `weight` is the decoded rows, [num_rows, dim], and stays frozen. For tables that fit, and as the oracle of
    tests. Raises `ValueError` if `weight` is not the size of the table that `spec` describes.
    """

    def __init__(self, spec: HashSpec, layer: int | str, weight: torch.Tensor) -> None:
        super().__init__()
        if weight.ndim != 2 or weight.shape[0] != spec.num_rows(layer):
            raise ValueError(
                f"weight of shape {list(weight.shape)} for {spec.table_name(layer)}: it must be "
                f"[{spec.num_rows(layer)}, values a row]"
            )
        self._hash_spec, self._layer = spec, layer
        self.num_embeddings, self.embedding_dim = weight.shape
        self.num_heads = len(spec.moduli(layer))
        self.embedding = torch.nn.Embedding.from_pretrained(weight, freeze=True)

    @property
    def features(self) -> int:
        """Values that one token gets: rows a token times values a row."""
        return self.num_heads * self.embedding_dim

    def forward(
        self, token_ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the rows of `token_ids`, integers [B, T], as [B, T, O * H, dim]; as `TieredEmbedding.forward`."""
        call = LookupCall(token_ids, history, dead, self._hash_spec.history_tokens)
        ids = self._hash_spec.row_ids(call.token_ids, self._layer, history=call.history, dead=call.dead)
        row_ids = torch.from_numpy(ids).to(self.embedding.weight.device)
        rows: torch.Tensor = self.embedding(row_ids.clamp_min(0))
        return rows.masked_fill((row_ids < 0).unsqueeze(-1), 0).to(token_ids.device)
