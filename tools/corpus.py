"""Real text that is on any machine, and a tokenizer trained on it: for trials and demonstrations without a download.

Input: Python's own library and, where installed, documentation. Output: a byte-level BPE tokenizer and documents of
token ids. The same files give the same tokenizer and the same ids. Errors: `ValueError` for a vocabulary too small to
hold every byte.
"""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
SPECIAL_TOKENS = ["<bos>", "<eos>", "<pad>"]  # ids as above
VOCAB_SIZE_MIN = 256 + len(SPECIAL_TOKENS)
TRAINING_TEXT_BYTES = 3 << 20
DOCUMENTATION = (Path("/usr/share/common-licenses"), Path("/usr/share/doc"))
DOCUMENTATION_FILES_MAX = 500
DOCUMENTATION_SUFFIXES = {"", ".txt", ".md", ".rst"}
FILE_BYTES_MAX = 1 << 20
HELD_OUT_EVERY = 10
BATCH_DOCUMENTS = 64
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def python_text_files(documentation: Sequence[Path] = DOCUMENTATION) -> list[Path]:
    """Returns text files of this machine, sorted: the .py files of Python's standard library, then documentation.

    Without tests, installed packages, empty files and files over 1 MiB; at most 500 files of documentation (there may
    be none). Blocks on the disk.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _files_under(library) if file.suffix == ".py"]
    documents = (file for folder in documentation for file in _files_under(folder) if _is_documentation(file))
    return files + [file for file, _ in zip(documents, range(DOCUMENTATION_FILES_MAX), strict=False)]


def _files_under(folder: Path) -> Iterator[Path]:
    """Yields the readable files of a folder in sorted order, links left out: documentation links to itself."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            file = Path(parent, name)
            if not file.is_symlink() and os.access(file, os.R_OK) and 0 < file.stat().st_size <= FILE_BYTES_MAX:
                yield file


def _is_documentation(file: Path) -> bool:
    # "copyright" files of Debian packages repeat the same few licences thousands of times.
    return file.suffix in DOCUMENTATION_SUFFIXES and file.name != "copyright"


def read_text(file: Path) -> str:
    """Returns a file's text as UTF-8, invalid bytes replaced by U+FFFD."""
    return file.read_text(encoding="utf-8", errors="replace")


def train_tokenizer(files: Sequence[Path], vocab_size: int, text_bytes: int = TRAINING_TEXT_BYTES) -> Tokenizer:
    """Trains a byte-level BPE tokenizer with tokens <bos> 0, <eos> 1, <pad> 2. Takes a second or two.

    files: read in a fixed shuffled order up to `text_bytes` characters, so that every part of the corpus is
    represented. vocab_size: tokens wanted; less text than that needs gives fewer. Raises `ValueError` below 259 (every
    byte, and the special tokens).
    """
    if vocab_size < VOCAB_SIZE_MIN:
        raise ValueError(f"vocab_size {vocab_size} is below {VOCAB_SIZE_MIN}: 256 bytes and 3 special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(files, text_bytes), trainer)
    return tokenizer


def _training_texts(files: Sequence[Path], text_bytes: int) -> Iterator[str]:
    shuffled = sorted(files)
    random.Random(0).shuffle(shuffled)
    left = text_bytes
    for file in shuffled:
        text = read_text(file)[:left]
        left -= len(text)
        yield text
        if not left:
            return


def token_documents(tokenizer: Tokenizer, files: Sequence[Path]) -> list[np.ndarray]:
    """Returns each file as one document of token ids, int64 [tokens], that starts with BOS (0)."""
    documents = []
    for start in range(0, len(files), BATCH_DOCUMENTS):
        texts = [read_text(file) for file in files[start : start + BATCH_DOCUMENTS]]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            documents.append(np.array([BOS_ID, *encoding.ids], dtype=np.int64))
    return documents


def split_held_out(documents: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Splits whole documents into (for training, held out): every tenth is held out, the tenth first."""
    held_out = list(documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    return [document for index, document in enumerate(documents, 1) if index % HELD_OUT_EVERY], held_out
