"""Every kernel of kernels/gpu against its NumPy reference, on fresh random inputs, bit by bit; outputs are poisoned
before.

Input: a device, a generator, how many tokens. Output: nothing, or a `CheckError` that says what was wrong, and where.
One function a kernel, in CHECKS. Nothing is timed: these come before anything is.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from tierstore.kernels import reference, reference_gpu, reference_mailbox
from tierstore.kernels.gpu import await_answer, gather, lookup, misses, probe, rows, scatter
from tierstore.kernels.gpu import keys as token_keys
from tierstore.kernels.gpu import row_ids as key_rows
from tierstore.kernels.gpu.codecs import BYTES, FP8, FP8_SCALED, RowCodec
from tierstore.spec import KEY_MAX

from .tables import (
    KEYS_A_FULL_BUCKET,
    NUM_ORDERS,
    CheckError,
    RandomTable,
    StepMemory,
    check_same,
    patterns,
    poisoned,
    wait_for,
)

SIZES = (1, 2, 85, 86, 171, 8192)  # tokens: programs that are not full, and as many as fill a GPU
SIZES_INTERPRETED = (1, 2, 19)
SHORT_SPINS = 50  # looks at an answer that never comes
VOCAB = 1000
CODECS = (
    RowCodec(BYTES, 8, 264, 0),
    RowCodec(FP8_SCALED, 8, 264, 256),
    RowCodec(BYTES, 3, 33, 0),
    RowCodec(FP8, 4, 24, 24, 0.37),
)


def table_of(device: torch.device, random: np.random.Generator, codec: RowCodec, num_tokens: int) -> RandomTable:
    """A table of several times the entries that a batch asks for."""
    return RandomTable(device, random, codec, 4 * num_tokens + 3, 2 * num_tokens + 1, KEYS_A_FULL_BUCKET)


def check_keys(device: torch.device, random: np.random.Generator, num_tokens: int) -> None:
    for shape in {(1, num_tokens), (num_tokens, 1), (-(-num_tokens // 17), 17)}:
        for orders, with_map, past in (((2, 3, 4), True, 3), ((1, 5), False, 0)):
            _check_keys(device, random, shape, orders, with_map, past)


def _check_keys(
    device: torch.device,
    random: np.random.Generator,
    shape: tuple[int, int],
    orders: tuple[int, ...],
    with_map: bool,
    past: int,
) -> None:
    token_map = random.integers(0, 600, VOCAB, dtype=np.int32) if with_map else None
    multipliers = random.integers(1, KEY_MAX // VOCAB, orders[-1])
    ids, dead = random.integers(0, VOCAB, shape), random.random(shape) < 0.1
    history = random.integers(-1, VOCAB, (shape[0], past)) if past else None
    expected = np.empty((*shape, len(orders)), dtype=np.int64)
    reference.keys_of_tokens(
        ids, history, dead, token_map, VOCAB, multipliers, np.array(orders), 7, 9, expected
    )  # fmt: skip
    dead[-1, -1] = False  # the last token is not in the vocabulary: it has no keys, and its position is reported
    ids[-1, -1], expected[-1, -1] = VOCAB, -2
    tensors = [
        None if each is None else torch.from_numpy(each).to(device)
        for each in (ids, history, dead, token_map, multipliers)
    ]
    there, before, no_text, map_there, multipliers_there = tensors
    assert there is not None
    assert multipliers_there is not None
    spec = token_keys.DeviceHash(map_there, VOCAB, multipliers_there, orders, 7, 9)
    out = torch.full(expected.shape, -77, dtype=torch.int64, device=device)
    outside = torch.zeros(1, dtype=torch.int64, device=device)
    token_keys.keys_of_tokens(there, before, no_text, spec, out, outside)
    check_same(f"keys of {list(shape)} tokens", out.cpu(), expected)
    check_same("the place of an id outside the vocabulary", outside.cpu(), [shape[0] * (past + shape[1])])


def check_row_ids(device: torch.device, random: np.random.Generator, num_tokens: int) -> None:
    keys = random.integers(-1, KEY_MAX, (num_tokens, NUM_ORDERS), endpoint=True)
    keys[random.random(keys.shape) < 0.1] = -1
    moduli, offsets = random.integers(1, 2**31, NUM_ORDERS * 8), random.integers(0, 2**40, NUM_ORDERS * 8)
    expected = np.empty((keys.size, 8), dtype=np.int64)
    reference.row_ids_of_keys(keys.reshape(-1), None, moduli, offsets, expected)
    out = torch.full((num_tokens, NUM_ORDERS * 8), -77, dtype=torch.int64, device=device)
    there, moduli_there, offsets_there = (torch.from_numpy(each).to(device) for each in (keys, moduli, offsets))
    key_rows.row_ids_of_keys(there, moduli_there, offsets_there, out)
    check_same("row ids", out.cpu(), expected.reshape(out.shape))


def _places(table: RandomTable, keys: np.ndarray) -> np.ndarray:
    return reference_gpu.find_entries(table.epoch, table.heads, table.buckets, keys)


def check_find(device: torch.device, random: np.random.Generator, num_tokens: int) -> None:
    with table_of(device, random, CODECS[2], num_tokens) as table:
        keys = table.mixed(num_tokens)
        places = torch.full(keys.shape, -77, dtype=torch.int32, device=device)
        probe.find_entries(table.index, torch.from_numpy(keys).to(device), places)
        check_same("places", places.cpu(), _places(table, keys))


def check_gather(device: torch.device, random: np.random.Generator, num_tokens: int) -> None:
    for codec in CODECS:
        with table_of(device, random, codec, num_tokens) as table:
            keys = table.mixed(num_tokens)
            places, out = _places(table, keys), poisoned(keys.size, codec, device)
            expected = patterns(out).copy()
            places_there, keys_there = torch.from_numpy(places).to(device), torch.from_numpy(keys).to(device)
            gather.gather_entries(places_there, keys_there, table.sources, codec, out)
            reference_gpu.gather_entries(places, keys, table.slots.cpu().numpy(), table.records, codec, expected)
            check_same(f"entries, {codec.kind} of {codec.row_bytes} bytes", patterns(out), expected)


def check_lookup(device: torch.device, random: np.random.Generator, num_tokens: int) -> None:
    for codec in CODECS:
        with table_of(device, random, codec, num_tokens) as table, StepMemory(device, NUM_ORDERS * num_tokens) as step:
            keys = table.mixed(num_tokens)
            out = poisoned(keys.size, codec, device)
            expected, counted = patterns(out).copy(), np.full(3 * NUM_ORDERS + 1, 1000)
            counts = torch.from_numpy(counted.copy()).to(device)
            places = torch.full(keys.shape, -77, dtype=torch.int32, device=device)
            there = torch.from_numpy(keys).to(device)
            lookup.lookup_entries(there, table.index, table.sources, codec, out, step.misses, counts, places)
            found = _places(table, keys)
            slots = table.slots.cpu().numpy()
            missed = reference_gpu.lookup_entries(keys, found, slots, table.records, codec, expected, counted)
            check_same(f"entries, {codec.kind} of {codec.row_bytes} bytes", patterns(out), expected)
            check_same("counts", counts.cpu(), counted)
            check_same("places", places.cpu(), np.where(found < table.num_places, found, -1))
            pairs, missed_keys = step.listed()
            check_same("misses", pairs, missed)
            check_same("keys of misses", missed_keys, keys.reshape(-1)[missed])


def check_collect(device: torch.device, random: np.random.Generator, num_tokens: int) -> None:
    keys = random.integers(-1, 50, (num_tokens, NUM_ORDERS))
    places = random.integers(-2, 20, keys.shape, dtype=np.int32)
    with StepMemory(device, keys.size) as step:
        misses.collect_misses(torch.from_numpy(keys).to(device), torch.from_numpy(places).to(device), step.misses, 15)
        expected_keys, expected_pairs = reference_mailbox.collect_misses(keys, places, 15)
        pairs, missed = step.listed()
        check_same("misses", pairs, expected_pairs)
        check_same("keys of misses", missed, expected_keys)


def check_steps(device: torch.device, random: np.random.Generator, num_tokens: int) -> None:
    """Posts and waits of several steps: without misses, with an answer, with a bad one, and with none."""
    model, words = reference_mailbox.Step(), np.zeros(24, dtype=np.int64)
    more = int(random.integers(1, 100))
    counts = {
        "none asked": 0,
        "there": 1,
        "bad": num_tokens,
        "never": 1 + more,
        "there, of too many": num_tokens + more,
    }
    with StepMemory(device, num_tokens) as step:
        for answer, count in counts.items():
            step.state.count.fill_(count)
            model.count = count
            misses.post_misses(step.state, step.address, num_tokens)
            reference_mailbox.post_misses(model, words, num_tokens)
            wait_for(device)
            check_same("the mailbox after a post", step.words, words)
            if answer not in ("none asked", "never"):
                for mailbox in (step.words, words):
                    mailbox[9], mailbox[8] = answer == "bad", mailbox[0]
            await_answer.await_answer(step.state, step.address, SHORT_SPINS)
            reference_mailbox.await_answer(model, words)
            wait_for(device)
            check_same(f"the mailbox after a wait, answer {answer}", step.words, words)
            state = [int(getattr(step.state, name)) for name in ("count", "step", "ready", "posted", "failed")]
            check_same(
                "the step's words", [*state, *step.state.batch_counts.tolist()], list(dataclasses.astuple(model))
            )


def check_scatter(device: torch.device, random: np.random.Generator, num_tokens: int) -> None:
    num_pairs = NUM_ORDERS * num_tokens
    num_late = -(-num_pairs // 2)
    for codec in CODECS:
        for failed in (False, True):
            late = RandomTable(device, random, codec, 1, num_late)
            with late, StepMemory(device, num_late) as step:
                step.pairs[:num_late] = random.permutation(num_pairs)[:num_late]
                late.records.reshape(-1)[:] = random.integers(0, 256, late.records.size, dtype=np.uint8)
                entries = late.records.reshape(-1)[: num_late * codec.entry_bytes]
                step.state.step.fill_(5)
                step.state.failed.fill_(5 if failed else 4)
                step.state.posted.fill_(num_late)
                out = poisoned(num_pairs, codec, device)
                expected = patterns(out).copy()
                scatter.scatter_entries(step.state, step.pairs.ctypes.data, entries.ctypes.data, codec, num_late, out)
                pairs = step.pairs[:num_late]
                reference_gpu.scatter_entries(pairs, entries.reshape(num_late, -1), failed, codec, expected)
                check_same(
                    f"late entries, {codec.kind} of {codec.row_bytes} bytes, failed: {failed}", patterns(out), expected
                )


def check_rows(device: torch.device, random: np.random.Generator, num_tokens: int) -> None:
    for codec in CODECS:
        with table_of(device, random, codec, num_tokens) as table:
            num_ids = num_tokens * NUM_ORDERS * codec.rows_per_entry
            in_host = table.records.reshape(-1)[: table.records.size // codec.row_bytes * codec.row_bytes]
            in_host = in_host.reshape(-1, codec.row_bytes)
            on_device = table.slots.view(-1)[: table.slots.numel() // codec.row_bytes * codec.row_bytes].view(
                -1, codec.row_bytes
            )
            for where in (on_device, in_host):
                row_ids = random.integers(-2, len(where) + 2, num_ids)
                places = random.integers(-1, 3, (num_tokens, NUM_ORDERS), dtype=np.int32)
                out = poisoned(num_ids, dataclasses.replace(codec, rows_per_entry=1), device).view(num_ids, -1)
                expected = patterns(out).copy()
                given = where if isinstance(where, torch.Tensor) else where.ctypes.data
                there = torch.from_numpy(row_ids).to(device)
                rows.gather_rows(there, given, len(where), codec, out, torch.from_numpy(places).to(device), 2)
                held = where.cpu().numpy() if isinstance(where, torch.Tensor) else where
                reference_gpu.gather_rows(row_ids, held, codec, expected, places, 2)
                check_same(f"rows, {codec.kind} of {codec.row_bytes} bytes", patterns(out), expected)


CHECKS = {
    "keys_of_tokens": check_keys,
    "row_ids_of_keys": check_row_ids,
    "find_entries": check_find,
    "gather_entries": check_gather,
    "lookup_entries": check_lookup,
    "collect_misses": check_collect,
    "post_misses and await_answer": check_steps,
    "scatter_entries": check_scatter,
    "gather_rows": check_rows,
}


def failure_of(name: str, device: torch.device, seed: int, num_tokens: int) -> str | None:
    """Runs a check; returns what was wrong, None where nothing was. Whatever a launch raises is wrong too."""
    random = np.random.default_rng([seed, num_tokens, *name.encode()])
    try:
        CHECKS[name](device, random, num_tokens)
        wait_for(device)
    except CheckError as error:
        return str(error)
    except Exception as error:  # of the launch, of the compiler, of the device
        return f"{type(error).__name__}: {error}"
    return None
