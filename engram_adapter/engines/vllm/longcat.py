"""The n-gram tables of LongCat in vLLM, looked up in a store: the engine hashes and projects, the store has the rows.

Input: row ids of a step, all heads of a token, from the engine's own hash. Output: rows as its table would give them.
The engine looks up before the forward, outside of graphs, and nothing hides the reads there. Errors:
`EngineMismatchError` while the model is built and loaded; what lookups raise, later.

Shapes: T tokens of a step, C heads of a token, D values of a row.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch

from ...hash_spec import HashSpec
from ..device_rows import rows_of
from ..gate import EngineMismatchError
from ..settings import EngineSettings
from ..tables import ExpectedTable, check_compared, check_rows, matching_table, rows_at, sample_offsets, served
from .checks import model_device

logger = logging.getLogger("vllm.tierstore")  # below the engine's logger, whose handlers show it

CODECS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LAYER = 0  # the table's, as the store names it
PREFIX = "model.ngram_embeddings"


class TieredLongcatEmbedding(torch.nn.Module):
    """What the engine's `NgramEmbedding` holds instead of its table: the same rows, no weights.

    Every rank looks up all rows, so that nothing has to be added up over ranks.
    """

    def __init__(
        self, vllm_config: Any, settings: EngineSettings, num_embeddings: int, embedding_dim: int, dtype: torch.dtype
    ) -> None:
        """Opens the store and finds the table. Raises `EngineMismatchError` if it is not the engine's."""
        super().__init__()
        if dtype not in CODECS:
            raise EngineMismatchError(f"{PREFIX}: rows of {dtype}, expected {' or '.join(map(str, CODECS))}")
        self.prefix, self.settings, self.embedding_dim = PREFIX, settings, embedding_dim
        self.weight = torch.nn.Parameter(torch.empty(0, embedding_dim, dtype=dtype), requires_grad=False)
        # The engine copies the rows of a checkpoint that lie in this range: none.
        self.shard_indices = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=0)
        self.hash_spec = HashSpec.from_config(vllm_config.model_config.hf_text_config.to_dict())
        expected = ExpectedTable(
            self.hash_spec.table_name(LAYER),
            num_embeddings,
            embedding_dim,
            embedding_dim * dtype.itemsize,
            (CODECS[dtype],),
            self.hash_spec.fingerprint(LAYER),
        )
        store = settings.open_tables(model_device())
        table = matching_table(store, expected, PREFIX)
        tokens_max = vllm_config.scheduler_config.max_num_batched_tokens
        self.rows = rows_of(settings, store, table.spec.name, tokens_max, self.weight.device)
        self._values = self.rows.rows.view(dtype)  # [tokens_max, C, D], the same memory
        self._rows_compared = 0
        self._load_format = str(vllm_config.load_config.load_format)

    def compare(self, head: int, loaded: torch.Tensor) -> None:
        """Takes no row of a head's tensor in the checkpoint: compares a few with the store's."""
        spec = self.rows.table.spec
        if loaded.dtype != self.weight.dtype or loaded.shape[1] != self.embedding_dim:
            raise EngineMismatchError(
                f"{PREFIX}: head {head} of the checkpoint is {loaded.dtype} of {loaded.shape[1]} values, the engine's "
                f"rows are {self.weight.dtype} of {self.embedding_dim}; load the model in the dtype of the checkpoint"
            )
        offsets = sample_offsets(spec.num_rows, spec.offsets[head], len(loaded), spec.row_bytes)
        if len(offsets):
            found = rows_at(loaded.contiguous().view(torch.uint8).cpu().numpy(), offsets)
            check_rows(self.rows.table, offsets + spec.offsets[head], found, 0, PREFIX)
            self._rows_compared += len(offsets)

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Returns the rows of row ids, integers [C, T], as [C, T, D]. Blocks on the reads, unless kernels look up."""
        self.rows.start_in_forward(row_ids.t())
        self.rows.finish_in_forward()
        return self._values[: row_ids.shape[1]].transpose(0, 1)

    def check_loaded(self, hashing: Any, eos_id: int) -> None:
        """Checks the layer once the model is loaded, and logs that it is served.

        hashing: the engine's `NgramEmbedding`; eos_id: the token behind which its look-back ends.
        """
        spec = self.rows.table.spec
        orders, multipliers = torch.tensor(spec.orders), torch.tensor(self.hash_spec.multipliers(LAYER))
        weights = hashing.ne_weights.reshape(len(orders), -1).cpu()  # those beyond a head's order are not looked at
        of_order = torch.arange(weights.shape[1]) < orders.unsqueeze(1)
        sides = (
            ("heads' rows", tuple(hashing.ne_mods.flatten().tolist()), spec.moduli),
            ("heads' first rows", tuple(hashing.exclusive_sizes.tolist()[:-1]), spec.offsets),
            ("weights", (weights * of_order).flatten().tolist(), multipliers.tolist()),
            ("end of text", eos_id, self.hash_spec.barrier_id),
        )
        for what, found, wanted in sides:
            if found != wanted:
                raise EngineMismatchError(
                    f"{PREFIX}: {what} of the engine's hash are {found}, the store's {wanted}: every row would be a "
                    f"wrong one; build the store from the checkpoint that the engine loads"
                )
        check_compared(self.rows.table, self._rows_compared, self._load_format, PREFIX)
        rows = self.rows
        logger.info("%s", served(rows.table, rows.store, self.settings.mode, PREFIX, self._rows_compared))
