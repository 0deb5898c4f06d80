"""`/v1/operations`: work under way, its progress and its end."""

import falcon

from stratocache.api import answers, query
from stratocache.api.representations import OperationView
from stratocache.api.service import Service
from stratocache.fs import intents, inventory


class OperationCollection:
    """`/v1/operations`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the caller's operations, all for an operator, oldest first."""
        query.require_known(request, "limit", "after", "state", "kind", "subject")
        caller = answers.caller(request)
        state, kind = request.get_param("state"), request.get_param("kind")
        found = [
            operation
            for operation in inventory.operations(
                self._service.db, subject=request.get_param("subject")
            )
            if intents.may_change(caller, operation.owner, ending=True)
            and (state is None or operation.state == state)
            and (kind is None or operation.kind == kind)
        ]
        chosen, after = query.page(request, found, lambda item: f"{item.created_at}~{item.id}")
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
        operation = intents.own_operation(self._service.db, answers.caller(request), operation_id)
        answers.show(response, OperationView.of(self._service.wait(operation, wait_s)))

    def on_delete(
        self, request: falcon.Request, response: falcon.Response, operation_id: str
    ) -> None:
        """Cancel: 200 and the operation when it has ended, 202 while it is still stopping."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        caller = answers.caller(request)
        operation = self._service.start(
            intents.request_cancel(self._service.db, caller, operation_id), wait_s
        )
        if operation.finished:
            answers.show(response, OperationView.of(operation))
        else:
            answers.accept(response, operation)
