"""X.500 names as text: the RFC 2253 form that Java's X500Principal writes, and a tolerant reader.

Java knows nine keywords; any other attribute, an e-mail address above all, is written as its object
identifier and the hexadecimal DER of its value (`1.2.840.113549.1.9.1=#1618…`). Names are compared
by what they mean, not by how they are written.
"""

import re
from collections.abc import Iterator
from typing import TypeAlias

from cryptography import x509

Names: TypeAlias = tuple[frozenset[tuple[str, str]], ...]
"""Relative names, most specific first; each a set of object identifier and value."""

_WRITTEN = {
    "2.5.4.3": "CN", "2.5.4.6": "C", "2.5.4.7": "L", "2.5.4.8": "ST", "2.5.4.9": "STREET",
    "2.5.4.10": "O", "2.5.4.11": "OU", "0.9.2342.19200300.100.1.25": "DC",
    "0.9.2342.19200300.100.1.1": "UID",
}  # fmt: skip
_READ = {keyword: oid for oid, keyword in _WRITTEN.items()} | {
    "S": "2.5.4.8", "SN": "2.5.4.4", "SURNAME": "2.5.4.4", "SERIALNUMBER": "2.5.4.5",
    "T": "2.5.4.12", "TITLE": "2.5.4.12", "GN": "2.5.4.42", "GIVENNAME": "2.5.4.42",
    "DNQ": "2.5.4.46", "DNQUALIFIER": "2.5.4.46", "E": "1.2.840.113549.1.9.1",
    "EMAIL": "1.2.840.113549.1.9.1", "EMAILADDRESS": "1.2.840.113549.1.9.1",
}  # fmt: skip
_STRING_TYPES = {
    0x0C: "utf-8", 0x12: "ascii", 0x13: "ascii", 0x14: "latin-1", 0x16: "ascii", 0x1A: "ascii",
    0x1C: "utf-32-be", 0x1E: "utf-16-be",
}  # fmt: skip
_OID = re.compile(r"[0-9]+(\.[0-9]+)+")
_ESCAPED = re.compile(r"(?:\\[0-9A-Fa-f]{2})+|\\(.)", re.DOTALL)


def parse(text: str) -> Names:
    """Read an RFC 2253 (or RFC 4514) name; raises `ValueError`."""
    return tuple(
        frozenset(_attribute(attribute) for attribute in _split(relative, "+"))
        for relative in _split(text, ",;")
    )


def of_certificate(name: x509.Name) -> Names:
    """Return a certificate's subject or issuer in the form that `parse` gives."""
    return tuple(
        frozenset((attribute.oid.dotted_string, _text(attribute.value)) for attribute in relative)
        for relative in reversed(name.rdns)
    )


def write(name: x509.Name) -> str:
    """Write a name as Java's X500Principal does."""
    return ",".join(
        "+".join(_write_attribute(attribute) for attribute in relative)
        for relative in reversed(name.rdns)
    )


def _split(text: str, separators: str) -> Iterator[str]:
    start = position = 0
    quoted = False
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == '"':
            quoted = not quoted
        elif text[position] in separators and not quoted:
            yield text[start:position]
            start = position + 1
        position += 1
    yield text[start:]


def _attribute(text: str) -> tuple[str, str]:
    keyword, equals, value = text.partition("=")
    keyword = keyword.strip().upper().removeprefix("OID.")
    oid = keyword if _OID.fullmatch(keyword) else _READ.get(keyword)
    if not equals or oid is None:
        raise ValueError(f"{text!r} is not an attribute of a distinguished name")
    value = value.lstrip(" ")
    if value.startswith("#"):
        return oid, _decode_string(bytes.fromhex(value[1:].rstrip(" ")))
    trimmed = value.rstrip(" ")
    if trimmed.endswith("\\") and trimmed != value:
        trimmed += " "
    if len(trimmed) >= 2 and trimmed[0] == trimmed[-1] == '"':
        trimmed = trimmed[1:-1]
    return oid, _ESCAPED.sub(_unescape, trimmed)


def _unescape(match: re.Match[str]) -> str:
    if match.group(1) is not None:
        return match.group(1)
    return bytes.fromhex(match.group().replace("\\", "")).decode()


def _decode_string(der: bytes) -> str:
    tag, content, rest = _element(der)
    if rest or tag not in _STRING_TYPES:
        raise ValueError("not the DER of one character string")
    return content.decode(_STRING_TYPES[tag])


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """Split DER into the first element's tag, its content, and what follows it."""
    if len(der) < 2:
        raise ValueError("truncated DER")
    length, start = der[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[2:start], "big")
    if len(der) < start + length:
        raise ValueError("truncated DER")
    return der[0], der[start : start + length], der[start + length :]


def _write_attribute(attribute: x509.NameAttribute[str | bytes]) -> str:
    oid = attribute.oid.dotted_string
    keyword = _WRITTEN.get(oid)
    if keyword is None:
        relative = x509.RelativeDistinguishedName([attribute])
        _, sequence, _ = _element(x509.Name([relative]).public_bytes())
        _, pair, _ = _element(_element(sequence)[1])
        return f"{oid}=#{_element(pair)[2].hex()}"
    value = re.sub(r'([,+"\\<>;])', r"\\\1", _text(attribute.value))
    if value.startswith(("#", " ")):
        value = "\\" + value
    if value.endswith(" ") and not value.endswith("\\ "):
        value = value[:-1] + "\\ "
    return f"{keyword}={value}"


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.hex()
