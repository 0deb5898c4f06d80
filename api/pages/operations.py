"""`/operations`: work that was asked for, its progress and its end."""

from typing import Any

import falcon

from stratocache.api import answers
from stratocache.api.pages.rendering import Pages
from stratocache.api.representations import OperationView
from stratocache.api.resources.operations import OPERATIONS
from stratocache.cache.entry import Entry
from stratocache.fs import inventory, operation_intents
from stratocache.fs.records import Operation

_BUSY = ("pending", "running")


class OperationsPage:
    """`/operations`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the operations that the caller may see, newest first."""
        db, caller = self._pages.service.db, answers.caller(request)
        part, wanted, order = self._pages.part(request, OPERATIONS)
        found = inventory.operation_page(db, caller, part, **wanted)
        chosen, after = OPERATIONS.cut(found, part)
        self._pages.show(
            request, response, "operations",
            busy=any(item.state in _BUSY for item in chosen),
            operations=[OperationView.of(item) for item in chosen], next=after, order=order,
            filters={name: value or "" for name, value in wanted.items()},
        )  # fmt: skip


class OperationPage:
    """`/operations/{operation_id}`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response, operation_id: str) -> None:
        """Show one operation; of one that resolved a reference, what would be fetched and why."""
        operation = operation_intents.own_operation(
            self._pages.service.db, answers.caller(request), operation_id
        )
        result = operation.result or {}
        self._pages.show(
            request, response, "operation", busy=operation.state in _BUSY,
            operation=OperationView.of(operation), preview=_preview(operation),
            image=result.get("image") if operation.kind in ("fetch", "save") else None,
            disk=operation.subject if operation.kind in ("create-disk", "import") else None,
            metadata=result.get("metadata"),
        )  # fmt: skip


def _preview(operation: Operation) -> dict[str, Any] | None:
    """Return what a reference stands for, None of another operation or one that has not ended."""
    result = operation.result
    if operation.kind != "resolve" or result is None:
        return None
    entry = Entry.model_validate(result["entry"]) if result["entry"] else None
    return {**result, "entry": entry}
