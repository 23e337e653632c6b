"""The n-gram tables of Qwen4-Exp in vLLM, looked up in a store: the engine hashes and dequantizes, the store has rows.

Input: n-gram ids of a step, before its forward (`Qwen4ExpModelState.prepare_inputs`) or one layer ahead. Output: where
`finalize_prefetch` wants them, the rows' stored bytes in the table's dtype; of NVFP4, which the engine decodes when it
looks up, values. Errors: `EngineMismatchError` while the model is built and loaded; what lookups raise, later.

Shapes: T tokens of a step, H heads of all orders, D values of a row.
"""

from __future__ import annotations

import logging
import re
from typing import Any, ClassVar

import torch

from tierstore.spec import codec_scale

from ...hash_spec import HashSpec
from ..decoding import DecodedRows
from ..device_rows import rows_of
from ..gate import EngineMismatchError
from ..tables import ExpectedTable, check_compared, check_rows, matching_table, rows_at, sample_offsets, served
from .checks import model_device, settings_of

logger = logging.getLogger("vllm.tierstore")  # below the engine's logger, whose handlers show it

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NVFP4, _NVFP4_BLOCK = "fp4_e2m1_e4m3x16", 16  # values that share a scale
_CODECS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8_e4m3"}


class TieredPle:
    """What replaces the engine's embedding: a mixin before its class, which keeps parameters, shards and methods.

    `stock_class`, the class it stands for, is set where the two are put together.
    """

    supports_prefetch: ClassVar[bool] = True
    stock_class: ClassVar[type]

    def __init__(self, num_embeddings: int, embedding_dim: int, **named: Any) -> None:
        """Builds the embedding without its table; the arguments are the engine's. Raises `EngineMismatchError`."""
        from vllm.config import get_current_vllm_config

        # Past the class that it stands for, which would look for unified addressing and keep the table's address.
        stock: Any = super(self.stock_class, self)
        stock.__init__(num_embeddings, embedding_dim, **named)
        self.prefix: str = named["prefix"]
        vllm_config = get_current_vllm_config()
        self._open(vllm_config, num_embeddings, named.get("max_total_tokens", 0), named.get("num_ngram_heads", 1))
        self._rows_compared = 0
        self._load_format = str(vllm_config.load_config.load_format)

    def _open(self, vllm_config: Any, num_embeddings: int, tokens_max: int, num_heads: int) -> None:
        """Opens the store and finds the table that this layer expects."""
        settings = settings_of(vllm_config)
        assert settings is not None, "the layers of tierstore are in use without its settings"
        layer: Any = self
        codec, row_bytes = self._stored()
        match = _LAYER.search(self.prefix)
        if match is None:
            raise EngineMismatchError(f"{self.prefix}: a layer's name without its number; use another vLLM")
        number = int(match[1])
        self.hash_spec = HashSpec.from_config(vllm_config.model_config.hf_text_config.to_dict())
        if number not in self.hash_spec.layers:
            raise EngineMismatchError(
                f"{self.prefix}: a table of layer {number}, the configuration's ple_layer_ids give layers "
                f"{', '.join(map(str, self.hash_spec.layers))}; use a tested version of vLLM"
            )
        expected = ExpectedTable(
            self.hash_spec.table_name(number),
            num_embeddings,
            layer.embedding_dim,
            row_bytes,
            (codec,),
            self.hash_spec.fingerprint(number),
        )
        store = settings.open_tables(model_device())
        table = matching_table(store, expected, self.prefix)
        if table.spec.num_heads != num_heads:
            raise EngineMismatchError(
                f"{self.prefix}: {num_heads} rows a token, table {table.spec.name} has {table.spec.num_heads}"
            )
        shard = layer.shard_indices
        # Without a reduction here, the caller adds up the ranks' rows: each gives its own, and zeros.
        within = None if layer.reduce_results else (shard.org_vocab_start_index, shard.org_vocab_end_index)
        self.layer_number, self.settings = number, settings
        self.rows = rows_of(settings, store, table.spec.name, tokens_max, layer.weight.device, within)
        if codec == _NVFP4:
            self._values = DecodedRows(self.rows, torch.bfloat16).values.flatten(1)
        else:
            self._values = self.rows.rows.view(layer.weight.dtype).flatten(1)  # [tokens_max, H * D], the same memory

    def _stored(self) -> tuple[str, int]:
        """Returns the codec and the bytes of the rows that the engine expects, by its parameters."""
        layer: Any = self
        width, dtype = layer.weight.shape[1], layer.weight.dtype
        scales = getattr(layer, "weight_scale", None)
        if dtype == torch.uint8 and 2 * width == layer.embedding_dim and scales is not None and scales.ndim == 2:
            if layer.params_dtype != torch.bfloat16:
                raise EngineMismatchError(
                    f"{self.prefix}: rows of NVFP4 for a model in {layer.params_dtype}: they are decoded to bfloat16; "
                    f"load the model with --dtype bfloat16"
                )
            return _NVFP4, width + layer.embedding_dim // _NVFP4_BLOCK
        if dtype not in _CODECS or width != layer.embedding_dim:
            raise EngineMismatchError(
                f"{self.prefix}: rows of {width} {dtype} for {layer.embedding_dim} values: such packed rows are not "
                f"served; use a checkpoint with rows of {' or '.join(map(str, _CODECS))}, or in NVFP4"
            )
        return _CODECS[dtype], width * layer.weight.element_size()

    def allocate_embedding_weight(self, _num_rows: int, embedding_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns a weight without rows."""
        return torch.empty(0, embedding_dim, dtype=dtype)

    def weight_loader(
        self, param: torch.Tensor, loaded_weight: torch.Tensor, checkpoint_start: int | None = None
    ) -> None:
        """Takes no row of the table: compares a few with the store's. Scales load as the engine loads them."""
        is_table = param.ndim == 2 and param.shape[0] == 0
        if not is_table:
            super().weight_loader(param, loaded_weight)  # type: ignore[misc]
            return
        layer: Any = self
        bytes_start = 0 if param is layer.weight else layer.weight.shape[1]  # scales lie behind the values
        self._compare(loaded_weight, param.dtype, 0 if checkpoint_start is None else checkpoint_start, bytes_start)

    def _compare(self, loaded: torch.Tensor, dtype: torch.dtype, start_row: int, bytes_start: int) -> None:
        spec = self.rows.table.spec
        if loaded.dtype != dtype:
            raise EngineMismatchError(
                f"{self.prefix}: the checkpoint's rows are {loaded.dtype}, the engine's {dtype}; load the model in the "
                f"dtype of the checkpoint"
            )
        offsets = sample_offsets(spec.num_rows, start_row, len(loaded), spec.row_bytes)
        if len(offsets):
            found = rows_at(loaded.view(torch.uint8).cpu().numpy(), offsets)
            check_rows(self.rows.table, offsets + start_row, found, bytes_start, self.prefix)
            self._rows_compared += len(offsets)

    def start_prefetch(self, ngram_ids: torch.Tensor) -> None:
        """Starts the lookup of a step's rows, [T, H] ids, unless the step was staged before its forward."""
        self.rows.start_in_forward(ngram_ids)

    def finalize_prefetch(self, total_tokens: int) -> torch.Tensor:
        """Returns the rows of the step's tokens and padding, [T, H * D] in the dtype of lookups, at one address."""
        self._finish()
        return self._values[:total_tokens]

    def _finish(self) -> None:
        self.rows.finish_in_forward()

    def forward(self, _ids: torch.Tensor) -> torch.Tensor:
        """Is not used: rows are prefetched."""
        raise EngineMismatchError(f"{self.prefix}: vLLM calls the embedding itself; use a tested version")

    def check_loaded(self, hashing: Any) -> None:
        """Checks the layer once the model is loaded, and logs that it is served; hashing: the engine's n-gram hash."""
        layer: Any = self
        spec, number = self.rows.table.spec, self.layer_number
        if layer.weight.shape[0]:
            raise EngineMismatchError(f"{self.prefix}: its weight has {layer.weight.shape[0]} rows, expected none")
        sides = (
            ("layer_multipliers", self.hash_spec.multipliers(number)),
            ("ngram_heads_vocab_sizes", spec.moduli),
            ("ngram_heads_offsets", spec.offsets),
        )
        for name, wanted in sides:
            found = tuple(getattr(hashing, name).tolist())
            if found != tuple(wanted):
                raise EngineMismatchError(
                    f"{self.prefix}: the engine's {name} are {found}, the store's {tuple(wanted)}: every row would "
                    f"be a wrong one; build the store from the checkpoint that the engine loads"
                )
        check_compared(self.rows.table, self._rows_compared, self._load_format, self.prefix)
        name = "weight_scale_2" if spec.codec.startswith(_NVFP4) else "weight_scale"
        scale = getattr(layer, name, None) if self._rows_compared else None
        if scale is not None and "*" in spec.codec and float(scale) != codec_scale(spec.codec):
            raise EngineMismatchError(
                f"{self.prefix}: the checkpoint's {name} is {float(scale)}, the store's {spec.codec}; build the "
                f"store from the checkpoint that the engine loads"
            )
        rows = self.rows
        logger.info("%s", served(rows.table, rows.store, self.settings.mode, self.prefix, self._rows_compared))
