"""Run as a program without TRITON_INTERPRET: compiles what makes keys and asks the host,
for a GPU that need not be here.

Prints a JSON object: the PTX of every kernel, in the order of launches.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from support.compile_natively import instead_of_launching

from tierstore.kernels.gpu.await_answer import await_answer
from tierstore.kernels.gpu.keys import DeviceHash, keys_of_tokens
from tierstore.kernels.gpu.misses import MissList, StepState, collect_misses, post_misses
from tierstore.kernels.gpu.polynomial_keys import DeviceSums, polynomial_keys_of_tokens
from tierstore.kernels.gpu.row_ids import row_ids_of_keys

MAILBOX = 0x7F00_0000_0000


def int64(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def ask() -> None:
    state = StepState(*(int64(1) for _ in range(5)), batch_counts=int64(2))
    collect_misses(int64(1, 2), int64(1, 2).to(torch.int32), MissList(state.count, MAILBOX + 192, MAILBOX + 256, 4), 1)
    post_misses(state, MAILBOX, 4)
    await_answer(state, MAILBOX, 1000)


def hash_tokens(sequences: int, tokens: int) -> None:
    dead = torch.zeros(sequences, tokens, dtype=torch.bool)
    out = int64(sequences, tokens, 3)
    for token_map in (None, torch.zeros(50, dtype=torch.int32)):
        spec = DeviceHash(token_map, 50, int64(4), (2, 3, 4), 1, -1)
        keys_of_tokens(int64(sequences, tokens), int64(sequences, 3), dead, spec, out, int64(1))
        keys_of_tokens(int64(sequences, tokens), None, None, spec, out, int64(1))
    sums = DeviceSums(50, int64(12, 4), int64(12), int64(12), -1)
    of_heads = int64(sequences, tokens, 12)
    polynomial_keys_of_tokens(int64(sequences, tokens), int64(sequences, 3), dead, sums, of_heads, int64(1))
    polynomial_keys_of_tokens(int64(sequences, tokens), None, None, sums, of_heads, int64(1))
    row_ids_of_keys(out.view(-1, 3), int64(24), int64(24), int64(sequences * tokens, 24))


def main() -> None:
    compiled: list[Any] = []
    instead_of_launching(compiled)
    ask()
    hash_tokens(1, 1)
    hash_tokens(64, 17)
    print(json.dumps([(kernel.name, kernel.asm["ptx"]) for kernel in compiled if kernel.asm["cubin"]]))


if __name__ == "__main__":
    main()
