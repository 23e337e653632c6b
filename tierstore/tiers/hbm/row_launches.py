"""The kernels of one table's lookups by row id, and the buffers on the device that they use beside `launches`'s.

Input: row ids on the device. Output: rows as stored, in the caller's buffer of any strides. All methods only launch, so
that they can be captured in a CUDA graph. Errors: `ConfigError` for a table whose row ids do not give keys.

Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...errors import ConfigError
from ...kernels.gpu.codecs import BYTES, RowCodec
from ...kernels.gpu.misses import list_row_ids
from ...kernels.gpu.put_rows import check_out, put_rows
from ...kernels.gpu.token_keys import DeviceAddressMap, keys_of_row_ids
from .launches import LookupLaunches
from .mailbox import Mailbox

if TYPE_CHECKING:
    from .tier import HbmTier

STAGING_BYTES_MAX = 8 << 20  # of the device, for rows on their way to a strided buffer; one token fits in any case


class RowLaunches(LookupLaunches):
    """See `LookupLaunches`, whose rules hold here too.

    Attributes:
        strided_tokens_max: How many tokens' rows the staging for a strided buffer holds.
    """

    by_row_id = True

    @torch.inference_mode(False)
    def __init__(self, tier: HbmTier, index: int, tokens_max: int, mailbox: Mailbox) -> None:
        spec = tier.tables[index].spec
        super().__init__(tier, index, tokens_max, mailbox, RowCodec(BYTES, spec.rows_per_key, spec.row_bytes, spec.dim))
        if spec.residues is None:
            raise ConfigError(
                f"table {spec.name}: its row ids do not give keys (the moduli of an order's {spec.rows_per_key} heads "
                f"share a factor, or multiply to less than 2^63): look its rows up from the host, by Table.rows"
            )
        self._spec = spec
        numbers = (spec.moduli, spec.offsets, *(part.tolist() for part in spec.residues))
        self._address_map = DeviceAddressMap(
            *(torch.tensor(each, dtype=torch.int64, device=self._device) for each in numbers)
        )
        self._keys = torch.empty((tokens_max, len(spec.orders)), dtype=torch.int64, device=self._device)
        self.strided_tokens_max = min(tokens_max, max(1, STAGING_BYTES_MAX // (spec.num_heads * spec.row_bytes)))
        self._staging = torch.empty(
            (self.strided_tokens_max, spec.num_heads, spec.row_bytes), dtype=torch.uint8, device=self._device
        )

    def check(self, row_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Raises `ValueError` unless the rows of row_ids, int64 [N, O * H], can go to out."""
        heads = self._spec.num_heads
        if row_ids.dtype != torch.int64 or row_ids.ndim != 2 or row_ids.shape[1] != heads:
            raise ValueError(
                f"table {self._spec.name}: row_ids are {row_ids.dtype} {list(row_ids.shape)}, expected torch.int64 "
                f"[any, {heads}]: all row ids of each token"
            )
        check_out(out, tuple(row_ids.shape), self._spec.row_bytes, self._device)

    def values_of(self, out: torch.Tensor) -> torch.Tensor:
        """Returns where the entries of out, uint8 [N, O * H, row_bytes], go at first, by pairs."""
        to = out if out.is_contiguous() else self._staging[: len(out)]
        return self.flat(len(out), to)

    def look_up_rows(self, row_ids: torch.Tensor, within: tuple[int, int], values: torch.Tensor) -> None:
        """As `look_up`. row_ids: int64 [N, O * H] of any strides; within: the wanted ones."""
        keys = self._keys[: len(row_ids)]
        wanted = None if self.asks_host else self._row_ids[: len(row_ids)]
        keys_of_row_ids(row_ids, self._address_map, within, keys, wanted)
        self._probe(keys, values)
        if wanted is None:
            list_row_ids(row_ids, within, keys, self._misses, self._mailbox.row_ids_address)
        else:  # also what has no key
            self._gather_by_id(wanted, values)
        self._post()

    def put(self, row_ids: torch.Tensor, within: tuple[int, int], out: torch.Tensor) -> None:
        """Moves rows to where they are wanted, zeros for those that are not: what comes behind the last entry."""
        put_rows(row_ids, within, None if out.is_contiguous() else self._staging[: len(out)], out)
