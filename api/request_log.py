"""One line of log for each request, and its id, which clients may choose and always get back."""

import logging
import re
import uuid
from time import perf_counter
from typing import Any

import falcon

from stratocache.cache.structured_log import ON_BEHALF, OnBehalf

log = logging.getLogger(__name__)

HEADER = "X-Request-Id"
_GIVEN = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestLog:
    """Middleware; the first of all, so that what others say carries the id too.

    Changes and faults are worth a line at the level `info`, what only looks at `debug`. A line has the
    path but neither query, body nor headers: those may hold secrets.
    """

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        """Take the request's id, or give it one."""
        given = request.get_header(HEADER) or ""
        request_id = given if _GIVEN.fullmatch(given) else str(uuid.uuid4())
        ON_BEHALF.set(OnBehalf(request_id))  # until this thread's next request
        request.context.began_s = perf_counter()
        response.set_header(HEADER, request_id)

    def process_response(
        self, request: falcon.Request, response: falcon.Response, resource: Any, succeeded: bool
    ) -> None:
        """Write the line."""
        status = response.status_code
        looks = request.method in ("GET", "HEAD", "OPTIONS") and status < 500
        level = logging.DEBUG if looks else logging.INFO
        if not log.isEnabledFor(level):
            return
        caller = getattr(request.context, "caller", None)
        took_ms = (perf_counter() - getattr(request.context, "began_s", perf_counter())) * 1000
        facts = {
            "method": request.method,
            "path": request.path,
            "route": request.uri_template,
            "status": status,
            "duration_ms": round(took_ms, 1),
            "caller": caller.name if caller is not None else None,
            "address": request.env.get("REMOTE_ADDR") or "unix",
        }
        text = "%(caller)s %(address)s: %(method)s %(path)s, %(status)s after %(duration_ms)s ms"
        log.log(level, text, facts, extra={"facts": facts})
