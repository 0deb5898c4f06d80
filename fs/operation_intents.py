"""Work that is asked for, and its end before its time, as rows of the state database.

What users ask for is in `…_intents`, a module for each kind of subject. Each function there is one
transaction that checks every rule and either records the whole intent or raises and records
nothing. The caller pokes `blockd` afterwards; `blockd` makes it so (`stratocache.fs.reconciler`,
`stratocache.fs.operations`). Limits on single values are checked at the edge, in
`stratocache.api.models`.
"""

import json
import sqlite3
import uuid as uuid_module
from typing import Any

from stratocache.cache.errors import Conflict, NotFound
from stratocache.cache.structured_log import ON_BEHALF
from stratocache.fs import idempotency, inventory, records, rights
from stratocache.fs.records import Caller, Operation
from stratocache.fs.state import Database, now, record_event

CANCELLABLE = frozenset({
    "fetch", "launch", "create-disk", "hydrate", "import-disk", "save", "evict", "verify-image",
    "resolve",
})  # fmt: skip
"""Kinds of operations that can be asked to stop."""


def stop_work(connection: sqlite3.Connection, uuid: str) -> None:
    """Cancel long work on a disk that is about to go, within the caller's transaction."""
    connection.execute(
        "UPDATE operations SET cancel_requested = 1, updated_at = ? WHERE subject = ? "
        "AND kind IN ('hydrate', 'save') AND state IN ('pending', 'running')",
        (now(), uuid),
    )


def request_cancel(db: Database, caller: Caller, operation_id: str) -> Operation:
    """Ask for an operation to stop; one that has ended stays as it is."""
    with db.transaction() as connection:
        operation = own_operation(db, caller, operation_id)
        if operation.finished:
            return operation
        if operation.kind not in CANCELLABLE:
            raise Conflict("operation-not-cancellable", f"A {operation.kind} cannot be cancelled.")
        connection.execute(
            "UPDATE operations SET cancel_requested = 1, updated_at = ? WHERE id = ?",
            (now(), operation_id),
        )
    return inventory.operation(db, operation_id)


def own_operation(db: Database, caller: Caller, operation_id: str) -> Operation:
    """Return an operation that the caller may see and stop: their own, operators everybody's.

    Raises `NotFound` (`operation-unknown`).
    """
    operation = inventory.operation(db, operation_id)
    if not rights.may_change(caller, operation.owner, ending=True):
        raise NotFound("operation-unknown", f"No operation {operation_id}.")
    return operation


def add_operation(
    connection: sqlite3.Connection, caller: Caller, kind: str, subject: str, request: dict[str, Any]
) -> Operation:
    """Insert a pending operation within the caller's transaction."""
    operation_id, at = str(uuid_module.uuid4()), now()
    connection.execute(
        "INSERT INTO operations (id, kind, subject, state, request, owner, created_at, updated_at, "
        "request_id) VALUES (?, ?, ?, 'pending', ?, ?, ?, ?, ?)",
        (
            operation_id,
            kind,
            subject,
            json.dumps(request),
            caller.name,
            at,
            at,
            ON_BEHALF.get().request_id or None,
        ),
    )
    idempotency.note_operation(connection, operation_id)
    record_event(
        connection, f"{kind}.requested", subject, f"{caller.name} asked for {kind}.",
        asker=caller.name,
    )  # fmt: skip
    row = connection.execute("SELECT * FROM operations WHERE id = ?", (operation_id,)).fetchone()
    return records.operation_from(row)
