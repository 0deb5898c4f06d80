"""`/v1/operations`: work under way, its progress and its end."""

import falcon

from stratocache.api import answers, query
from stratocache.api.listing import Listing
from stratocache.api.representations import OperationView
from stratocache.api.service import Service
from stratocache.fs import inventory, operation_intents

OPERATIONS = Listing(
    orders=("created_at", "updated_at", "kind", "state"),
    filters=("state", "kind", "subject", "owner"),
    number="id",
)


class OperationCollection:
    """`/v1/operations`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the caller's operations, all for an operator."""
        page = OPERATIONS.page(request)
        found = inventory.operation_page(
            self._service.db, answers.caller(request), page, **OPERATIONS.filters_of(request)
        )
        chosen, after = OPERATIONS.cut(found, page)
        views = [OperationView.of(operation) for operation in chosen]
        answers.show_page(response, "operations", views, after)


class OperationItem:
    """`/v1/operations/{operation_id}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, operation_id: str) -> None:
        """Show an operation, after its end or `?wait=` seconds, whichever comes first."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=0)
        operation = operation_intents.own_operation(
            self._service.db, answers.caller(request), operation_id
        )
        answers.show(response, OperationView.of(self._service.wait(operation, wait_s)))

    def on_delete(
        self, request: falcon.Request, response: falcon.Response, operation_id: str
    ) -> None:
        """Cancel: 200 and the operation when it has ended, 202 while it is still stopping."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        caller = answers.caller(request)
        operation = self._service.start(
            operation_intents.request_cancel(self._service.db, caller, operation_id), wait_s
        )
        answers.show_work(response, operation)
