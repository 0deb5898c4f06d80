"""Live migration: a second read-write attachment of a disk, for a while, that takes over the first.

Both have a target, a secret and an epoch of their own. What the disk is does not change meanwhile:
who wants that is told to wait (`require_settled`). See ATTACHMENTS.md.
"""

from stratocache.cache.errors import Conflict
from stratocache.fs import inventory
from stratocache.fs.attachment_intents import insert_attachment, own_attachment, remove_attachment
from stratocache.fs.disk_conditions import refuse_busy
from stratocache.fs.operation_intents import add_operation
from stratocache.fs.records import Attachment, Caller, Operation
from stratocache.fs.state import Database


def migrate(
    db: Database,
    caller: Caller,
    attachment_id: str,
    *,
    instance: str,
    initiator: str | None = None,
    timeout_s: int,
    epoch: int | None = None,
) -> Operation:
    """Ask for a second attachment of a disk; the operation's subject is the new one.

    The instance may be the same as before. What nobody completes in `timeout_s` is undone. Asked
    again, by the same instance and initiator, it answers with the operation that made it. Raises
    `Conflict`: `attachment-not-movable`, `disk-migrating`, `disk-busy`, `epoch-stale`.
    """
    with db.transaction() as connection:
        source = own_attachment(db, caller, attachment_id, epoch=epoch)
        if source.disk_uuid is None or source.access != "rw" or source.state != "ready":
            raise Conflict(
                "attachment-not-movable",
                f"Attachment {attachment_id} is {source.access} and {source.state}; only one that "
                "is rw and ready can be migrated.",
            )
        for other in inventory.attachments(db, disk_uuid=source.disk_uuid):
            if other.id == source.id:
                continue
            made = inventory.operations(db, subject=other.id, limit=1)
            same = (other.instance, other.initiator, other.migrates) == (
                instance, initiator, source.id,
            )  # fmt: skip
            if same and other.state != "removing" and made and made[0].kind == "migrate":
                return made[0]
            raise _migrating(source.disk_uuid, other)
        _refuse_change(db, source.disk_uuid)
        new_id = insert_attachment(
            connection, source.owner, instance, source.role, "rw", disk_uuid=source.disk_uuid,
            initiator=initiator, position=source.position, lease_s=source.lease_s,
            migrates=source.id, migration_s=timeout_s,
        )  # fmt: skip
        wanted = {"disk": source.disk_uuid, "from": source.id, "timeout_s": timeout_s}
        return add_operation(connection, caller, "migrate", new_id, wanted)


def complete(
    db: Database, caller: Caller, attachment_id: str, *, epoch: int | None = None
) -> Operation | None:
    """Ask for the first attachment to end, by force, so that the new one holds the disk.

    Returns the operation, whose subject is the first; None when the new one holds it already.
    Raises `Conflict` (`attachment-not-movable`) when the new one is not ready.
    """
    with db.transaction() as connection:
        new = own_attachment(db, caller, attachment_id, epoch=epoch)
        if new.state != "ready":
            raise Conflict(
                "attachment-not-movable", f"Attachment {attachment_id} is {new.state}, not ready."
            )
        if new.migrates is None:
            return None
        source = inventory.attachment(db, new.migrates)
        under_way = inventory.open_operations(db, source.id, "detach")
        remove_attachment(connection, source, fencing=True)
        if under_way:
            return under_way[0]
        return add_operation(connection, caller, "detach", source.id, {"force": True})


def is_migrating(db: Database, uuid: str) -> bool:
    """Tell whether a disk has two read-write attachments now."""
    found = db.row("SELECT 1 FROM attachments WHERE disk_uuid = ? AND migrates IS NOT NULL", uuid)
    return found is not None


def require_settled(db: Database, uuid: str) -> None:
    """Raise `Conflict` (`disk-migrating`) while a disk is being migrated."""
    for item in inventory.attachments(db, disk_uuid=uuid):
        if item.migrates is not None:
            raise _migrating(uuid, item)


def _migrating(uuid: str, new: Attachment) -> Conflict:
    return Conflict(
        "disk-migrating",
        f"Disk {uuid} is being migrated to {new.instance} (attachment {new.id}); complete or abort "
        "that first.",
    )


def _refuse_change(db: Database, uuid: str) -> None:
    refuse_busy(db, uuid, "rollback", "resize")
    for snapshot in inventory.snapshots(db, uuid):
        if snapshot.state == "creating":
            raise Conflict(
                "disk-busy", f"Snapshot {snapshot.id} of disk {uuid} is being made; wait for it."
            )
