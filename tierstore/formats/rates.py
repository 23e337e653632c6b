"""The learning rates of every step so far, by table, which DenseAdam replays for a row that comes back.

Input: float64 arrays: a replay multiplies with the very numbers that the steps had. Output: a file, whole and durable,
and its record; the arrays again. Errors: `FormatError` for a file that is not the catalog's.

The file: `TIERRATE`, format version (u32), bytes of JSON (u32), JSON: {table: number of rates}; then the rates of these
tables, float64, one after the other; last the SHA-256 of all before it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..causes import Fault, naming
from ..durable import replace_file
from ..errors import FormatError
from .run import REMEDY, TRAINING_FOLDER
from .training_records import RatesRecord

RATES_FORMAT_VERSION = 1
_MAGIC = b"TIERRATE"
_PREAMBLE = struct.Struct("<8sII")
_DIGEST_BYTES = 32


def rates_file(number: int) -> str:
    """Returns the path of a commit's rates, relative to the store."""
    return f"{TRAINING_FOLDER}/{number:08d}.rates"


def write_rates(store: Path, number: int, rates: Mapping[str, np.ndarray]) -> RatesRecord:
    """Writes the rates of commit `number`, float64 [steps] by table. Durable when it returns; blocks on the disk."""
    arrays = {table: np.ascontiguousarray(of, dtype="<f8") for table, of in rates.items()}
    body = json.dumps({table: len(of) for table, of in arrays.items()}).encode()
    data = b"".join(
        [_PREAMBLE.pack(_MAGIC, RATES_FORMAT_VERSION, len(body)), body, *(a.tobytes() for a in arrays.values())]
    )
    data += hashlib.sha256(data).digest()
    file = store / rates_file(number)
    with naming(file, file, writing=True, needed_bytes=len(data)):
        replace_file(file, data)
    return RatesRecord(rates_file(number), len(data), hashlib.sha256(data).hexdigest())


def read_rates(store: Path, record: RatesRecord) -> dict[str, np.ndarray]:
    """Reads a commit's rates, float64 [steps] by table. Blocks on the disk. Raises `FormatError`."""
    file = store / record.file
    with naming(file, file, fault=Fault(FormatError, REMEDY)):
        data = file.read_bytes()
    if len(data) != record.num_bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        raise FormatError(f"{file}: it is not the file that the catalog names, or is damaged; {REMEDY}")
    magic, version, body_bytes = _PREAMBLE.unpack_from(data)
    if magic != _MAGIC or version != RATES_FORMAT_VERSION:
        raise FormatError(f"{file}: rates format {version}, this tierstore reads {RATES_FORMAT_VERSION}; {REMEDY}")
    at = _PREAMBLE.size + body_bytes
    counts: dict[str, int] = json.loads(data[_PREAMBLE.size : at])
    rates = {}
    for table, count in counts.items():
        rates[table] = np.frombuffer(data, dtype="<f8", count=count, offset=at).astype(np.float64)
        at += 8 * count
    return rates
