"""Sizes as people type them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratocache.api.sizes import format_size, parse_size
from stratocache.cache.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("10G", 10 * 1024**3),
        ("10g", 10 * 1024**3),
        ("10GiB", 10 * 1024**3),
        ("10 gib", 10 * 1024**3),
        ("10GB", 10**10),
        ("512MiB", 512 * 1024**2),
        ("1.5K", 1536),
        ("1.5 TB", 1_500_000_000_000),
        ("2P", 2 * 1024**5),
        (" 7 ", 7),
    ],
)
def test_size_is_understood(text: str, size_bytes: int) -> None:
    """Letters and iB are binary, B is decimal, a bare number is bytes."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "G", "ten", "-1", "+1", "1e9", "0x10", "1,5G", "10X", "10iB", "1..5G", "1.5", "1.0001K",
     "\u0661G", "1" * 21, "1G1M", "nan", "inf", "1\n2"],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    """What is no size, or no whole number of bytes, is an error that names the field."""
    with pytest.raises(InvalidInput) as caught:
        parse_size(text, field="memory")

    assert caught.value.code == "size-invalid"
    assert caught.value.field == "memory"


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    """No text whatever does anything but give bytes or `InvalidInput`."""
    try:
        assert parse_size(text) >= 0
    except InvalidInput as error:
        assert error.code == "size-invalid"


@given(st.integers(min_value=0, max_value=2**66))
def test_formatted_size_is_near(size_bytes: int) -> None:
    """A size written for people reads back within half a percent."""
    value, unit = format_size(size_bytes).split(" ")
    factor = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}

    assert abs(float(value) * factor[unit] - size_bytes) <= 0.0051 * size_bytes


def test_sizes_are_written_short() -> None:
    """At most three digits and a unit."""
    assert format_size(0) == "0 B"
    assert format_size(1023) == "1023 B"
    assert format_size(1536) == "1.5 KiB"
    assert format_size(1000 * 1024) == "0.977 MiB"
    assert format_size(10 * 1024**3) == "10 GiB"
