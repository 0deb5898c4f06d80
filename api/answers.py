"""Writing responses: resources, pages, operations under way, and entity tags."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import falcon

from stratocache.api.problem import HttpProblem
from stratocache.api.representations import OperationView, Representation
from stratocache.api.service import require_success
from stratocache.fs.records import Caller, Operation
from stratocache.fs.state import Database


def caller(request: falcon.Request) -> Caller:
    """Return who sent the request, as `application.Authentication` found out."""
    found = request.context.caller
    assert isinstance(found, Caller)
    return found


def show(response: falcon.Response, view: Representation, *, created_at: str | None = None) -> None:
    """Answer with a resource: 200, or 201 and its address when it was just created."""
    response.status = 200 if created_at is None else 201
    if created_at is not None:
        response.location = created_at
    response.content_type = falcon.MEDIA_JSON
    response.data, etag = view.to_json_and_etag()
    digest = hashlib.sha256(response.data).hexdigest()
    # what If-Match needs, then what tells one answer from the next for If-None-Match
    response.etag = etag if digest.startswith(etag) else f"{etag}-{digest[:16]}"


def show_page(
    response: falcon.Response, name: str, views: Sequence[Representation], after: str | None
) -> None:
    """Answer with one page of a list: `{NAME: […], "next": cursor or null}`."""
    items = b",".join(view.to_json() for view in views)
    response.content_type = falcon.MEDIA_JSON
    response.data = b'{"%b":[%b],"next":%b}' % (name.encode(), items, json.dumps(after).encode())


def accept(response: falcon.Response, operation: Operation) -> None:
    """Answer 202: the work goes on, and the operation's address tells how."""
    response.status = 202
    response.location = f"/v1/operations/{operation.id}"
    response.content_type = falcon.MEDIA_JSON
    response.data = OperationView.of(operation).to_json()


def show_work(response: falcon.Response, operation: Operation) -> None:
    """Answer with an operation: 200 when it has ended, 202 while the work goes on."""
    if operation.finished:
        show(response, OperationView.of(operation))
    else:
        accept(response, operation)


def send(response: falcon.Response, pieces: Iterator[bytes], held: ExitStack) -> None:
    """Answer with bytes as they come; what is held for them is let go of when all is over."""
    response.stream = _Stream(pieces, held)


class _Stream:
    """The bytes of a response, which the server closes in the end, also when nobody reads on."""

    def __init__(self, pieces: Iterator[bytes], held: ExitStack) -> None:
        self._pieces = pieces
        self._held = held

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        """Let go of what is held."""
        self._held.close()


@contextmanager
def matching(
    request: falcon.Request, db: Database, view_of: Callable[[], Representation]
) -> Iterator[None]:
    """Let a block's first transaction happen only when `If-Match` names the present state.

    `view_of` returns that, and raises when there is nothing. Raises `HttpProblem` 412
    (`etag-mismatch`).
    """
    if request.if_match is None:
        yield
        return
    require_match(request, view_of())
    with db.expecting(lambda: require_match(request, view_of())):
        yield


def require_match(request: falcon.Request, view: Representation) -> None:
    """Raise `HttpProblem` 412 (`etag-mismatch`) when `If-Match` names no present state."""
    tags = request.if_match
    if tags is None or "*" in tags:
        return
    present = view.etag
    if not any(
        isinstance(tag, falcon.ETag) and not tag.is_weak and tag.partition("-")[0] == present
        for tag in tags
    ):
        raise HttpProblem(
            412, "etag-mismatch", "It was changed in the meantime; read it again and decide anew."
        )


def finish_removal(response: falcon.Response, operation: Operation) -> None:
    """Answer a DELETE: 204 when all is gone, 202 while it is going; raises `FailedOperation`."""
    require_success(operation)
    if operation.finished:
        response.status = 204
    else:
        accept(response, operation)
