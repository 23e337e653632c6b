"""Token maps: the published rules, held against a plain `unicodedata` version, and the real tokenizer's count."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_adapter import token_map
from engram_adapter.token_map import build_token_map, load_tokenizer
from tierstore.errors import ConfigError, FormatError

TEXTS = [
    "Apple apple APPLE  apple\tapple\n\nAPPLE, the Café and the CAFE and the café",
    "ﬁne Ⅷ ½ ｆｕｌｌ ÅNGSTRÖM ångström Straße STRASSE Ἀθῆναι ΟΔΟΣ οδος İstanbul",
    "漢字 かな カナ ﾊﾝｶｸ 한국어 العَرَبِيَّة नमस्ते 🙂🙃 naïve NAIVE",
    "def f(x):\r\n\treturn x\n\n    # four    spaces\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 256 bytes, what it merged of TEXTS, and added tokens that differ in case only."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<bos>", "<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.add_tokens(["Apple", "APPLE", " ", "  ", "\t", "Ã©lan", "ELAN"])  # byte-level writing of "élan"
    made.add_special_tokens([AddedToken("<BOS>", special=True), AddedToken("<image>", special=True)])
    return made


def key_of(tokenizer: Tokenizer, token_id: int) -> str:
    """What tokens must share to share an id, by the rules as published, in plain Python."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if "\ufffd" in text:
        return tokenizer.id_to_token(token_id)
    key = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    key = "".join(character for character in key if not unicodedata.category(character).startswith("M"))
    key = "".join(character.lower() for character in key)
    key = re.sub("[ \t\r\n]+", " ", key)
    key = " " if key == " " else key.strip()
    return key or text


def test_token_map_equals_the_published_rules_in_plain_python(tokenizer: Tokenizer) -> None:
    seen: dict[str, int] = {}
    expected = []
    for token_id in range(tokenizer.get_vocab_size()):
        key = key_of(tokenizer, token_id)
        seen.setdefault(key, len(seen))
        expected.append(seen[key])
    token_map = build_token_map(tokenizer)
    assert token_map.dtype == np.int32
    assert token_map.tolist() == expected
    assert len(seen) < len(expected) - 10, "the tokenizer must have tokens that share an id, or the test shows nothing"


@pytest.mark.parametrize(
    ("one", "other"), [("Apple", "APPLE"), (" ", "\t"), (" ", "  "), ("Ã©lan", "ELAN"), ("<bos>", "<BOS>")], ids=repr
)
def test_tokens_that_differ_in_case_accent_or_white_space_share_an_id(
    tokenizer: Tokenizer, one: str, other: str
) -> None:
    token_map = build_token_map(tokenizer)
    first, second = tokenizer.token_to_id(one), tokenizer.token_to_id(other)
    assert first != second
    assert token_map[first] == token_map[second]


def test_parts_of_characters_keep_an_id_each(tokenizer: Tokenizer) -> None:
    token_map = build_token_map(tokenizer)
    parts = [i for i in range(tokenizer.get_vocab_size()) if "\ufffd" in tokenizer.decode([i])]
    assert len(parts) > 100
    assert len(set(token_map[parts].tolist())) == len(parts)


def test_ids_are_dense_and_in_order_of_first_appearance(tokenizer: Tokenizer) -> None:
    token_map = build_token_map(tokenizer)
    _, first_places = np.unique(token_map, return_index=True)
    assert (np.diff(first_places) > 0).all()
    assert token_map[0] == 0
    assert set(token_map.tolist()) == set(range(token_map.max() + 1))


def test_tokenizer_file_folder_and_object_give_the_same_map(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = build_token_map(tokenizer)
    for source in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json", str(tmp_path / "tokenizer.json")):
        np.testing.assert_array_equal(build_token_map(source), expected)


def test_a_tokenizer_in_a_folder_whose_name_is_no_utf_8_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"model-\xff")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    np.testing.assert_array_equal(build_token_map(folder), build_token_map(tokenizer))


def test_a_tokenizer_that_may_not_be_read_is_named(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer\.json: Permission denied; make it readable"):
        build_token_map(tmp_path)


def test_a_missing_tokenizer_is_named_with_its_place(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"there is no .*download"):
            build_token_map(place)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"\xff\xfe\x00", b'{"model": {"type": "Nonsense"}}'], ids=repr
)
def test_a_broken_tokenizer_raises_a_named_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        build_token_map(tmp_path)


def test_every_truncation_of_a_tokenizer_raises_a_named_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = tokenizer.to_str().encode()
    for length in range(0, len(whole) - 1, len(whole) // 23):
        (tmp_path / "tokenizer.json").write_bytes(whole[:length])
        with pytest.raises(FormatError):
            build_token_map(tmp_path)


def test_a_vocabulary_with_a_gap_is_refused() -> None:
    gapped = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 3}, unk_token="a"))
    with pytest.raises(FormatError, match="no token 2"):
        build_token_map(gapped)


def test_what_is_no_tokenizer_raises_type_error() -> None:
    with pytest.raises(TypeError):
        build_token_map(7)  # type: ignore[arg-type]


def test_deepseek_v3_tokenizer_gives_99092_ids_of_129280(shared_data: Path) -> None:
    token_map = build_token_map(shared_data / "deepseek_v3_tokenizer.json")
    assert len(token_map) == 129_280
    assert len(np.unique(token_map)) == token_map.max() + 1 == 99_092
    assert token_map[0] == 0


class PanicException(BaseException):
    """Stands in for pyo3's, which is a BaseException that no `except Exception` catches."""


class PanickingTokenizer:
    """Stands in for the library: whatever it is asked, it raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def from_str(self, _: str) -> Tokenizer:
        raise self.error

    def get_vocab_size(self, **_: object) -> int:
        raise self.error


def test_a_tokenizer_that_the_library_panics_on_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    panicking = PanickingTokenizer(PanicException("index out of range"))
    monkeypatch.setattr(token_map, "Tokenizer", panicking)
    with pytest.raises(FormatError, match=r"tokenizer\.json, a tokenizer.*gave up \(index out of range\); download"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(token_map, "Tokenizer", PanickingTokenizer)
    with pytest.raises(FormatError, match=r"the tokenizer: .*gave up"):
        build_token_map(panicking)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr)
def test_an_interrupt_is_no_panic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(token_map, "Tokenizer", PanickingTokenizer(error))
    with pytest.raises(type(error)):
        load_tokenizer(tmp_path)
