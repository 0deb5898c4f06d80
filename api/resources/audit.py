"""`/v1/audit`: who changed what, and who was refused, for administrators."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime

import falcon

from stratocache.api import answers, query
from stratocache.api.models import AuditPruning, read_body
from stratocache.api.representations import Representation
from stratocache.api.service import Service
from stratocache.cache.errors import InvalidInput
from stratocache.fs import audit
from stratocache.fs.audit import AuditFilter, Outcome
from stratocache.fs.state import Database, timestamp

LINES_TYPE = "application/x-ndjson"
FILTERS = ("user", "action", "subject", "since", "until")
_EXPORTED_AT_A_TIME = 500


class AuditView(Representation):
    """One request; the table `audit` of `stratocache.fs.schema` says what each field is."""

    number: int
    at: str
    user: str | None
    address: str
    method: str
    action: str
    subject: str
    outcome: Outcome
    status: int
    operation_id: str | None
    message: str


class PruningView(Representation):
    """How many lines have gone."""

    deleted: int


class AuditLog:
    """`/v1/audit`."""

    def __init__(self, service: Service) -> None:
        self._db = service.db
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List lines, oldest first; with `Accept: application/x-ndjson` all of them, one a line."""
        query.require_known(request, "limit", "after", *FILTERS)
        wanted, limit = _filter(request), query.page_length(request)
        after = query.event_number(request.get_param("after"), "after") or 0
        if request.accept and LINES_TYPE in request.accept:
            with ExitStack() as held:
                held.enter_context(self._service.transfer(answers.caller(request)))
                response.content_type = LINES_TYPE
                answers.send(response, _exported(self._db, wanted, after), held.pop_all())
            return
        found = audit.lines(self._db, wanted, after=after, limit=limit + 1)
        chosen = found[:limit]
        more = str(chosen[-1].number) if len(found) > limit else None
        answers.show_page(response, "audit", [AuditView.from_record(line) for line in chosen], more)


class AuditPrune:
    """`/v1/audit/prune`."""

    def __init__(self, service: Service) -> None:
        self._db = service.db

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Delete the lines of before a time, and write a line about that."""
        query.require_known(request)
        before = _time(read_body(request, AuditPruning).before, "before")
        gone = audit.prune(self._db, answers.caller(request), before)
        request.context.audit_subject = f"before {before}"
        answers.show(response, PruningView(deleted=gone))


def _filter(request: falcon.Request) -> AuditFilter:
    given = {name: request.get_param(name) for name in FILTERS}
    for name in ("since", "until"):
        text = given[name]
        if text is not None:
            given[name] = _time(text, name)
    return AuditFilter(**given)


def _time(text: str, field: str) -> str:
    """Return a time of RFC 3339 as the database has it; raises `InvalidInput`."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return timestamp(moment.astimezone(UTC))
    except (ValueError, OverflowError):
        raise InvalidInput(
            "parameter-invalid", f"{field} is a time such as 2026-11-22T08:00:00Z.", field=field
        ) from None


def _exported(db: Database, wanted: AuditFilter, after: int) -> Iterator[bytes]:
    while chosen := audit.lines(db, wanted, after=after, limit=_EXPORTED_AT_A_TIME):
        yield b"".join(json.dumps(asdict(line)).encode() + b"\n" for line in chosen)
        after = chosen[-1].number
