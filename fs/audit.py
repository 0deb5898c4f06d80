"""The audit log: who changed what, and who was refused. It is only ever appended to."""

from dataclasses import dataclass
from typing import Literal

from stratocache.fs.records import Caller
from stratocache.fs.rights import require_administrator
from stratocache.fs.state import Database, now

_NUMBER_MAX = 2**63 - 1
Outcome = Literal["done", "accepted", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One request, as the table `audit` describes it."""

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


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which lines are wanted: all that match every given value."""

    user: str | None = None
    action: str | None = None
    """That it begins with."""
    subject: str | None = None
    """It, or an object of it."""
    since: str | None = None
    until: str | None = None


def append_line(
    db: Database,
    *,
    user: str | None,
    address: str,
    method: str,
    action: str,
    subject: str,
    outcome: Outcome,
    status: int,
    operation_id: str | None = None,
    message: str = "",
) -> None:
    """Append a line."""
    with db.transaction() as connection:
        connection.execute(
            "INSERT INTO audit (at, user, address, method, action, subject, outcome, status, "
            "operation_id, message) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (now(), user, address, method, action, subject, outcome, status, operation_id, message),
        )


def lines(db: Database, wanted: AuditFilter, *, after: int, limit: int) -> list[AuditLine]:
    """Return at most `limit` lines of a greater number than `after`, oldest first."""
    conditions, values = _conditions(wanted)
    rows = db.rows(
        f"SELECT * FROM audit WHERE number > ?{conditions} ORDER BY number LIMIT ?",  # nosec B608 # no value in it
        after,
        *values,
        limit,
    )
    return [AuditLine(**dict(row)) for row in rows]


def latest_lines(
    db: Database, wanted: AuditFilter, *, before: int | None, limit: int
) -> list[AuditLine]:
    """Return at most `limit` lines of a lesser number than `before`, if given, latest first."""
    conditions, values = _conditions(wanted)
    rows = db.rows(
        f"SELECT * FROM audit WHERE number < ?{conditions} ORDER BY number DESC LIMIT ?",  # nosec B608 # no value in it
        _NUMBER_MAX if before is None else before,
        *values,
        limit,
    )
    return [AuditLine(**dict(row)) for row in rows]


def _conditions(wanted: AuditFilter) -> tuple[str, list[str]]:
    conditions, values = "", []
    for condition, value in (
        (" AND user = ?", wanted.user),
        (" AND substr(action, 1, length(?)) = ?", wanted.action),
        (" AND (subject = ? OR substr(subject, 1, length(?) + 1) = ? || '/')", wanted.subject),
        (" AND at >= ?", wanted.since),
        (" AND at < ?", wanted.until),
    ):
        if value is not None:
            conditions += condition
            values += [value] * condition.count("?")
    return conditions, values


def prune(db: Database, caller: Caller, before: str) -> int:
    """Delete the lines of before a time; return how many. Raises `Refused` (`not-allowed`)."""
    require_administrator(caller)
    with db.transaction() as connection:
        # what the trigger `keep_audit` goes by, for this transaction only
        connection.execute("UPDATE audit_retention SET before = ?", (before,))
        gone = connection.execute("DELETE FROM audit WHERE at < ?", (before,)).rowcount
        connection.execute("UPDATE audit_retention SET before = NULL")
    return gone
