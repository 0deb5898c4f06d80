"""`If-None-Match`: who has what a GET would answer is told so, without it (RFC 9110, 13.1.2)."""

import hashlib
from typing import Any

import falcon

from stratocache.api.head_requests import close_stream

_ANSWERED = (200, 206)


class Conditional:
    """Middleware that gives every JSON answer an entity tag, and 304 to who knows it."""

    def process_response(
        self, request: falcon.Request, response: falcon.Response, resource: Any, succeeded: bool
    ) -> None:
        """Judge a GET or HEAD that would be answered."""
        if request.method not in ("GET", "HEAD") or response.status_code not in _ANSWERED:
            return
        if response.etag is None:
            if response.data is None or response.content_type != falcon.MEDIA_JSON:
                return
            response.etag = hashlib.sha256(response.data).hexdigest()[:32]
        known = request.if_none_match
        if known is None or not _matches(known, response.etag):
            return
        response.status = 304
        response.data = None
        if response.stream is not None:
            close_stream(response)
        for name in ("Content-Type", "Content-Length", "Content-Range", "Content-Disposition"):
            response.delete_header(name)


def _matches(known: list[Any], etag: str) -> bool:
    """Compare weakly: a GET needs no more (RFC 9110, 8.8.3.2)."""
    present = etag.removeprefix("W/").strip('"')
    return any(tag == "*" or str(tag) == present for tag in known)
