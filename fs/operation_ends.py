"""How operations end, as rows: done, failed or cancelled, with the event that says so."""

import json
import sqlite3
from typing import Any

from stratocache.cache.errors import Cancelled, StratocacheError
from stratocache.fs import launch_intents
from stratocache.fs.state import Database, now, record_event


def finish(
    connection: sqlite3.Connection,
    kind: str,
    subject: str,
    result: dict[str, Any],
    operation_id: str | None = None,
) -> None:
    """End the open operations of a kind on a subject (or one of them) as done."""
    ended = _end(connection, kind, subject, "done", "result", result, operation_id)
    if ended:
        message = f"{kind} of {subject} is done."
        record_event(connection, f"{kind}.done", subject, message, asker=ended[0]["owner"])


def fail(
    connection: sqlite3.Connection,
    kind: str,
    subject: str,
    error: StratocacheError,
    operation_id: str | None = None,
) -> None:
    """End the open operations of a kind on a subject (or one of them) as failed or cancelled."""
    state = "cancelled" if isinstance(error, Cancelled) else "failed"
    record = dict(error.to_record())
    ended = _end(connection, kind, subject, state, "error", record, operation_id)
    if ended:
        record_event(connection, f"{kind}.{state}", subject, error.message, asker=ended[0]["owner"])


def undo_launch(
    connection: sqlite3.Connection, db: Database, instance: str, error: StratocacheError
) -> None:
    """Mark all of a launch for removal; its operation fails once nothing of it is left."""
    launch_intents.end_launch(connection, db, instance)
    connection.execute(
        "UPDATE operations SET error = coalesce(error, ?) WHERE kind = 'launch' AND subject = ? "
        "AND state IN ('pending', 'running')",
        (json.dumps(error.to_record()), instance),
    )


def _end(
    connection: sqlite3.Connection,
    kind: str,
    subject: str,
    state: str,
    column: str,
    value: dict[str, Any],
    operation_id: str | None,
) -> list[sqlite3.Row]:
    return connection.execute(
        f"UPDATE operations SET state = :state, {column} = :value, updated_at = :at "  # nosec B608 # no value in it
        "WHERE kind = :kind AND subject = :subject AND state IN ('pending', 'running') "
        "AND (:id IS NULL OR id = :id) RETURNING owner",
        {
            "state": state,
            "value": json.dumps(value),
            "at": now(),
            "kind": kind,
            "subject": subject,
            "id": operation_id,
        },
    ).fetchall()
