"""The Marketplace identifier: an image's SHA-1 written as 27 base-64 digits.

The SHA-1 is read as one big-endian number of 160 bits and written most significant digit first, so
two zero bits lead and the result differs from RFC 4648 base64url. An identifier names an image; its
integrity is the SHA-256 or SHA-512 of its entry.
"""

import re

from stratocache.cache.errors import InvalidInput

LENGTH = 27
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_VALUES = {digit: value for value, digit in enumerate(_ALPHABET)}
_SHA1_BITS = 160
_PATTERN = re.compile(r"[A-P][A-Za-z0-9_-]{26}")
_SHA1_PATTERN = re.compile(r"[0-9A-Fa-f]{40}")


def encode(sha1_hex: str) -> str:
    """Return the identifier of an image whose SHA-1 is given as 40 hexadecimal digits.

    Raises `InvalidInput` with code `sha1-invalid`.
    """
    if not _SHA1_PATTERN.fullmatch(sha1_hex):
        raise InvalidInput(
            "sha1-invalid", f"{sha1_hex[:60]!r} is not a SHA-1; give 40 hexadecimal digits."
        )
    number = int(sha1_hex, 16)
    return "".join(_ALPHABET[number >> 6 * place & 63] for place in reversed(range(LENGTH)))


def decode(identifier: str) -> str:
    """Return the SHA-1 that an identifier stands for, as 40 lower-case hexadecimal digits.

    Raises `InvalidInput` with code `identifier-invalid` for wrong lengths, characters, or a value
    of more than 160 bits.
    """
    if len(identifier) != LENGTH or any(digit not in _VALUES for digit in identifier):
        raise InvalidInput(
            "identifier-invalid",
            f"{identifier[:60]!r} is not an image identifier; give 27 characters of A-Z a-z 0-9 - _.",
        )
    number = 0
    for digit in identifier:
        number = number << 6 | _VALUES[digit]
    if number >> _SHA1_BITS:
        raise InvalidInput(
            "identifier-invalid",
            f"{identifier!r} is not an image identifier; its value exceeds 160 bits.",
        )
    return f"{number:040x}"


def is_identifier(text: str) -> bool:
    """Tell whether `text` is an identifier that some SHA-1 encodes to."""
    return _PATTERN.fullmatch(text) is not None
