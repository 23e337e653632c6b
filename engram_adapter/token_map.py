"""The token map: which tokens of a tokenizer count as one and the same when n-grams are hashed.

Input: a tokenizer.json. Output: an int32 array, token id -> compressed id. "Apple", " apple" and "APPLE" share an id.
Errors: `ConfigError` for a file that is missing, `FormatError` for one that is not a tokenizer.

Every multiplier of the hash depends on how many ids come out, so a map that is off by one makes every row a wrong one.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from tierstore import ConfigError, FormatError
from tierstore.causes import named, naming_panics

_LONE_SPACE = "\ue000"  # private use: stands in for a text that is one space, which stripping would empty
_UNDECODABLE = "\ufffd"


def build_token_map(tokenizer: str | os.PathLike[str] | Tokenizer) -> np.ndarray:
    """Returns the token map of a tokenizer: int32 [vocabulary], compressed ids in order of first appearance.

    tokenizer: a tokenizer.json, the folder that holds it, or a `tokenizers.Tokenizer`. Each token is decoded alone,
    special tokens kept, and normalised (NFKC, NFD, accents stripped, lowercase, white space folded and stripped);
    tokens whose bytes are not whole characters stand for themselves. The rules are those of the published Engram code
    (arXiv 2601.07372). Takes a second or two for 130,000 tokens. Raises `ConfigError` if there is no file,
    `FormatError` if it is not a tokenizer or its ids have gaps.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    normalise = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex("^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )
    with naming_panics("the tokenizer", "download the model's own tokenizer.json"):
        return _token_map(tokenizer, normalise)


def _token_map(tokenizer: Tokenizer, normalise: normalizers.Normalizer) -> np.ndarray:
    compressed: dict[str, int] = {}
    token_map = np.empty(tokenizer.get_vocab_size(with_added_tokens=True), dtype=np.int32)
    for token_id in range(len(token_map)):
        token = tokenizer.id_to_token(token_id)
        if token is None:
            raise FormatError(
                f"the tokenizer has {len(token_map)} tokens, but no token {token_id}: ids must run from 0 without "
                f"gaps; download the model's own tokenizer.json"
            )
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        key = token if _UNDECODABLE in text else normalise.normalize_str(text) or text
        token_map[token_id] = compressed.setdefault(key, len(compressed))
    return token_map


def checked_token_map(token_map: np.ndarray) -> np.ndarray:
    """Returns a read-only int32 copy of a token map, an integer array [vocabulary].

    Raises `TypeError` (no integers), `ValueError` (its ids are not 0, 1, ... without gaps: the multipliers are drawn
    for as many ids as there are, so a larger id's product would leave 63 bits).
    """
    given = np.asarray(token_map)
    if given.dtype.kind not in "iu":
        raise TypeError(f"token_map is {given.dtype}, expected int32")
    ids = np.unique(given)
    if given.ndim != 1 or not given.size or ids[0] != 0 or ids[-1] != len(ids) - 1:
        span = f", ids {ids[0]} to {ids[-1]}, {len(ids)} distinct" if given.size else ""
        raise ValueError(
            f"token_map is {list(given.shape)}{span}; ids must be 0, 1, ... without gaps: use build_token_map"
        )
    checked = given.astype(np.int32)
    checked.setflags(write=False)
    return checked


def load_tokenizer(tokenizer: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json, or of the folder that holds it. Raises as `build_token_map` does."""
    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"there is no {file}; give the model's tokenizer.json, or download it into the checkpoint")
    try:
        text = file.read_text(encoding="utf-8")  # the library's from_file refuses paths that are not UTF-8
        with naming_panics(f"{file}, a tokenizer", "download it again"):
            return Tokenizer.from_str(text)
    except FormatError:
        raise
    except OSError as error:
        raise named(error, f"cannot read {file}", file) from error
    except Exception as error:  # the library raises bare Exception for anything that it cannot read
        raise FormatError(
            f"{file} is not a tokenizer that the tokenizers library can read: {error}; download it again"
        ) from error
