"""Sizes as people type them: `10G`, `512MiB`, `1.5 TB`, `4096`."""

import re
from fractions import Fraction

from stratocache.cache.errors import InvalidInput

SIZE_BYTES_MIN = 1024**2
SIZE_BYTES_MAX = 64 * 1024**4
SECTOR_BYTES = 512

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?)\s*(?:([KMGTP])(iB|B)?|B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def parse_size(text: str, *, field: str = "size") -> int:
    """Return the bytes that `text` means.

    `10G` and `10GiB` are binary (as in qemu-img and lvm), `10GB` is decimal (SI), a bare number is
    bytes. Raises `InvalidInput` with code `size-invalid` for anything else, and for a fraction that
    is not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidInput(
            "size-invalid",
            f"{text[:40]!r} is not a size; write for example 10G, 512MiB or 1048576.",
            field=field,
        )
    number, letter, suffix = match.groups()
    step = 1000 if (suffix or "").upper() == "B" else 1024
    size_bytes = Fraction(number) * step ** _POWERS[(letter or "").upper()]
    if size_bytes.denominator != 1:
        raise InvalidInput(
            "size-invalid", f"{text[:40]!r} is not a whole number of bytes.", field=field
        )
    return int(size_bytes)


def format_size(size_bytes: int) -> str:
    """Return a size for people, binary units, three digits at most: `1.5 GiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in _UNITS:
        value /= 1024
        if value < 1000 or unit == _UNITS[-1]:
            break
    return f"{value:.3g} {unit}"
