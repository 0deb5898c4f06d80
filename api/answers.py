"""Writing responses: resources, pages, operations under way, and entity tags."""

import json
from collections.abc import Sequence

import falcon

from stratocache.api.problem import HttpProblem
from stratocache.api.representations import OperationView, Representation
from stratocache.api.service import require_success
from stratocache.fs.records import Caller, Operation


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
    response.data, response.etag = view.to_json_and_etag()


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


def require_match(request: falcon.Request, view: Representation) -> None:
    """Raise `HttpProblem` 412 (`etag-mismatch`) when `If-Match` names no present state."""
    tags = request.if_match
    if tags is None or "*" in tags:
        return
    if not any(
        isinstance(tag, falcon.ETag) and not tag.is_weak and tag == view.etag for tag in tags
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
