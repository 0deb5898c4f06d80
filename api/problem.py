"""Errors on the wire: `application/problem+json` (RFC 9457) with a stable `code`.

Members: `type` (a URN with the code), `title` (the category), `status`, `detail` (a sentence that
says what to do), `code`, `field` when one input field is to blame, and `instance` (the operation's
address) when an operation failed.
"""

import json
import logging
import sqlite3
from typing import Any

import falcon

from stratocache.api.problem_titles import TITLES
from stratocache.cache import errors
from stratocache.cache.errors import StratocacheError

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_RETRY_AFTER_S = 1


class HttpProblem(falcon.HTTPError):
    """An error that only HTTP knows (401, 412, 413, 415, 429), with a stable code."""

    def __init__(
        self, status: int, code: str, detail: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, description=detail, headers=headers)
        self.problem_code = code


class FailedOperation(Exception):
    """A finished operation that did not succeed, and the error it left."""

    def __init__(self, operation_id: str, error: StratocacheError) -> None:
        super().__init__(error.message)
        self.operation_id = operation_id
        self.error = error


def add_handlers(app: falcon.App[falcon.Request, falcon.Response]) -> None:
    """Make every exception that leaves a resource a problem document."""
    app.add_error_handler(Exception, _handle_bug)
    app.add_error_handler(falcon.HTTPError, _handle_http)
    app.add_error_handler(sqlite3.OperationalError, _handle_state)
    app.add_error_handler(StratocacheError, _handle_error)
    app.add_error_handler(FailedOperation, _handle_failed_operation)
    app.add_error_handler(ConnectionError, _handle_lost_client)


def document_of(error: StratocacheError, *, operation_id: str | None = None) -> dict[str, Any]:
    """Return the problem document of an error."""
    document: dict[str, Any] = {
        "type": f"urn:stratocache:problem:{error.code}",
        "title": TITLES.get(type(error), TITLES[errors.Internal]),
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
    }
    if error.field is not None:
        document["field"] = error.field
    if operation_id is not None:
        document["instance"] = f"/v1/operations/{operation_id}"
    return document


def _write(response: falcon.Response, document: dict[str, Any]) -> None:
    response.context.problem = document
    response.status = document["status"]
    response.content_type = MEDIA_TYPE
    response.data = json.dumps(document, ensure_ascii=False).encode()


def _handle_error(
    request: falcon.Request,
    response: falcon.Response,
    error: StratocacheError,
    _parameters: dict[str, Any],
) -> None:
    _write(response, document_of(error))
    if isinstance(error, errors.Unreachable):
        response.set_header("Retry-After", str(_RETRY_AFTER_S))


def _handle_failed_operation(
    request: falcon.Request,
    response: falcon.Response,
    failed: FailedOperation,
    _parameters: dict[str, Any],
) -> None:
    _write(response, document_of(failed.error, operation_id=failed.operation_id))


def _handle_state(
    request: falcon.Request,
    response: falcon.Response,
    error: sqlite3.OperationalError,
    _parameters: dict[str, Any],
) -> None:
    log.error("state database: %s", error)
    shown: StratocacheError
    if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
        shown = errors.NoSpace(
            "state-full", "The state directory has no space left; free some and try again."
        )
    else:
        shown = errors.Unreachable(
            "state-unavailable", f"The state database does not answer ({error}); try again."
        )
    _write(response, document_of(shown))


def _handle_lost_client(
    request: falcon.Request,
    response: falcon.Response,
    error: ConnectionError,
    _parameters: dict[str, Any],
) -> None:
    log.debug("%s %s: %s", request.method, request.path, error)
    problem = HttpProblem(408, "client-too-slow", "The request did not arrive in time; try again.")
    _handle_http(request, response, problem, {})


def _handle_bug(
    request: falcon.Request,
    response: falcon.Response,
    error: Exception,
    _parameters: dict[str, Any],
) -> None:
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    _write(
        response,
        document_of(errors.Internal("internal", "This is a bug; the log of the API says more.")),
    )


def _handle_http(
    request: falcon.Request,
    response: falcon.Response,
    error: falcon.HTTPError,
    _parameters: dict[str, Any],
) -> None:
    code, detail = _explain(request, error)
    if error.headers is not None:
        response.set_headers(error.headers)
    _write(
        response,
        {
            "type": f"urn:stratocache:problem:{code}",
            "title": error.title or "Error",
            "status": error.status_code,
            "detail": detail,
            "code": code,
        },
    )


def _explain(request: falcon.Request, error: falcon.HTTPError) -> tuple[str, str]:
    if isinstance(error, HttpProblem):
        return error.problem_code, error.description or ""
    if isinstance(error, falcon.HTTPNotFound):
        return "route-unknown", f"Nothing is at {request.path}; GET /v1 says what is."
    if isinstance(error, falcon.HTTPMethodNotAllowed):
        return "method-not-allowed", f"{request.path} does not take {request.method}."
    return f"http-{error.status_code}", error.description or error.title or "Error"
