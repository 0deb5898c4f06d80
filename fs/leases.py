"""Leases: attachments, launches and migrations that end by themselves when nobody renews them.

The wall clock decides, as a lease outlives processes and the host; see ATTACHMENTS.md for what a
clock that jumps does. Expiry is a detach by force; volatile disks go to quarantine, as of an
instance that has failed.
"""

from collections.abc import Callable
from datetime import UTC, datetime

from stratocache.cache.errors import Conflict
from stratocache.fs import inventory, records
from stratocache.fs.attachment_intents import own_attachment, quarantine, remove_attachment
from stratocache.fs.launch_intents import end_launch, own_launch
from stratocache.fs.records import Attachment, Caller, Launch
from stratocache.fs.state import Database, later, record_event, timestamp

LEASE_S_MIN = 10
LEASE_S_MAX = 30 * 24 * 3600

_ATTACHMENTS = """
    SELECT * FROM attachments WHERE lease_expires_at <= ? AND state <> 'removing'
"""
_LAUNCHES = "SELECT * FROM launches WHERE lease_expires_at <= ? AND state = 'active'"
# not those whose first attachment ends: they hold the disk from then on
_MIGRATIONS = """
    SELECT new.* FROM attachments AS new JOIN attachments AS old ON old.id = new.migrates
    WHERE new.migrates IS NOT NULL AND new.migration_expires_at <= ?
    AND new.state <> 'removing' AND old.state <> 'removing'
"""
_NEXT = """
    SELECT min(at) AS at FROM (
        SELECT lease_expires_at AS at FROM attachments
        WHERE lease_expires_at IS NOT NULL AND state <> 'removing'
        UNION ALL SELECT lease_expires_at FROM launches
        WHERE lease_expires_at IS NOT NULL AND state = 'active'
        UNION ALL SELECT new.migration_expires_at
        FROM attachments AS new JOIN attachments AS old ON old.id = new.migrates
        WHERE new.migrates IS NOT NULL AND new.state <> 'removing' AND old.state <> 'removing')
"""


def utc_now() -> datetime:
    """Return the present time of the wall clock."""
    return datetime.now(UTC)


class Leases:
    """Ends what is over, by a clock."""

    def __init__(self, db: Database, clock: Callable[[], datetime] = utc_now) -> None:
        self._db = db
        self._clock = clock

    def remaining_s(self) -> float | None:
        """Return how long nothing ends by itself, 0 when something is due, None when for ever."""
        row = self._db.row(_NEXT)
        if row is None or row["at"] is None:
            return None
        return max(0.0, (datetime.fromisoformat(row["at"]) - self._clock()).total_seconds())

    def expire(self) -> None:
        """Mark for removal what is over, in one transaction."""
        at = timestamp(self._clock())
        with self._db.transaction() as connection:
            for row in self._db.rows(_LAUNCHES, at):
                instance = row["instance"]
                end_launch(connection, self._db, instance, failed=True, fencing=True)
                record_event(
                    connection, "lease.expired", instance,
                    f"Nobody renewed the lease of instance {instance} in {row['lease_s']} s; its "
                    "disks are taken from it.",
                )  # fmt: skip
            for row in self._db.rows(_ATTACHMENTS, at):
                item = records.attachment_from(row)
                quarantine(connection, item)
                remove_attachment(connection, item, fencing=True)
                record_event(
                    connection, "lease.expired", item.id,
                    f"Nobody renewed the lease of {item.instance} on disk {item.disk_uuid} in "
                    f"{item.lease_s} s; it is taken from it.",
                )  # fmt: skip
            for row in self._db.rows(_MIGRATIONS, at):
                item = records.attachment_from(row)
                remove_attachment(connection, item, fencing=True)
                record_event(
                    connection, "migration.expired", item.id,
                    f"Nobody completed the migration of disk {item.disk_uuid} to {item.instance} "
                    "in time; it is undone.",
                )  # fmt: skip


def renew_attachment(
    db: Database,
    caller: Caller,
    attachment_id: str,
    *,
    lease_s: int | None = None,
    epoch: int | None = None,
) -> Attachment:
    """Let an attachment live for another `lease_s`, as long as last time unless given.

    Raises `Conflict`: `lease-expired` when it is ending, `lease-of-launch`, `lease-missing`,
    `epoch-stale`.
    """
    with db.transaction() as connection:
        item = own_attachment(db, caller, attachment_id, epoch=epoch)
        if item.state == "removing":
            raise _over(f"Attachment {attachment_id}")
        launched = db.row("SELECT 1 FROM launches WHERE instance = ?", item.instance)
        if launched is not None and item.lease_s is None:
            raise Conflict(
                "lease-of-launch",
                f"Attachment {attachment_id} belongs to instance {item.instance}; renew the "
                "lease of that.",
            )
        seconds = _length(lease_s or item.lease_s, f"Attachment {attachment_id}")
        connection.execute(
            "UPDATE attachments SET lease_s = ?, lease_expires_at = ? WHERE id = ?",
            (seconds, later(seconds), attachment_id),
        )
    return inventory.attachment(db, attachment_id)


def renew_launch(
    db: Database,
    caller: Caller,
    instance: str,
    *,
    lease_s: int | None = None,
    epoch: int | None = None,
) -> Launch:
    """Let an instance have its disks for another `lease_s`; see `renew_attachment`."""
    with db.transaction() as connection:
        launch = own_launch(db, caller, instance, epoch=epoch)
        if launch.state == "ending":
            raise _over(f"Instance {instance}")
        seconds = _length(lease_s or launch.lease_s, f"Instance {instance}")
        connection.execute(
            "UPDATE launches SET lease_s = ?, lease_expires_at = ? WHERE instance = ?",
            (seconds, later(seconds), instance),
        )
    return inventory.launch(db, instance)


def _length(lease_s: int | None, what: str) -> int:
    if lease_s is None:
        raise Conflict(
            "lease-missing", f"{what} has no lease yet; say for how many seconds.", field="lease_s"
        )
    return lease_s


def _over(what: str) -> Conflict:
    return Conflict("lease-expired", f"{what} is ending; it cannot be renewed any more.")
