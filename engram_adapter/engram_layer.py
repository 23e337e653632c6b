"""The Engram layer: rows of the tokens' n-grams, gated by the hidden states, as a term to add to every residual branch.

Input: hidden states [B, T, C, D], token ids [B, T], and any embedding module that turns token ids into rows. Output: a
tensor [B, T, C, D]. Errors: `ConfigError` for checkpoint tensors whose shapes contradict each other.

One layer covers DeepSeek-V4.1 (without convolution) and the published form (a short causal convolution on the gated
value). Shapes: B sequences, T tokens, C hyper-connection branches, D hidden size, E values a token gets from its rows.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from tierstore.errors import ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.tensor_files import StoredTensor

from .codecs import e8m0_to_float32
from .scales import SCALE_NAMES

GATE_FLOOR = 1e-6  # under the root of the gate, so that its slope stays finite at 0
_FLOAT_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


class EngramLayer(torch.nn.Module):
    """Projections, gate and optional short convolution over an embedding's rows; the rows get no gradient from a store.

    `embedding(token_ids, history, dead)` gives [B, T, heads, dim] with heads * dim = `features` (E). `wkv` projects E
    to C keys and, last, one shared value, each of D. `kernel_size` None means no convolution; otherwise `dilation` is
    the largest n-gram order. The new convolution starts at zero, so that the layer starts as the one without it.
    """

    def __init__(
        self,
        embedding: torch.nn.Module,
        features: int,
        hidden_size: int,
        hc_mult: int,
        *,
        kernel_size: int | None = None,
        dilation: int = 1,
        bias: bool = False,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(features, hidden_size, hc_mult, dilation, 1 if kernel_size is None else kernel_size) < 1:
            raise ValueError(
                f"features {features}, hidden_size {hidden_size}, hc_mult {hc_mult}, kernel_size {kernel_size}, "
                f"dilation {dilation}: each must be at least 1"
            )
        self.embedding = embedding
        self.features, self.hidden_size, self.hc_mult = features, hidden_size, hc_mult
        self.kernel_size, self.dilation, self.eps = kernel_size, dilation, eps
        self.wkv = torch.nn.Linear(features, hidden_size * (hc_mult + 1), bias=bias, dtype=dtype)
        self.q_weight = torch.nn.Parameter(torch.ones(hc_mult, hidden_size, dtype=dtype))
        self.k_weight = torch.nn.Parameter(torch.ones(hc_mult, hidden_size, dtype=dtype))
        if kernel_size is not None:
            self.conv_norm_weight = torch.nn.Parameter(torch.ones(hc_mult, hidden_size, dtype=dtype))
            self.conv_weight = torch.nn.Parameter(torch.zeros(hc_mult * hidden_size, 1, kernel_size, dtype=dtype))

    @property
    def conv_state_tokens(self) -> int:
        """How many tokens back the convolution looks: (kernel size - 1) * dilation, 0 without a convolution."""
        return 0 if self.kernel_size is None else (self.kernel_size - 1) * self.dilation

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_ids: torch.Tensor,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns what to add to `hidden_states`, [B, T, C, D], for whole sequences; `step` decodes in parts."""
        return self.step(hidden_states, token_ids, history, dead)[0]

    def step(
        self,
        hidden_states: torch.Tensor,
        token_ids: torch.Tensor,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        conv_state: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what to add to `hidden_states`, and the convolution's state for the tokens that follow.

        `hidden_states`: floats [B, T, C, D]; `token_ids`: integers [B, T]; `history`: the tokens before, any number,
        for the n-grams that reach back: decoding needs it, beside `conv_state`; `dead`: bool [B, T]. `conv_state`:
        what the step before returned, [B, C * D, conv_state_tokens]; None at the start of the sequences, and always
        None without a convolution. Blocks on the embedding. Raises `ValueError` if shapes disagree, and what the
        embedding raises.
        """
        batch, tokens = token_ids.shape
        if hidden_states.shape != (batch, tokens, self.hc_mult, self.hidden_size):
            raise ValueError(
                f"hidden_states of shape {list(hidden_states.shape)} for token_ids of shape [{batch}, {tokens}]: "
                f"must be [{batch}, {tokens}, {self.hc_mult}, {self.hidden_size}]"
            )
        gated = self._gated_value(hidden_states, self.embedding(token_ids, history, dead))
        if self.kernel_size is None:
            if conv_state is not None:
                raise ValueError("a conv_state was passed, but this layer has no convolution; pass None")
            return gated, None
        added, conv_state = self._short_conv(gated, conv_state)
        return gated + added, conv_state

    def _gated_value(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Returns sigmoid(sign(d) sqrt(max(|d|, floor))) * value, with d = <norm(key), norm(query)> / sqrt(D)."""
        projected = self.wkv(rows.flatten(-2).to(self.wkv.weight.dtype))
        keys, value = projected.split([self.hc_mult * self.hidden_size, self.hidden_size], dim=-1)
        keys = _rms_norm(keys.unflatten(-1, (self.hc_mult, self.hidden_size)), self.k_weight, self.eps)
        queries = _rms_norm(hidden_states, self.q_weight, self.eps)
        agreement = (keys * queries).sum(dim=-1, keepdim=True) / math.sqrt(self.hidden_size)
        gate = torch.sigmoid(agreement.sign() * agreement.abs().clamp_min(GATE_FLOOR).sqrt())
        return (gate * value.unsqueeze(-2).float()).to(hidden_states.dtype)

    def _short_conv(self, gated: torch.Tensor, conv_state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns SiLU of a causal depthwise convolution over the normalised gated value, and the state after it."""
        batch, tokens, _, _ = gated.shape
        normed = _rms_norm(gated, self.conv_norm_weight, self.eps).to(self.conv_weight.dtype)
        channels = normed.flatten(-2).transpose(1, 2)
        state_shape = (batch, self.hc_mult * self.hidden_size, self.conv_state_tokens)
        if conv_state is None:
            conv_state = channels.new_zeros(state_shape)
        if conv_state.shape != state_shape:
            raise ValueError(f"conv_state of shape {list(conv_state.shape)}: must be {list(state_shape)}")
        if tokens == 0:  # shorter than the convolution's window, which torch refuses
            return torch.zeros_like(gated), conv_state.detach().clone()
        seen = torch.cat([conv_state, channels], dim=-1)
        mixed = F.conv1d(seen, self.conv_weight, dilation=self.dilation, groups=seen.shape[1])
        # A copy of the tail: a view would keep the activations of the whole part alive between steps.
        new_state = seen[..., tokens:].detach().clone()
        added = F.silu(mixed).transpose(1, 2).unflatten(-1, (self.hc_mult, self.hidden_size))
        return added.to(gated.dtype), new_state

    @classmethod
    def from_checkpoint(
        cls, folder: str | os.PathLike[str], layer: int, embedding: torch.nn.Module, *, eps: float = 1e-6
    ) -> EngramLayer:
        """Returns the layer that a checkpoint of DeepSeek-V4.1's layout holds, its projections in bfloat16.

        Reads wkv (fp8 with block scales, or plain), q_weight and k_weight.

        `layer`: 0-based module index; a prefix such as `model.` may stand before the tensors' names. Blocks on the
        disk. Raises `ConfigError` if a tensor is missing or of another shape, `FormatError` if a file is
        damaged.
        """
        checkpoint = Checkpoint.open(folder)
        prefix = _prefix(checkpoint, f"layers.{layer}.engram.wkv.weight")
        weight = _decoded_matrix(checkpoint, f"{prefix}layers.{layer}.engram.wkv")
        norms = {}
        for name in ("q_weight", "k_weight"):
            tensor = checkpoint.tensor(f"{prefix}layers.{layer}.engram.{name}", ("BF16", "F32", "F16"), 2)
            norms[name] = _as_tensor(tensor).to(torch.bfloat16)
        hc_mult, hidden_size = norms["q_weight"].shape
        if norms["k_weight"].shape != (hc_mult, hidden_size) or len(weight) != (hc_mult + 1) * hidden_size:
            raise ConfigError(
                f"{folder}: layer {layer} has q_weight {list(norms['q_weight'].shape)}, k_weight "
                f"{list(norms['k_weight'].shape)} "
                f"and a wkv of {len(weight)} outputs, expected {hc_mult + 1} x {hidden_size}; the files are of "
                f"different checkpoints"
            )
        made = cls(embedding, weight.shape[1], hidden_size, hc_mult, eps=eps, dtype=torch.bfloat16)
        with torch.no_grad():
            made.wkv.weight.copy_(weight)
            made.q_weight.copy_(norms["q_weight"])
            made.k_weight.copy_(norms["k_weight"])
        return made


def _rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis with a weight for each branch and channel, in float32."""
    values = values.float()
    return values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def _prefix(checkpoint: Checkpoint, suffix: str) -> str:
    """Returns what stands before `suffix` in the one tensor name that ends with it."""
    found = [name for name in checkpoint.tensors if name == suffix or name.endswith("." + suffix)]
    if len(found) != 1:
        raise ConfigError(
            f"{checkpoint.path}: {len(found)} tensors are named {suffix}, expected one; this layer has no Engram, or "
            f"a file is missing"
        )
    return found[0][: -len(suffix)]


def _decoded_matrix(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Reads `name`.weight, times its `name`.scale if there is one, as bfloat16 [outputs, inputs], rounded once."""
    stored = checkpoint.tensor(f"{name}.weight", tuple(_FLOAT_DTYPES), 2)
    weight = _as_tensor(stored)
    scales = [f"{name}.{scale}" for scale in SCALE_NAMES if f"{name}.{scale}" in checkpoint.names]
    if not scales:
        if stored.dtype == "F8_E4M3":
            raise ConfigError(f"{checkpoint.path}: {name}.weight is F8_E4M3 without {name}.scale; a file is missing")
        return weight.to(torch.bfloat16)
    stored_scale = checkpoint.tensor(scales[0], ("F8_E8M0", "U8", "F32", "BF16"), 2)
    scale = _as_tensor(stored_scale).float()
    for axis in (0, 1):
        block = scale_block(stored.shape[axis], stored_scale.shape[axis], f"axis {axis} of {scales[0]}")
        scale = scale.repeat_interleave(block, dim=axis).narrow(axis, 0, stored.shape[axis])
    return weight.float().mul_(scale).to(torch.bfloat16)


def scale_block(size: int, num_scales: int, what: str) -> int:
    """Returns how many of `size` elements share one of `num_scales` scales: a power of two; the last may be short.

    Powers of two are what formats use (32, 128), and they make the answer unique: 130 elements with 2 scales are blocks
    of 128 and 2, where dividing would give 65 and 65. Raises `ConfigError`, naming `what`, if no such block fits.
    """
    if 0 < num_scales <= size:
        block = 1 << (math.ceil(size / num_scales) - 1).bit_length()
        if math.ceil(size / block) == num_scales:
            return block
    raise ConfigError(
        f"{what}: {num_scales} scales for {size} elements is not a division into blocks of a power of two; "
        f"weight and scale are of different checkpoints"
    )


def _as_tensor(stored: StoredTensor) -> torch.Tensor:
    """Reads a float tensor; e8m0 (and uint8, as which older tools write it) comes out as float32."""
    data = torch.from_numpy(np.frombuffer(bytearray(stored.read_bytes()), dtype=np.uint8)).reshape(-1)
    if stored.dtype in _FLOAT_DTYPES:
        return data.view(_FLOAT_DTYPES[stored.dtype]).reshape(stored.shape)
    return e8m0_to_float32(data).reshape(stored.shape)
