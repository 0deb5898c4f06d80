"""Header fields of content: what a sender says it sends, and which part a reader wants.

Sources: RFC 9110 sections 12.5.1, 13.1.5 and 14 (Accept, If-Range, Range, Content-Range), RFC 9530
(Content-Digest, Repr-Digest).
"""

import base64
import binascii
import re

import falcon
from falcon import mediatypes

from stratocache.api.problem import HttpProblem
from stratocache.cache.errors import InvalidInput
from stratocache.fs.content_upload import ContentFormat, Part

MEDIA_TYPES: dict[ContentFormat, str] = {
    "raw": "application/octet-stream",
    "qcow2": "application/x-qcow2",
}

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})", re.IGNORECASE)
_RANGES = re.compile(r"bytes\s*=[\s\d,-]*,[\s\d,-]*", re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19})")
_NUMBER = re.compile(r"\d{1,19}")
_DIGEST = re.compile(r"\s*([a-z0-9-]{1,20})=:([A-Za-z0-9+/=]{4,128}):\s*")
_ALGORITHMS = {"sha-256": ("sha256", 32), "sha-512": ("sha512", 64)}
_SOURCE = re.compile(r"[A-Za-z0-9._-]{0,128}")


def wanted_format(request: falcon.Request) -> ContentFormat:
    """Return the format that `Accept` prefers, raw when it does not care.

    Raises `HttpProblem` 406 (`format-not-acceptable`).
    """
    raw, qcow2 = (mediatypes.quality(name, request.accept) for name in MEDIA_TYPES.values())
    if raw == qcow2 == 0:
        names = " or ".join(MEDIA_TYPES.values())
        raise HttpProblem(406, "format-not-acceptable", f"A disk's content is {names}.")
    return "qcow2" if qcow2 > raw else "raw"


def wanted_range(request: falcon.Request, etag: str, size_bytes: int) -> tuple[int, int] | None:
    """Return the part `[start, end)` that is wanted, None for all of it.

    What is no byte range is ignored, as is a range of what has changed (`If-Range`). Raises
    `HttpProblem` 416 (`range-invalid`) when nothing of it exists, or several are asked for.
    """
    header = request.get_header("Range") or ""
    condition = request.get_header("If-Range")
    if condition is not None and condition.strip() != f'"{etag}"':
        return None
    if _RANGES.fullmatch(header):
        raise _unsatisfiable("Ask for one range at a time.", size_bytes)
    match = _RANGE.fullmatch(header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(0, size_bytes - int(match[2])), size_bytes
    else:
        start = int(match[1])
        end = min(size_bytes, int(match[2]) + 1 if match[2] else size_bytes)
        if match[2] and int(match[2]) < start:
            return None  # no range at all, by RFC 9110 section 14.1.1
    if start >= end:
        raise _unsatisfiable(f"There are {size_bytes} bytes only.", size_bytes)
    return start, end


def _unsatisfiable(detail: str, size_bytes: int) -> HttpProblem:
    problem = HttpProblem(416, "range-invalid", detail)
    problem.headers = {"Content-Range": f"bytes */{size_bytes}"}
    return problem


def sent_part(request: falcon.Request) -> Part:
    """Return what the header fields of an upload's part say.

    Raises `HttpProblem` 415 (`format-unsupported`) and `InvalidInput` (`range-invalid`,
    `digest-invalid`, `parameter-invalid`).
    """
    total_bytes = request.content_length
    start, length, total = 0, total_bytes, total_bytes
    header = request.get_header("Content-Range")
    offset = _offset(request)
    if header is not None:
        start, length, total = _content_range(header, offset)
        if request.content_length not in (None, length):
            raise _invalid_range("Content-Range and Content-Length disagree")
    if offset is None:
        offset = start
    if offset > start:
        raise _invalid_range("the range begins before Upload-Offset")
    source = request.get_header("Upload-Source") or ""
    if not _SOURCE.fullmatch(source):
        raise InvalidInput(
            "parameter-invalid", "Upload-Source has at most 128 letters, digits, dots and dashes."
        )
    return Part(
        format=_sent_format(request),
        offset_bytes=offset,
        start_bytes=start,
        length_bytes=length,
        total_bytes=total,
        source=source,
        part_digests=_digests(request, "Content-Digest"),
        content_digests=_digests(request, "Repr-Digest"),
    )


def _offset(request: falcon.Request) -> int | None:
    text = request.get_header("Upload-Offset")
    if text is None:
        return None
    if not _NUMBER.fullmatch(text):
        raise _invalid_range("Upload-Offset is no number of bytes")
    return int(text)


def _content_range(header: str, offset: int | None) -> tuple[int, int, int]:
    """Return where a part begins, how long it is, and the total; zeros alone are an empty part."""
    match = _CONTENT_RANGE.fullmatch(header.strip())
    if match is None:
        raise _invalid_range("Content-Range is like bytes 0-1023/4096")
    total = int(match[3])
    if match[1] is None:
        if offset is None:
            raise _invalid_range("with bytes */TOTAL say what is there, in Upload-Offset")
        return total, 0, total
    first, last = int(match[1]), int(match[2])
    if not first <= last < total:
        raise _invalid_range("Content-Range names bytes that the total does not have")
    return first, last - first + 1, total


def _invalid_range(fault: str) -> InvalidInput:
    return InvalidInput("range-invalid", f"The part is not described well: {fault}.")


def _sent_format(request: falcon.Request) -> ContentFormat:
    sent = (request.content_type or MEDIA_TYPES["raw"]).partition(";")[0].strip().lower()
    encoding = (request.get_header("Content-Encoding") or "identity").strip().lower()
    for name, media_type in MEDIA_TYPES.items():
        if sent == media_type and encoding == "identity":
            return name
    names = " or ".join(MEDIA_TYPES.values())
    raise HttpProblem(415, "format-unsupported", f"Send {names}, without a Content-Encoding.")


def _digests(request: falcon.Request, name: str) -> dict[str, str] | None:
    """Return the digests of a field that we know; a field without any would prove nothing."""
    header = request.get_header(name)
    if header is None:
        return None
    found = {}
    for item in header.split(","):
        match = _DIGEST.fullmatch(item)
        algorithm, length = _ALGORITHMS.get(match[1], ("", 0)) if match else ("", 0)
        try:
            digest = base64.b64decode(match[2], validate=True) if match and algorithm else b""
        except binascii.Error:
            digest = b""
        if len(digest) == length and algorithm:
            found[algorithm] = digest.hex()
        elif algorithm or match is None:
            raise _invalid_digest(name)
    if not found:
        raise _invalid_digest(name)
    return found


def _invalid_digest(name: str) -> InvalidInput:
    return InvalidInput(
        "digest-invalid", f"{name} is like sha-256=:BASE64: or sha-512=:BASE64:.", field=name
    )
