"""HTTP client of a daemon, at its Unix socket or elsewhere; problems become our errors again.

When a connection is cut before the answer is here (a process of the API has died) the request is sent
again, once: each POST has a key by which it is carried out once.

The standard library's client: it starts in a tenth of the time that others take, which short
commands spend mostly on starting.
"""

import http.client
import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

from stratocache.api.problem_titles import TITLES
from stratocache.cache.errors import (
    Cancelled,
    Conflict,
    Internal,
    NotFound,
    StratocacheError,
    Unreachable,
    from_record,
)

Document = dict[str, Any]
Report = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all (None = not known)."""

_UNDER_WAY = frozenset({"pending", "running"})
FINISHED = ("done", "failed", "cancelled")
_POLL_S = 1
_CANCEL_WAIT_S = 60
_MARGIN_S = 30.0
_RECONNECT_S = 20.0
"""How long the API may be away, as when it is restarted, while somebody waits for an operation."""
_EXCHANGE_S = 8 * 3600.0
"""How long content may be converted before an answer comes."""
_BUSY_PAUSE_S = 0.2
_CUT = (
    ConnectionError, http.client.BadStatusLine, http.client.IncompleteRead, ssl.SSLEOFError,
)  # fmt: skip
"""What reading from a connection raises whose other end has gone away."""
_REPEATABLE = frozenset({"GET", "PUT", "DELETE"})
"""What has the same effect when it is done twice. PATCH may change by what it then was."""
_PAGES_MAX = 10_000
_SUCCESSES = range(200, 300)
_NEAREST = {
    401: "Refused", 403: "Refused", 404: "NotFound", 408: "Unreachable", 409: "Conflict",
    412: "Conflict", 429: "Unreachable",
}  # fmt: skip
_CATEGORIES = {title: category.__name__ for category, title in TITLES.items()}


class Endpoint(Protocol):
    """Where a daemon is, and who asks."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What every request says of its sender."""

    def open(self, timeout_s: float) -> http.client.HTTPConnection:
        """Return a connection that is made already; raises `OSError` and `StratocacheError`.

        It waits for `timeout_s` seconds at most whenever it reads or writes.
        """

    def explain(self, error: Exception) -> StratocacheError:
        """Return our error for what a connection raised."""

    def refuse(self, error: StratocacheError) -> StratocacheError:
        """Return the error to be shown for a 401."""


class LocalEndpoint:
    """The daemon of this host, at its Unix socket."""

    headers: Mapping[str, str] = {}

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path

    def open(self, timeout_s: float) -> http.client.HTTPConnection:
        """Connect."""
        connection = http.client.HTTPConnection("stratocache", timeout=timeout_s)
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.settimeout(timeout_s)
            link.connect(str(self._socket_path))
        except BaseException:
            link.close()
            raise
        connection.sock = link
        return connection

    def explain(self, error: Exception) -> StratocacheError:
        """Say which socket, and what to do."""
        if isinstance(error, PermissionError):
            return Unreachable(
                "daemon-forbidden",
                f"You may not use {self._socket_path}; ask to join the group that owns it.",
            )
        return Unreachable(
            "daemon-unreachable",
            f"No daemon answers on {self._socket_path} ({error}); start `stratocache serve`, "
            "or name its socket with --socket.",
        )

    def refuse(self, error: StratocacheError) -> StratocacheError:
        """Return the error as it is: the kernel says who we are."""
        return error


