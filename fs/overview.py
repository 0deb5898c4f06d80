"""What an overview shows, as few queries as possible: counts, what is under way, what is wrong."""

from dataclasses import dataclass
from typing import Any

from stratocache.fs import inventory, pages, records
from stratocache.fs.events import Event, events
from stratocache.fs.losses import losses
from stratocache.fs.pages import Condition, Page
from stratocache.fs.records import Caller, Operation
from stratocache.fs.state import Database

_PROBLEMS_MAX = 50
_STORED = (
    "SELECT coalesce(sum(stored_bytes), 0) FROM manifest_sizes WHERE name IN (SELECT id FROM {})"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that somebody should look at."""

    kind: str
    """disk, attachment, chunk, manifest, or a part of the appliance."""
    subject: str
    message: str


@dataclass(frozen=True, slots=True)
class Counts:
    """How many there are that the caller may see, by state; operations by kind."""

    images: dict[str, int]
    disks: dict[str, int]
    snapshots: dict[str, int]
    attachments: dict[str, int]
    launches: dict[str, int]
    operations: dict[str, int]
    """Those that have not ended."""


def counts(db: Database, caller: Caller) -> Counts:
    """Count what the caller may see."""
    disks = inventory.visible_disks(caller)
    everything = disks == pages.EVERYTHING
    named = f"disk_uuid IN (SELECT uuid FROM disks WHERE {disks.text})"  # nosec B608 # no value in it
    of_disks = disks if everything else Condition(named, disks.values)
    own = disks if everything else Condition("owner = ?", (caller.name,))
    launched = "operation_id IN (SELECT id FROM operations WHERE owner = ?)"
    launches = disks if everything else Condition(launched, (caller.name,))
    held = disks
    if not everything:
        held = Condition(f"(owner = ? OR {named})", (caller.name, *disks.values))
    pending = Condition(f"state IN ('pending', 'running') AND {own.text}", own.values)
    return Counts(
        images=_by(db, "images", "state", pages.EVERYTHING),
        disks=_by(db, "disks", "state", disks),
        snapshots=_by(
            db,
            "snapshots",
            "state",
            Condition(f"NOT transient AND {of_disks.text}", of_disks.values),
        ),
        attachments=_by(db, "attachments", "state", held),
        launches=_by(db, "launches", "state", launches),
        operations=_by(db, "operations", "kind", pending),
    )


def under_way(db: Database, caller: Caller, limit: int) -> list[Operation]:
    """Return the operations that have not ended and that the caller may see, newest first."""
    rows = db.rows(
        "SELECT * FROM operations WHERE state IN ('pending', 'running') AND (? OR owner = ?) "
        "ORDER BY created_at DESC, id LIMIT ?",
        caller.operator,
        caller.name,
        limit,
    )
    return [records.operation_from(row) for row in rows]


def latest_events(db: Database, caller: Caller, limit: int) -> list[Event]:
    """Return the latest events that the caller may see, newest first."""
    return events(db, caller, Page(limit, descending=True))[:limit]


def problems(db: Database, caller: Caller) -> list[Problem]:
    """Return what is wrong with what the caller may see, at most fifty of each kind."""
    disks = inventory.visible_disks(caller)
    found = [
        Problem("disk", row["uuid"], row["problem"])
        for row in _select("uuid, problem", "disks", db, disks)
    ]
    held = disks
    if disks != pages.EVERYTHING:
        held = Condition("owner = ?", (caller.name,))
    found += [
        Problem("attachment", row["id"], row["problem"])
        for row in _select("id, problem", "attachments", db, held)
    ]
    if caller.operator:
        found += [Problem(loss.kind, loss.name, loss.reason) for loss in losses(db)[:_PROBLEMS_MAX]]
    return found


def stored_bytes(db: Database) -> tuple[int, int]:
    """Return what the chunks of all images take, and those of all snapshots, each counted alone."""
    return _number(db, _STORED.format("images")), _number(db, _STORED.format("snapshots"))


def _number(db: Database, query: str) -> int:
    row = db.row(query)
    return int(row[0]) if row else 0


def _by(db: Database, table: str, column: str, condition: Condition) -> dict[str, int]:
    rows = db.rows(
        f"SELECT {column}, count(*) FROM {table} WHERE {condition.text} GROUP BY {column}",  # nosec B608 # no value in it
        *condition.values,
    )
    return {row[0]: row[1] for row in rows}


def _select(columns: str, table: str, db: Database, condition: Condition) -> list[Any]:
    return db.rows(
        f"SELECT {columns} FROM {table} WHERE problem IS NOT NULL AND {condition.text} "  # nosec B608 # no value in it
        "ORDER BY +number LIMIT ?",  # by the index of problems: there are few
        *condition.values,
        _PROBLEMS_MAX,
    )
