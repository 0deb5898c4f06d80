"""`Idempotency-Key`: a POST that is sent again with its key has been carried out once (API.md).

After draft-ietf-httpapi-idempotency-key-header. An answer is kept when the request had an effect,
whether that succeeded or failed; one that changed nothing may be mended and sent again. Answers with
secrets are not stored but made anew from what is at their `Location`.
"""

import hashlib
import io
import logging
import re
import threading
from typing import Any, TypeAlias

import falcon

from stratocache.api import answers, models
from stratocache.api.problem import HttpProblem
from stratocache.api.representations import OperationView
from stratocache.api.route_table import ROUTES, Route
from stratocache.cache.errors import Conflict, InvalidInput
from stratocache.fs import idempotency, inventory
from stratocache.fs.idempotency import Answer, Asked, Key
from stratocache.fs.records import Caller
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
_KEY = re.compile(r"[!-~]{1,255}")
_OF_THE_REQUEST = (
    "HTTP_IDEMPOTENCY_KEY", "HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH", "HTTP_ACCEPT",
    "HTTP_CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING", "CONTENT_TYPE",
)  # fmt: skip

_App: TypeAlias = falcon.App[falcon.Request, falcon.Response]


class Idempotency:
    """Middleware; comes behind those that say who may do what."""

    def __init__(self, app: _App, db: Database) -> None:
        self._app = app
        self._db = db
        self._lock = threading.Lock()
        self._here: set[Key] = set()
        """Keys of requests that this process carries out now."""

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        """Forget what another request of this thread may have left."""
        idempotency.set_current(None)

    def process_resource(
        self,
        request: falcon.Request,
        response: falcon.Response,
        resource: object,
        parameters: dict[str, Any],
    ) -> None:
        """Take the key, or answer as before; raises `InvalidInput` (`idempotency-key-invalid`,
        `idempotency-key-unsupported`), and what `fs.idempotency.claim` raises."""
        text = request.get_header(HEADER)
        route = ROUTES.get((request.method, request.uri_template or ""))
        if text is None or route is None or request.method != "POST":
            return
        key = Key(_caller_name(request, route), _checked(text))
        digest = hashlib.sha256(models.body_of(request)).hexdigest()
        asked = Asked(request.method, request.relative_uri, digest)
        with self._lock:
            if key in self._here:
                raise Conflict(
                    "idempotency-key-busy",
                    f"The request with the key {text!r} is being carried out; try again in a moment.",
                    field=HEADER,
                )
            self._here.add(key)
        request.context.idempotency_key = key
        request.context.replayed = True  # until it is known that it is not
        answer = idempotency.claim(self._db, key, asked)
        if answer is None:
            request.context.replayed = False
            idempotency.set_current(key)
            return
        response.complete = True
        self._replay(request, response, answer)
        response.set_header(REPLAYED, "true")

    def process_response(
        self, request: falcon.Request, response: falcon.Response, resource: Any, succeeded: bool
    ) -> None:
        """Keep the answer, or forget the key of a request that changed nothing."""
        key = getattr(request.context, "idempotency_key", None)
        if key is None:
            return
        idempotency.set_current(None)
        try:
            if not request.context.replayed:
                self._keep(request, response, key)
        except Exception:
            # who sends the key again is answered with the operation, or begins anew
            log.exception("the answer to %s could not be kept", request.path)
        finally:
            with self._lock:
                self._here.discard(key)

    def _keep(self, request: falcon.Request, response: falcon.Response, key: Key) -> None:
        status = response.status_code
        if not (200 <= status < 300 or idempotency.has_operation(self._db, key)):
            idempotency.forget(self._db, key)
            return
        route = ROUTES[request.method, request.uri_template or ""]
        location = response.get_header("Location")
        body: bytes | None = response.data or b""
        if route.replay == "rebuilt" and status in (200, 201):
            location = location or request.path.rpartition("/")[0]
            body = None
        idempotency.keep(
            self._db, key,
            Answer(
                None, status, response.content_type, location, response.get_header("ETag"), body
            ),
        )  # fmt: skip

    def _replay(self, request: falcon.Request, response: falcon.Response, answer: Answer) -> None:
        if answer.status is None:
            assert answer.operation_id is not None
            operation = inventory.operation(self._db, answer.operation_id)
            if operation.finished and operation.state != "done":
                answers.show(response, OperationView.of(operation))
                response.status = 202
            else:
                answers.accept(response, operation)
            return
        response.status = answer.status
        if answer.content_type is not None:
            response.content_type = answer.content_type
        if answer.location is not None:
            response.set_header("Location", answer.location)
        if answer.etag is not None:
            response.set_header("ETag", answer.etag)
        response.data = answer.body
        if answer.body is None:
            assert answer.location is not None
            self._rebuild(request, response, answer.location)

    def _rebuild(self, request: falcon.Request, response: falcon.Response, address: str) -> None:
        """Answer with what is at an address now, as the same caller is shown it."""
        environ = {**request.env, "REQUEST_METHOD": "GET", "PATH_INFO": address}
        environ.update({"QUERY_STRING": "", "CONTENT_LENGTH": "0", "wsgi.input": io.BytesIO()})
        for name in _OF_THE_REQUEST:
            environ.pop(name, None)
        found: list[tuple[str, dict[str, str]]] = []

        def start(status: str, headers: list[tuple[str, str]], *_: object) -> None:
            found.append((status, {name.lower(): value for name, value in headers}))

        content = b"".join(self._app(environ, start))  # type: ignore[arg-type]
        status, headers = found[0]
        if not status.startswith("200"):
            raise Conflict(
                "idempotency-answer-gone",
                f"This was done before, and what it made is at {address} no more; send a new key.",
                field=HEADER,
            )
        response.content_type = headers.get("content-type", falcon.MEDIA_JSON)
        if "etag" in headers:
            response.set_header("ETag", headers["etag"])
        response.data = content


def _checked(text: str) -> str:
    if not _KEY.fullmatch(text):
        raise InvalidInput(
            "idempotency-key-invalid",
            "Idempotency-Key has 1 to 255 visible ASCII characters.",
            field=HEADER,
        )
    return text


def _caller_name(request: falcon.Request, route: Route) -> str:
    caller = getattr(request.context, "caller", None)
    if route.replay == "never" or not isinstance(caller, Caller):
        raise HttpProblem(
            400,
            "idempotency-key-unsupported",
            "The request or its answer has a secret that is stored nowhere, so they could not be told "
            "or given again; send the request without Idempotency-Key.",
        )
    return caller.name
