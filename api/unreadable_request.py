"""What gunicorn refuses before there is an application, as a problem document like all others."""

import json

from gunicorn.http.errors import (  # type: ignore[import-untyped]
    ConfigurationProblem,
    ExpectationFailed,
    InvalidResponseHeader,
    InvalidResponseHeaderName,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)

_REFUSALS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (LimitRequestLine, 414, "uri-too-long", "The address is too long; send less in the query."),
    (LimitRequestHeaders, 431, "headers-too-large", "Send fewer or shorter header fields."),
    (ExpectationFailed, 417, "expectation-unknown", "Send no Expect but 100-continue."),
    (UnsupportedTransferCoding, 501, "transfer-coding-unknown", "Send the body plain or chunked."),
    (ParseException, 400, "request-unreadable", "The request is not well-formed HTTP/1.1."),
)
_OURS = (InvalidResponseHeader, InvalidResponseHeaderName, ConfigurationProblem)
"""Faults of the application that gunicorn counts among these."""
_REASONS = {
    400: "Bad Request", 414: "URI Too Long", 417: "Expectation Failed",
    431: "Request Header Fields Too Large", 501: "Not Implemented",
}  # fmt: skip


def answer_to(error: Exception) -> bytes | None:
    """Return the whole response to a request that cannot be read; None when that is not its fault."""
    if isinstance(error, _OURS):
        return None
    for kind, status, code, detail in _REFUSALS:
        if isinstance(error, kind):
            return _response(status, code, detail)
    return None


def _response(status: int, code: str, detail: str) -> bytes:
    reason = _REASONS[status]
    body = json.dumps({
        "type": f"urn:stratocache:problem:{code}", "title": reason, "status": status,
        "detail": detail, "code": code,
    }).encode()  # fmt: skip
    head = (
        f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\n"
        f"Content-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n"
        "X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n\r\n"
    )
    return head.encode() + body
