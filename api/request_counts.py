"""Requests of the API as each worker counts them: how many, how they ended, how long they took."""

import logging
import os
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import falcon

from stratocache.fs.counts import WRITE_INTERVAL_S, Counts, take_slot

log = logging.getLogger(__name__)

_UNMATCHED = "unmatched"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestCounts:
    """Middleware that counts by route, never by address: there are few of them.

    Durations are until the head of the answer; what streams content goes on after that.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = take_slot(directory, "api")
        except OSError as error:
            log.warning("requests are not counted: %s", error)
            name = f"api-of-{os.getpid()}"
        self._counts = Counts(directory, name)
        self._ending = threading.Event()

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        """Take the time."""
        request.context.started_s = perf_counter()

    def process_response(
        self, request: falcon.Request, response: falcon.Response, resource: Any, succeeded: bool
    ) -> None:
        """Count the request."""
        route = request.uri_template or _UNMATCHED
        method = request.method if request.method in _METHODS else "other"
        self._counts.add("http_requests", method, route, str(response.status_code))
        started_s = getattr(request.context, "started_s", None)
        if started_s is not None:
            self._counts.observe(perf_counter() - started_s, "http_duration", method, route)

    def write(self) -> None:
        """Let others see what was counted."""
        self._counts.write()

    def write_on(self) -> None:
        """Write now and then, in a thread of this worker, until `end`."""

        def work() -> None:
            while not self._ending.wait(WRITE_INTERVAL_S):
                self.write()

        threading.Thread(target=work, name="counts", daemon=True).start()

    def end(self) -> None:
        """Write for the last time."""
        self._ending.set()
        self.write()
