"""What came of attachments, as rows and events: one transaction for all of a pass."""

import sqlite3
from dataclasses import dataclass, field

from stratocache.cache.errors import Cancelled, StratocacheError
from stratocache.fs.launch_ends import settle_ready
from stratocache.fs.operation_ends import fail, finish, undo_launch
from stratocache.fs.records import Attachment
from stratocache.fs.state import Database, record_event


@dataclass
class Outcomes:
    """What a pass did; `record` makes it known."""

    ended: list[Attachment] = field(default_factory=list)
    """Of which no target and no session is left."""
    made: list[tuple[Attachment, int]] = field(default_factory=list)
    """Whose target is right, with the generation of the disk that it was made of."""
    failed: list[tuple[Attachment, StratocacheError]] = field(default_factory=list)
    """Which were to be new and cannot be."""
    stuck: list[tuple[Attachment, str]] = field(default_factory=list)
    """Which are not yet what they should be, and why: they are tried again."""
    repaired: list[tuple[Attachment, str]] = field(default_factory=list)
    """Whose target was found otherwise than it had been left, and how."""

    def __bool__(self) -> bool:
        return bool(self.ended or self.made or self.failed or self.stuck or self.repaired)

    def record(self, db: Database) -> None:
        """Write it down, all or nothing. Blocks."""
        with db.transaction() as connection:
            for item in self.ended:
                _end(connection, item)
            for item, generation in self.made:
                connection.execute(
                    "UPDATE attachments SET generation = ?, problem = NULL, "
                    "state = CASE state WHEN 'wanted' THEN 'ready' ELSE state END WHERE id = ?",
                    (generation, item.id),
                )
                finish(connection, "attach", item.id, {"attachment": item.id})
                finish(connection, "migrate", item.id, {"attachment": item.id})
            if self.made:
                settle_ready(connection)
            for item, error in self.failed:
                _fail(connection, db, item, error)
            for item, why in self.stuck:
                connection.execute(
                    "UPDATE attachments SET problem = ? WHERE id = ?", (why, item.id)
                )
                record_event(
                    connection, "attachment.stuck", item.id,
                    f"{_name(item)} is {item.state} and stays so for now: {why}",
                )  # fmt: skip
            for item, what in self.repaired:
                record_event(
                    connection, "attachment.repaired", item.id, f"{_name(item)}: {what}; repaired."
                )


def _end(connection: sqlite3.Connection, item: Attachment) -> None:
    row = connection.execute(
        "DELETE FROM attachments WHERE id = ? RETURNING fencing", (item.id,)
    ).fetchone()
    fencing = row is not None and row["fencing"]  # it may have become one since
    heir = connection.execute(
        "UPDATE attachments SET migrates = NULL, migration_expires_at = NULL WHERE migrates = ? "
        "RETURNING id, instance, state",
        (item.id,),
    ).fetchone()
    gone = Cancelled("detached", "It was detached.")
    fail(connection, "attach", item.id, gone)
    fail(connection, "migrate", item.id, gone)
    finish(connection, "detach", item.id, {})
    if fencing:
        record_event(
            connection, "attachment.fenced", item.id,
            f"{_name(item)} is cut off: its target is gone and no session is left.",
        )  # fmt: skip
    if heir is not None and heir["state"] != "removing":
        record_event(
            connection, "attachment.migrated", heir["id"],
            f"Disk {item.disk_uuid} has moved from {item.instance} to {heir['instance']}.",
        )  # fmt: skip


def _fail(
    connection: sqlite3.Connection, db: Database, item: Attachment, error: StratocacheError
) -> None:
    fail(connection, "attach", item.id, error)
    fail(connection, "migrate", item.id, error)
    launch = db.row(
        "SELECT 1 FROM launches WHERE instance = ? AND state = 'preparing'", item.instance
    )
    if launch is not None and item.migrates is None:
        undo_launch(connection, db, item.instance, error)
    else:
        # not `remove_attachment`: what could not be attached is not detached, nor deleted
        connection.execute("UPDATE attachments SET state = 'removing' WHERE id = ?", (item.id,))


def _name(item: Attachment) -> str:
    what = f"disk {item.disk_uuid}" if item.disk_uuid else f"image {item.image_id}"
    return f"Attachment {item.id} of {what} to {item.instance} (epoch {item.epoch})"
