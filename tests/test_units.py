"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from tierstore import ConfigError
from tierstore.units import count_text, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GiB", 2**31),
        ("1.5 GiB", 3 * 2**29),
        ("512mib", 2**29),
        ("10", 10),
        (7, 7),
        ("0", 0),
        ("1KB", 1000),
        ("0.5KiB", 512),
    ],
)
def test_sizes_are_read(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text, "dram") == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1 GiB 2", "-1", "1.5", "0.3KiB", "1e9", "2GG", None, 2.0, True, -3])
def test_what_is_no_size_is_refused_by_the_name_of_its_option(text: object) -> None:
    with pytest.raises(ConfigError, match="dram"):
        parse_bytes(text, "dram")


@pytest.mark.parametrize(("bits", "size"), [("8Mb", "8MB"), ("2Gib", "2GiB"), ("1.5 KIb", "1.5KIB")])
def test_a_size_in_bits_is_refused_with_the_size_in_bytes_to_write(bits: str, size: str) -> None:
    with pytest.raises(ConfigError, match=f"dram: '{bits}' reads as bits; for bytes write '{size}'"):
        parse_bytes(bits, "dram")
    assert parse_bytes(size, "dram") > 0


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**31, "2.00 GiB"), (2**41, "2.00 TiB")]
)
def test_sizes_are_written_in_the_largest_whole_unit(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_a_count_names_one_thing_in_the_singular() -> None:
    counts = [(0, "shard"), (1, "shard"), (2, "shard"), (4096, "placed entry"), (1, "placed entry"), (3, "key")]
    said = [count_text(count, noun) for count, noun in counts]
    assert said == ["0 shards", "1 shard", "2 shards", "4,096 placed entries", "1 placed entry", "3 keys"]
