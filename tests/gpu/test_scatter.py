"""Late entries go where they were missed, and where they did not come, nothing looks like a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gpu_inputs import CODECS, LOST, decoded, native_block_of, patterns, poison_of, poisoned_out
from support.host_memory import address_of, host_bytes, wait_for_device

from tierstore.kernels import reference_gpu
from tierstore.kernels.gpu import launching, scatter
from tierstore.kernels.gpu.codecs import BYTES, RowCodec
from tierstore.kernels.gpu.misses import StepState

SMALL = CODECS["scaled-33x3"]


def state_of(device: torch.device, posted: int, step: int = 5, failed: int = 4) -> StepState:
    words = [torch.full((1,), word, dtype=torch.int64, device=device) for word in (0, step, step, posted, failed)]
    return StepState(*words, torch.zeros(2, dtype=torch.int64, device=device))


class Answer:
    """Pairs and entries in host memory, with room for pairs_max; what was not asked for lies behind, and is wrong."""

    def __init__(self, seed: int, codec: RowCodec, pairs: np.ndarray, pairs_max: int, tilt: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.codec, self.pairs_max = codec, pairs_max
        self.pairs = host_bytes(4 * pairs_max).view(np.int32)
        self.pairs[:] = 0
        self.pairs[: len(pairs)] = pairs
        self.entries = host_bytes(pairs_max * codec.entry_bytes + tilt)[tilt:].reshape(pairs_max, codec.entry_bytes)
        self.entries[:] = random.integers(0, 256, size=self.entries.shape, dtype=np.uint8)

    def scatter(self, state: StepState, num_pairs: int) -> np.ndarray:
        out = poisoned_out(num_pairs, self.codec, state.count.device)
        scatter.scatter_entries(
            state, address_of(self.pairs), address_of(self.entries), self.codec, self.pairs_max, out
        )
        wait_for_device(state.count.device)
        return patterns(out)

    def expected(self, num_late: int, num_pairs: int, *, failed: bool) -> np.ndarray:
        """Pair by pair, checked against the reference; without pairs outside."""
        out = poison_of(num_pairs, self.codec)
        reference = poison_of(num_pairs, self.codec).view(np.uint8 if self.codec.kind == BYTES else np.uint16)
        for late, pair in enumerate(self.pairs[:num_late].tolist()):
            if 0 <= pair < num_pairs:
                out[pair] = LOST[str(out.dtype)] if failed else decoded(self.entries[late : late + 1], self.codec)[0]
        late_pairs, late_entries = self.pairs[:num_late], self.entries[:num_late]
        reference_gpu.scatter_entries(late_pairs, late_entries, failed, self.codec, reference)
        if failed and self.codec.kind != BYTES:
            reference[reference == 0xFFFF] = 0x7FC0
        np.testing.assert_array_equal(out, reference.view(out.dtype))
        return out


def distinct(seed: int, count: int, num_pairs: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num_pairs)[:count].astype(np.int32)


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_late_entries_go_where_they_were_missed(device: torch.device, name: str, failed: bool) -> None:
    answer = Answer(1, CODECS[name], distinct(2, 13, 30), 30)
    out = answer.scatter(state_of(device, 13, failed=5 if failed else 4), 30)
    np.testing.assert_array_equal(out, answer.expected(13, 30, failed=failed))


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("posted", [0, 1, 255, 256, 257, 600])
def test_any_number_of_misses_is_brought(device: torch.device, posted: int, failed: bool) -> None:
    answer = Answer(3, SMALL, distinct(4, posted, 600), 600)
    out = answer.scatter(state_of(device, posted, failed=5 if failed else 4), 600)
    np.testing.assert_array_equal(out, answer.expected(posted, 600, failed=failed))


@pytest.mark.parametrize("programs_max", [1, 3, 256])
@pytest.mark.parametrize("native_pairs", [1, 4])
def test_the_sizes_that_a_gpu_runs_give_the_same(
    device: torch.device, native_pairs: int, programs_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "block_of", native_block_of)
    monkeypatch.setattr(scatter, "PAIRS_NATIVE", native_pairs)
    monkeypatch.setattr(scatter, "PROGRAMS_MAX", programs_max)
    for name in ("bytes-264x8", "scaled-264x8"):
        answer = Answer(5, CODECS[name], distinct(6, 11, 20), 16)
        np.testing.assert_array_equal(answer.scatter(state_of(device, 11), 20), answer.expected(11, 20, failed=False))


@pytest.mark.parametrize("tilt", [1, 2, 4, 8, 24])
def test_entries_may_lie_anywhere(device: torch.device, tilt: int) -> None:
    for name in ("bytes-264x8", "scaled-264x8"):
        answer = Answer(7, CODECS[name], distinct(8, 5, 9), 9, tilt)
        np.testing.assert_array_equal(answer.scatter(state_of(device, 5), 9), answer.expected(5, 9, failed=False))


@pytest.mark.parametrize("failed", [False, True])
def test_pairs_outside_the_output_are_not_written(device: torch.device, failed: bool) -> None:
    pairs = np.array([3, -1, 10, 2**31 - 1, -(2**31), 9, 11], dtype=np.int32)
    answer = Answer(9, SMALL, pairs, 8)
    out = answer.scatter(state_of(device, 7, failed=5 if failed else 4), 10)
    np.testing.assert_array_equal(out, answer.expected(7, 10, failed=failed))


def test_no_more_than_the_mailbox_holds_is_read(device: torch.device) -> None:
    answer = Answer(10, SMALL, distinct(11, 4, 9), 4)
    np.testing.assert_array_equal(answer.scatter(state_of(device, 2**40), 9), answer.expected(4, 9, failed=False))


def test_a_step_that_failed_before_does_not_damage_the_next(device: torch.device) -> None:
    answer = Answer(12, SMALL, distinct(13, 4, 9), 4)
    state = state_of(device, 4, step=7, failed=7)
    np.testing.assert_array_equal(answer.scatter(state, 9), answer.expected(4, 9, failed=True))
    state.step.add_(1)
    np.testing.assert_array_equal(answer.scatter(state, 9), answer.expected(4, 9, failed=False))


def test_outputs_and_addresses_that_do_not_fit_are_refused(device: torch.device) -> None:
    state, out = state_of(device, 0), poisoned_out(4, SMALL, device)
    for pairs_address, entries_address, pairs_max in ((0, 64, 4), (64, 0, 4), (66, 64, 4), (64, 64, -1)):
        with pytest.raises(ValueError, match="must be such memory"):
            scatter.scatter_entries(state, pairs_address, entries_address, SMALL, pairs_max, out)
    for bad in (out.view(torch.int16), out[:, :2], out[0]):
        with pytest.raises(ValueError, match="expected"):
            scatter.scatter_entries(state, 64, 64, SMALL, 4, bad)
