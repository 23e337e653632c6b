"""The corpus is real text, the same every time, and tokens give the text back."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tierstore.tools.corpus import (
    DOCUMENTATION_FILES_MAX,
    FILE_BYTES_MAX,
    python_text_files,
    read_text,
    split_held_out,
    token_documents,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def files() -> list[Path]:
    return python_text_files()[:40]


def test_text_is_pythons_own_library_without_tests_and_installed_packages() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    found = python_text_files(documentation=())
    assert len(found) > 100
    assert len(set(found)) == len(found)
    assert library / "argparse.py" in found
    for file in found:
        assert file.suffix == ".py"
        assert not {"test", "tests", "site-packages", "dist-packages"} & set(file.relative_to(library).parts)


def test_the_same_files_come_in_the_same_order() -> None:
    assert python_text_files() == python_text_files()


def test_documentation_is_bounded_and_plain(tmp_path: Path) -> None:
    for index in range(DOCUMENTATION_FILES_MAX + 20):
        (tmp_path / f"{index:04}.txt").write_text("text")
    (tmp_path / "0000.gz").write_bytes(b"packed")
    (tmp_path / "copyright").write_text("the same for all packages")
    (tmp_path / "0000-link.txt").symlink_to("0001.txt")
    (tmp_path / "0000-empty.txt").touch()
    (tmp_path / "0000-large.txt").write_bytes(b" " * (FILE_BYTES_MAX + 1))
    found = [file for file in python_text_files(documentation=[tmp_path]) if tmp_path in file.parents]
    assert found == [tmp_path / f"{index:04}.txt" for index in range(DOCUMENTATION_FILES_MAX)]


def test_a_machine_without_documentation_gives_the_library_alone(tmp_path: Path) -> None:
    assert python_text_files(documentation=[tmp_path / "none"]) == python_text_files(documentation=())


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    assert read_text(tmp_path / "latin") == "f\ufffdr"


def test_training_twice_gives_the_same_tokenizer(files: list[Path]) -> None:
    first, second = train_tokenizer(files, 700), train_tokenizer(files, 700)
    assert first.to_str() == second.to_str()


def test_special_tokens_have_the_first_ids_and_the_vocabulary_its_size(files: list[Path]) -> None:
    tokenizer = train_tokenizer(files, 700)
    assert [tokenizer.id_to_token(i) for i in range(3)] == ["<bos>", "<eos>", "<pad>"]
    assert tokenizer.get_vocab_size() == 700


def test_training_reads_no_more_text_than_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abab" * 1000)
    (tmp_path / "b").write_text("abab" * 1000)
    assert train_tokenizer([tmp_path / "a"], 259).to_str() == train_tokenizer([tmp_path / "a"], 259, 10).to_str()
    by_half = train_tokenizer([tmp_path / "a", tmp_path / "b"], 300, text_bytes=4000)
    assert by_half.to_str() == train_tokenizer([tmp_path / "a"], 300).to_str()


def test_a_vocabulary_that_cannot_hold_every_byte_is_refused(files: list[Path]) -> None:
    with pytest.raises(ValueError, match="258 is below 259"):
        train_tokenizer(files, 258)


def test_documents_start_with_bos_and_decode_to_their_text(tmp_path: Path, files: list[Path]) -> None:
    texts = ["def f():\n\treturn 'é 中 \U0001f600'\n", " leading and trailing ", "x" * 3000]
    texts += [f"document {i}" for i in range(70)]  # more than one batch
    for index, text in enumerate(texts):
        (tmp_path / f"{index:03}").write_text(text)
    tokenizer = train_tokenizer(files, 700)
    documents = token_documents(tokenizer, sorted(tmp_path.iterdir()))
    assert len(documents) == len(texts)
    for document, text in zip(documents, texts, strict=True):
        assert document.dtype == np.int64
        assert document[0] == 0
        assert 0 not in document[1:]
        assert tokenizer.decode(document[1:].tolist()) == text


def test_every_tenth_document_is_held_out_whole() -> None:
    documents = [np.full(3, index) for index in range(25)]
    training, held_out = split_held_out(documents)
    assert [int(document[0]) for document in held_out] == [9, 19]
    assert [int(document[0]) for document in training] == [i for i in range(25) if i not in (9, 19)]
