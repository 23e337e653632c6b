"""Safetensors files of several ranks, as torch.distributed.checkpoint writes them: some rows of every tensor in each.

Input: the text that such a file keeps about itself, and the tensors of all files. Output: whole tensors, made of row
ranges. Errors: `FormatError` for text that is not of this format; a tensor whose parts do not make up rows is known by
name, with the reason.

A header's `__metadata__` has DCP_SHARDING_INFO, JSON: for each tensor `saved_offsets`, where in the whole tensor its
part begins. No file says how many rows the whole has: a family's configuration does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import FormatError
from .stored_tensor import StoredTensor, stacked

INFO_KEY = "DCP_SHARDING_INFO"
Offsets = tuple[int, ...]


def saved_offsets(path: Path, metadata: Mapping[str, str]) -> dict[str, Offsets]:
    """Returns where each tensor's part begins, by the tensor's name; empty for a file that is no rank's."""
    text = metadata.get(INFO_KEY)
    if text is None:
        return {}
    try:
        found = {name: tuple(info["saved_offsets"]) for name, info in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: its {INFO_KEY} cannot be read ({error!r}); save or download it again") from error
    for name, offsets in found.items():
        if not all(type(offset) is int and 0 <= offset < 2**62 for offset in offsets):
            raise FormatError(f"{path}: saved_offsets of {name} are {str(offsets)[:80]}; save or download it again")
    return found


def put_together(
    parts: Mapping[str, Sequence[tuple[Offsets, StoredTensor]]],
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns whole tensors by name, and why others cannot be read; parts: of each tensor, with their offsets."""
    tensors: dict[str, StoredTensor] = {}
    unusable: dict[str, str] = {}
    for name, of_name in parts.items():
        try:
            tensors[name] = _whole(name, sorted(of_name, key=lambda part: part[0]))
        except FormatError as error:
            unusable[name] = str(error)
    return tensors, unusable


def one_ranks(path: Path) -> str:
    """Returns why a tensor of one rank's file alone cannot be read."""
    return f"lies in {path.name}, which has one rank's part of it; give the folder of all ranks' files: {path.parent}"


def _whole(name: str, parts: Sequence[tuple[Offsets, StoredTensor]]) -> StoredTensor:
    first, row = parts[0][1], 0
    for offsets, part in parts:
        shape = part.shape
        if len(offsets) != len(shape) or part.dtype != first.dtype or len(shape) != len(first.shape):
            raise FormatError(
                f"is {part.dtype} {list(shape)} at {list(offsets)} in {part.path.name} and {first.dtype} "
                f"{list(first.shape)} in {first.path.name}: they are of two saves; save the checkpoint again"
            )
        if any(offsets[1:]) or shape[1:] != first.shape[1:]:
            raise FormatError(
                f"is split by columns over ranks ({list(shape)} at {list(offsets)} in {part.path.name}), and a row "
                f"must lie in one piece; save it split by rows, Shard(0), or put its parts together: "
                f"torch.distributed.checkpoint's consolidate_safetensors_files"
            )
        if offsets and offsets[0] != row:
            raise FormatError(
                f"has its rows up to {row}, then a part from row {offsets[0]} on in {part.path.name}: a rank's file is "
                f"missing or there twice; copy all of them again"
            )
        row += shape[0] if shape else 0
    return stacked([part for _, part in parts if part.num_bytes], name, (row, *first.shape[1:]) if first.shape else ())