class Client:
    """A daemon; raises `StratocacheError` for everything."""

    def __init__(self, endpoint: Endpoint | Path) -> None:
        self._endpoint = LocalEndpoint(endpoint) if isinstance(endpoint, Path) else endpoint

    def get(self, path: str, **parameters: str | float) -> Document:
        """GET a document."""
        return self._call("GET", path, parameters)

    def post(self, path: str, body: Document, **parameters: str | float) -> Document:
        """POST a document, which is carried out once, however often it is sent."""
        return self._call("POST", path, parameters, body, key=os.urandom(16).hex())

    def post_secret(self, path: str, body: Document) -> Document:
        """POST what has a secret, or is answered with one: no key is taken, and it is sent once."""
        return self._call("POST", path, {}, body)

    def put(self, path: str, body: Document | None = None, **parameters: str | float) -> Document:
        """PUT a document, or nothing."""
        return self._call("PUT", path, parameters, body)

    def patch(self, path: str, body: Document, **parameters: str | float) -> Document:
        """PATCH with the fields to change."""
        return self._call("PATCH", path, parameters, body)

    def delete(self, path: str, **parameters: str | float) -> Document:
        """DELETE; returns an operation while it is under way, else an empty document."""
        return self._call("DELETE", path, parameters)

    def items(self, path: str, name: str, **parameters: str) -> list[Document]:
        """Return every item of a list, page after page."""
        found: list[Document] = []
        after = ""
        for _page in range(_PAGES_MAX):
            answer = self.get(path, limit=1000, after=after, **parameters)
            found += answer[name]
            if answer["next"] is None:
                break
            after = answer["next"]
        return found

    def begin(self, path: str, body: Document) -> Document:
        """POST what begins an operation. Ctrl-C is held back until `follow`, which can cancel it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        operation: Document = {}
        try:
            operation = self.post(path, body, wait=0)
        finally:
            if operation.get("state") not in _UNDER_WAY:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return operation

    def follow(self, operation: Document, report: Report) -> Document:
        """Wait for an operation's end, telling `report` of progress; return it when it is done.

        Ctrl-C cancels it. Raises the error that it failed with.
        """
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            while operation["state"] not in FINISHED:
                operation = self._poll(operation)
                report(operation["progress_bytes"], operation["total_bytes"])
        except KeyboardInterrupt:
            operation = self._cancel(operation)
        if operation["state"] != "done":
            raise from_record(operation["error"] or {})
        return operation

    def _poll(self, operation: Document) -> Document:
        deadline = time.monotonic() + _RECONNECT_S
        while True:
            try:
                return self.get(f"/v1/operations/{operation['id']}", wait=_POLL_S)
            except Unreachable as error:
                if error.code != "daemon-unreachable" or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def _cancel(self, operation: Document) -> Document:
        try:
            ended = self.delete(f"/v1/operations/{operation['id']}", wait=_CANCEL_WAIT_S)
        except Conflict as error:
            raise Cancelled(
                "interrupted", f"{error.message.rstrip('.')}; it goes on in the daemon."
            ) from None
        if ended["state"] not in FINISHED:
            raise Cancelled(
                "interrupted", f"Operation {operation['id']} is still stopping in the daemon."
            )
        return ended

    def _call(
        self,
        method: str,
        path: str,
        parameters: dict[str, str | float],
        body: Document | None = None,
        key: str | None = None,
    ) -> Document:
        send = partial(self._send, method, path, parameters, body, key)
        try:
            return send()
        except StratocacheError as error:
            if not isinstance(error.__cause__, _CUT) or not (key or method in _REPEATABLE):
                raise
        try:
            return self._send_again(send)
        except NotFound:
            if method != "DELETE":
                raise
            return {}  # the first has done it

    def _send_again(self, send: Callable[[], Document]) -> Document:
        """Send once more, or as often as it takes while the first is still being carried out."""
        deadline = time.monotonic() + _RECONNECT_S
        while True:
            try:
                return send()
            except Conflict as error:
                if error.code != "idempotency-key-busy" or time.monotonic() > deadline:
                    raise
            time.sleep(_BUSY_PAUSE_S)

    def _send(
        self,
        method: str,
        path: str,
        parameters: dict[str, str | float],
        body: Document | None,
        key: str | None,
    ) -> Document:
        timeout_s = float(parameters.get("wait", 0)) + _MARGIN_S
        address = f"{path}?{urlencode(parameters)}" if parameters else path
        content = b"" if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        if key is not None:
            headers["Idempotency-Key"] = key
        with self.exchange(method, address, headers, content, timeout_s=timeout_s) as response:
            answer = self._read(response)
        return _document(answer) if answer else {}

    @contextmanager
    def exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        timeout_s: float = _EXCHANGE_S,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield the answer, its content still to be read.

        Raises the answer's error and `Unreachable`. Reading raises `OSError`, or ends too early.
        """
        try:
            connection = self._endpoint.open(timeout_s)
        except OSError as error:
            raise self._endpoint.explain(error) from None
        try:
            response = self._request(
                connection, method, path, body, {**self._endpoint.headers, **headers}
            )
            if response.status not in _SUCCESSES:
                answered = _error_of(response.status, self._read(response))
                raise self._endpoint.refuse(answered) if response.status == 401 else answered
            yield response
        finally:
            connection.close()

    def _request(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        try:
            # it may have answered and hung up before it read everything
            with suppress(OSError):
                connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            if response.version == 11 and response.length is None and not response.chunked:
                raise http.client.IncompleteRead(b"")  # cut among the header fields
            return response
        except (OSError, http.client.HTTPException) as error:
            raise self._endpoint.explain(error) from error

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._endpoint.explain(error) from error


def _document(answer: bytes) -> Document:
    try:
        document = json.loads(answer)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise Internal("answer-invalid", "The daemon's answer is not a JSON object.")
    return document


def _error_of(status: int, answer: bytes) -> StratocacheError:
    """Rebuild the error of a problem document; one of HTTP alone takes the nearest category."""
    try:
        problem = _document(answer)
    except Internal:
        problem = {}
    category = _CATEGORIES.get(problem.get("title", ""))
    if category is None:
        otherwise = "Internal" if status >= 500 else "InvalidInput"
        category = _NEAREST.get(status, otherwise)
    error = from_record(
        {
            "category": category,
            "code": str(problem.get("code", f"http-{status}")),
            "message": str(problem.get("detail", f"The daemon answered {status}.")),
        }
    )
    error.field = problem.get("field")
    return error
