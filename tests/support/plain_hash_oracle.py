"""The hashes of the families in plain Python integers, token by token: what `HashSpec` is held against.

Written from the published rules, with trial division for primes and one loop a predecessor; it shares no code with the
adapter. Only the draws of Engram's multipliers come from numpy, whose generator is part of the published rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np


@dataclass
class Numbers:
    """One layer's multipliers, moduli and offsets; one list a (order, head), orders outermost."""

    multipliers: list[int]
    moduli: list[int]
    offsets: list[int]


def smallest_divisor_is_itself(number: int) -> bool:
    return number > 1 and not any(number % divisor == 0 for divisor in range(2, isqrt(number) + 1))


def engram_numbers(
    layers: list[int], bases: list[int], heads: int, compressed: int, seed: int = 0
) -> dict[int, Numbers]:
    """Every run of heads starts at its base and takes primes, ascending, that no run of any layer took before."""
    used: list[int] = []
    numbers = {}
    for layer in layers:
        moduli: list[int] = []
        for base in bases:
            candidate = base
            for _ in range(heads):
                while candidate in used or not smallest_divisor_is_itself(candidate):
                    candidate += 1
                used.append(candidate)
                moduli.append(candidate)
        half = max(1, (2**63 - 1) // compressed // 2)
        draws = np.random.default_rng(seed + 10007 * layer).integers(0, half, size=len(bases) + 1, dtype=np.int64)
        numbers[layer] = Numbers([int(draw) * 2 + 1 for draw in draws], moduli, running_sums(moduli))
    return numbers


def qwen_numbers(
    layers: list[int], base: int, max_order: int, heads: int, vocab_size: int, seed: int
) -> dict[int, Numbers]:
    """Consecutive primes from the base on over all layers; multipliers from splitmix64."""
    numbers, candidate = {}, base
    for index, layer in enumerate(sorted(layers)):
        moduli: list[int] = []
        while len(moduli) < (max_order - 1) * heads:
            if smallest_divisor_is_itself(candidate):
                moduli.append(candidate)
            candidate += 1
        half = max(1, (2**63 - 1) // vocab_size // 2)
        multipliers = []
        for i in range(max_order):
            x = (seed + 10007 * index + 0x9E3779B97F4A7C15 * (i + 2)) % 2**64
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            multipliers.append((x ^ (x >> 31)) % half * 2 + 1)
        numbers[layer] = Numbers(multipliers, moduli, running_sums(moduli))
    return numbers


def longcat_numbers(vocab_size: int, rows: int, max_order: int, splits: int) -> Numbers:
    """Head i has rows + 2 i + 1 rows; a position's weight is the vocabulary's power, as far as the head looks back."""
    moduli = [rows + 2 * head + 1 for head in range((max_order - 1) * splits)]
    weights = []
    for head, modulus in enumerate(moduli):
        weights += [vocab_size**back % modulus if back < 2 + head // splits else 0 for back in range(max_order)]
    return Numbers(weights, moduli, running_sums(moduli))


def longcat_keys_of(
    tokens: list[int | None], moduli: list[int], vocab_size: int, splits: int, barrier: int
) -> list[list[int]]:
    """Each token's place in every head: the n-gram read as one number to the base of the vocabulary, newest id last.

    Nothing of a dead position, of what stands before one, before the sequence, or before an end of text is in it.
    """
    keys = []
    for position, token in enumerate(tokens):
        reach = 0
        while token is not None and position > reach and tokens[position - reach - 1] not in (None, barrier):
            reach += 1
        of_token = []
        for head, modulus in enumerate(moduli):
            first = position - min(reach, 1 + head // splits)
            number = 0
            for each in tokens[first : position + 1]:
                number = number * vocab_size + (each or 0)
            of_token.append(number % modulus)
        keys.append(of_token)
    return keys


def running_sums(moduli: list[int]) -> list[int]:
    return [sum(moduli[:i]) for i in range(len(moduli))]


def keys_of(tokens: list[int | None], multipliers: list[int], pad: int, barrier: int | None = None) -> list[list[int]]:
    """The keys of each token, one an order. `tokens` are mapped ids of the whole sequence, None at dead positions."""
    keys = []
    for position, token in enumerate(tokens):
        mixed = (pad if token is None else token) * multipliers[0]
        cut = token is None
        of_token = []
        for back in range(1, len(multipliers)):
            before = tokens[position - back] if position >= back else None
            cut = cut or before is None or before == barrier
            mixed ^= (pad if cut or before is None else before) * multipliers[back]
            of_token.append(mixed)
        keys.append(of_token)
    return keys


def row_ids_of(keys: list[list[int]], numbers: Numbers) -> list[list[int]]:
    """Row ids of each token: for each order its heads."""
    return [
        [
            of_token[head * len(of_token) // len(numbers.moduli)] % modulus + offset
            for head, (modulus, offset) in enumerate(zip(numbers.moduli, numbers.offsets, strict=True))
        ]
        for of_token in keys
    ]
