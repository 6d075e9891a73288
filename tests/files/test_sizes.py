"""Promises of sizes: what people write is read as they mean it, and anything else is none."""

from __future__ import annotations

import pytest

from loraloom.files import sizes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0", 0),
        ("1234", 1234),
        ("17 B", 17),
        ("20GiB", 20 * 2**30),
        ("500 MB", 500 * 10**6),
        (" 1.5kib ", 1536),
        ("2tb", 2 * 10**12),
    ],
)
def test_a_size_is_bytes_with_or_without_a_unit(text: str, wanted: int) -> None:
    assert sizes.read(text) == wanted


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "8 gigs", "1.GiB", "8GiB more"])
def test_what_is_no_size_gives_none(text: str) -> None:
    assert sizes.read(text) is None
