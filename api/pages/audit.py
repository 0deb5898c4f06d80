"""`/audit`: who changed what, and who was refused."""

import falcon

from stratocache.api import query
from stratocache.api.pages.rendering import Order, Pages, query_of
from stratocache.api.resources.audit import AuditView
from stratocache.fs.audit import AuditFilter, latest_lines

_FILTERS = ("user", "action", "subject")


class AuditPage:
    """`/audit`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the lines of the audit log, latest first."""
        query.require_known(request, *_FILTERS, "after")
        wanted = {name: request.get_param(name) or None for name in _FILTERS}
        before = query.event_number(request.get_param("after"), "after")
        found = latest_lines(
            self._pages.service.db, AuditFilter(**wanted), before=before,
            limit=query.PAGE_LENGTH + 1,
        )  # fmt: skip
        chosen = found[: query.PAGE_LENGTH]
        self._pages.show(
            request, response, "audit", lines=[AuditView.from_record(line) for line in chosen],
            next=str(chosen[-1].number) if len(found) > len(chosen) else None,
            order=Order("", query_of(wanted)),
            filters={name: value or "" for name, value in wanted.items()},
        )  # fmt: skip
