"""Options that open and connect share: each is checked before anything is opened."""

from __future__ import annotations

import pytest

from tierstore.errors import ConfigError
from tierstore.store.options import DEFAULT_DEVICE, HbmOptions, check_options


@pytest.mark.parametrize(
    ("hbm", "device", "options"),
    [
        (None, None, None),
        ("4GiB", None, HbmOptions(4 << 30, DEFAULT_DEVICE)),
        (4096, "cuda:1", HbmOptions(4096, "cuda:1")),
    ],
)
def test_an_hbm_tier_is_what_its_options_ask_for(
    hbm: int | str | None, device: str | None, options: HbmOptions | None
) -> None:
    assert check_options("auto", hbm, device) == options


@pytest.mark.parametrize(
    ("io", "hbm", "device", "words"),
    [
        ("fast", None, None, "io: 'fast' is not one of auto, uring, mmap, pread"),
        ("auto", None, "cuda:0", "device='cuda:0' is for the hbm tier: pass hbm"),
        ("auto", "4 gigs", None, "hbm: '4 gigs'"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    io: str, hbm: int | str | None, device: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_options(io, hbm, device)
