"""What goes into the audit log: every request that changes something, and every refused one."""

import logging
import sqlite3
import threading
import time
from typing import Any

import falcon

from stratocache.api.authorisation import find_route, rule_of
from stratocache.api.request_origin import client_address
from stratocache.cache.configuration import ApiSettings
from stratocache.cache.structured_log import ON_BEHALF
from stratocache.fs.audit import Outcome, append_line
from stratocache.fs.records import Caller
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

_READING = ("GET", "HEAD", "OPTIONS")
_REFUSALS = (401, 403, 429)
_MESSAGE_CHARACTERS_MAX = 500
_SUBJECT_CHARACTERS_MAX = 200
_STRANGERS_PER_S = 10
_STRANGERS_BURST = 100


class AuditMiddleware:
    """Writes a line after the answer is known, before the client has it.

    Of strangers, who may send what they like, and of who asks too often, so many lines a second are
    written, and how many more there were.
    """

    def __init__(self, settings: ApiSettings, db: Database) -> None:
        self._settings = settings
        self._db = db
        self._strangers = _Strangers()

    def process_response(
        self, request: falcon.Request, response: falcon.Response, resource: Any, succeeded: bool
    ) -> None:
        """Write the line, if there is to be one."""
        status = response.status_code
        refused = status in _REFUSALS
        if request.method in _READING and not refused:
            return
        caller = getattr(request.context, "caller", None)
        message = _message(response)
        if caller is None or status == 429:
            omitted = self._strangers.admit()
            if omitted is None:
                return
            if omitted:
                message += f" ({omitted} more were refused meanwhile.)"
        try:
            self._append(request, response, caller, message)
        except sqlite3.Error:
            log.exception("%s %s is not in the audit log", request.method, request.path)

    def _append(
        self,
        request: falcon.Request,
        response: falcon.Response,
        caller: Caller | None,
        message: str,
    ) -> None:
        template, parameters = _route(request)
        rule = rule_of(request.method, template)
        action = rule.action if rule is not None else ""
        user = caller.name if caller is not None else getattr(request.context, "audit_user", None)
        append_line(
            self._db,
            user=user,
            address=client_address(request, self._settings),
            method=request.method[:16],
            action=action or f"{request.method[:16]} {template or 'nothing'}",
            subject=_subject(request, response, parameters),
            outcome=_outcome(response.status_code),
            status=response.status_code,
            operation_id=ON_BEHALF.get().operation_id or None,
            message=message[:_MESSAGE_CHARACTERS_MAX],
        )


class _Strangers:
    """How many lines may be written of requests that cost their sender nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = float(_STRANGERS_BURST)
        self._seen_s = time.monotonic()
        self._omitted = 0

    def admit(self) -> int | None:
        """Return how many were left out since the last line; None when this one is too."""
        with self._lock:
            now = time.monotonic()
            grown = self._left + (now - self._seen_s) * _STRANGERS_PER_S
            self._left, self._seen_s = min(grown, _STRANGERS_BURST), now
            if self._left < 1:
                self._omitted += 1
                return None
            self._left -= 1
            omitted, self._omitted = self._omitted, 0
            return omitted


def _outcome(status: int) -> Outcome:
    if status in _REFUSALS:
        return "refused"
    if status >= 400:
        return "failed"
    return "accepted" if status == 202 else "done"


def _route(request: falcon.Request) -> tuple[str | None, dict[str, Any]]:
    """Return the route's template and the parameters of the address."""
    parameters = getattr(request.context, "parameters", None)
    if parameters is not None:
        return request.uri_template, parameters
    return find_route(request.method, request.path) or (request.uri_template, {})


def _subject(request: falcon.Request, response: falcon.Response, parameters: dict[str, Any]) -> str:
    """Return what the request is about: objects of its address, or what it has made."""
    named = getattr(request.context, "audit_subject", None)
    if named is None:
        named = "/".join(str(value) for value in parameters.values())
    if not named and response.status_code == 201 and response.location:
        named = response.location.rpartition("/")[2]
    return str(named)[:_SUBJECT_CHARACTERS_MAX]


def _message(response: falcon.Response) -> str:
    problem = getattr(response.context, "problem", None)
    return f"{problem['code']}: {problem['detail']}" if problem else ""
