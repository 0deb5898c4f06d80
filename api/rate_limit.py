"""How often each caller may ask, so that one of them does not take the place of all others.

A token bucket per caller and worker, and one per network address for strangers: whoever is refused as
unknown again and again is told so before anything else is looked at. Administrators on the Unix
socket are not limited: the host is theirs.
"""

import math
import threading
import time
from typing import Any

import falcon

from stratocache.api.problem import HttpProblem
from stratocache.api.request_origin import client_address, is_unix
from stratocache.cache.configuration import ApiSettings
from stratocache.fs.records import Caller

_BURST_S = 2.0
"""Seconds' worth of requests that may come at once."""
_STRANGERS_SHARE = 0.1
_KEPT = 10_000


class Buckets:
    """Token buckets by name; any thread may use them."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._lock = threading.Lock()
        self._levels: dict[str, tuple[float, float]] = {}

    def wait_s(self, name: str, *, take: bool) -> float:
        """Return 0 when there is a token, which is taken if asked for, else when there will be."""
        now_s = time.monotonic()
        with self._lock:
            level, at_s = self._levels.get(name, (self._burst, now_s))
            level = min(self._burst, level + (now_s - at_s) * self._per_s)
            if level < 1:
                return (1 - level) / self._per_s
            if take:
                self._levels[name] = (level - 1, now_s)
                if len(self._levels) > _KEPT:
                    self._forget_full(now_s)
            return 0.0

    def _forget_full(self, now_s: float) -> None:
        full_s = self._burst / self._per_s
        self._levels = {
            name: kept for name, kept in self._levels.items() if now_s - kept[1] < full_s
        }


class RateLimit:
    """Middleware, to be added before `Authentication`."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        per_s = settings.requests_per_s
        self._callers = Buckets(per_s, max(1.0, per_s * _BURST_S)) if per_s else None
        strangers = per_s * _STRANGERS_SHARE
        self._strangers = Buckets(strangers, max(1.0, strangers * _BURST_S)) if per_s else None

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        """Send away an address whose last requests were all of strangers; raises `HttpProblem`."""
        address = self._address(request)
        if self._strangers is not None and address:
            _require(response, self._strangers.wait_s(address, take=False))

    def process_resource(
        self, request: falcon.Request, response: falcon.Response, resource: Any,
        parameters: dict[str, Any],
    ) -> None:  # fmt: skip
        """Count a request of a known caller; raises `HttpProblem` 429 (`rate-limited`)."""
        caller = getattr(request.context, "caller", None)
        if self._callers is None or not isinstance(caller, Caller):
            return
        if not (caller.administrator and is_unix(request)):
            _require(response, self._callers.wait_s(caller.name, take=True))

    def process_response(
        self, request: falcon.Request, response: falcon.Response, resource: Any, succeeded: bool
    ) -> None:
        """Count a request of whom we do not know."""
        address = self._address(request)
        stranger = not isinstance(getattr(request.context, "caller", None), Caller)
        if self._strangers is not None and stranger and address:
            self._strangers.wait_s(address, take=True)

    def _address(self, request: falcon.Request) -> str:
        return "" if is_unix(request) else client_address(request, self._settings)


def _require(response: falcon.Response, wait_s: float) -> None:
    if wait_s > 0:
        response.set_header("Retry-After", str(math.ceil(wait_s)))
        raise HttpProblem(429, "rate-limited", "That was too often; wait as Retry-After says.")
