"""Primes and pseudo-random multipliers: the number theory that the published hashes are made of.

Input: bases and seeds from a checkpoint's configuration. Output: plain Python integers. Errors: none. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

INT64_MAX = 2**63 - 1
_MASK64 = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_WITNESSES = (
    2,
    3,
    5,
    7,
    11,
    13,
    17,
    19,
    23,
    29,
    31,
    37,
)  # decide every number below 3.3 * 10^24 (Sorenson, Webster 2015)


def is_prime(number: int) -> bool:
    """Says whether `number` is prime, exactly for every 64-bit number (Miller-Rabin with fixed witnesses)."""
    if number < 2:
        return False
    for witness in _WITNESSES:
        if number % witness == 0:
            return number == witness
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in _WITNESSES:
        power = pow(witness, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def primes_from(base: int) -> Iterator[int]:
    """Yields the primes >= base, ascending, without end."""
    number = base
    while True:
        if is_prime(number):
            yield number
        number += 1


def multiplier_bound(vocabulary: int) -> int:
    """Returns the exclusive bound of half-multipliers: id * (2 * half + 1) must stay below 2^63."""
    return max(1, INT64_MAX // max(vocabulary, 1) // 2)


def generator_multipliers(vocabulary: int, seed: int, count: int) -> tuple[int, ...]:
    """Returns odd multipliers as Engram draws them: numpy's default generator (PCG64) over
    [0, bound), doubled plus one."""
    halves = np.random.default_rng(seed).integers(0, multiplier_bound(vocabulary), size=count, dtype=np.int64)
    return tuple(2 * int(half) + 1 for half in halves)


def splitmix_multipliers(vocabulary: int, seed: int, count: int) -> tuple[int, ...]:
    """Returns odd multipliers as Qwen4-Exp draws them: splitmix64 of seed + gamma, seed + 2 * gamma, ..."""
    bound = multiplier_bound(vocabulary)
    return tuple(2 * (_splitmix64(seed + _GOLDEN_GAMMA * (i + 1)) % bound) + 1 for i in range(count))


def _splitmix64(state: int) -> int:
    """One output of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    mixed = (state + _GOLDEN_GAMMA) & _MASK64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK64
    return mixed ^ (mixed >> 31)
