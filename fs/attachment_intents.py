"""What users ask of attachments, and rows of attachments; see `stratocache.fs.operation_intents`."""

import secrets
import sqlite3
import uuid as uuid_module

from stratocache.cache.errors import Conflict, NotFound, Refused
from stratocache.fs import disk_conditions, inventory, operation_intents, quotas, rights
from stratocache.fs.quotas import Amounts
from stratocache.fs.records import Access, Attachment, Caller, Operation
from stratocache.fs.state import Database, later, now, record_event

_CHAP_SECRET_BYTES = 12
"""16 characters: the longest that every initiator accepts (RFC 7143, 12.1.3)."""

_NO_OTHER = """NOT EXISTS (
    SELECT 1 FROM attachments WHERE disk_uuid = disks.uuid AND id <> ? AND state <> 'removing')
"""


def attach(
    db: Database,
    caller: Caller,
    uuid: str,
    *,
    instance: str,
    access: Access = "rw",
    initiator: str | None = None,
    lease_s: int | None = None,
) -> Operation:
    """Ask for a disk to be exported to an instance; the operation's subject is the attachment.

    With `lease_s` it ends by itself when nobody renews it for so many seconds. The same attachment
    asked for again answers with the operation that made it. Raises what `check_attachable` raises.
    """
    with db.transaction() as connection:
        disk = inventory.disk(db, caller, uuid)
        same = db.row(
            "SELECT * FROM attachments WHERE disk_uuid = ? AND instance = ? AND access = ? "
            "AND initiator IS ? AND state <> 'removing' AND migrates IS NULL",
            uuid, instance, access, initiator,
        )  # fmt: skip
        if same is not None:
            made = inventory.operations(db, subject=same["id"], limit=1)
            if made:
                return made[0]
        disk_conditions.check_attachable(db, caller, disk, access)
        attachment_id = insert_attachment(
            connection, caller.name, instance, "disk", access,
            disk_uuid=uuid, initiator=initiator, lease_s=lease_s,
        )  # fmt: skip
        return operation_intents.add_operation(
            connection, caller, "attach", attachment_id, {"disk": uuid}
        )


def detach(
    db: Database,
    caller: Caller,
    attachment_id: str,
    *,
    epoch: int | None = None,
    force: bool = False,
) -> Operation:
    """Ask for an attachment to end; asked again it answers with the operation under way.

    Its sessions are closed either way; with `force` an event proves that none is left. Of an
    attachment that is being migrated the other one stays and holds the disk. Raises `Conflict`
    (`epoch-stale`) when its epoch is not the given one.
    """
    with db.transaction() as connection:
        attachment = own_attachment(db, caller, attachment_id, epoch=epoch, ending=True)
        if attachment.state == "removing":
            under_way = inventory.open_operations(db, attachment_id, "detach")
            if under_way:
                if force:
                    _mark_fencing(connection, attachment)
                return under_way[0]
        remove_attachment(connection, attachment, fencing=force)
        return operation_intents.add_operation(
            connection, caller, "detach", attachment_id, {"force": force}
        )


def own_attachment(
    db: Database,
    caller: Caller,
    attachment_id: str,
    *,
    epoch: int | None = None,
    ending: bool = False,
) -> Attachment:
    """Return an attachment that the caller may change, or end: operators may end everybody's.

    Raises `NotFound`, `Refused` (`attachment-not-yours`) for one of a disk that the caller sees, and
    `Conflict` (`epoch-stale`).
    """
    attachment = inventory.attachment(db, attachment_id)
    if not rights.may_change(caller, attachment.owner, ending=ending):
        held = inventory.find_disk(db, attachment.disk_uuid or "")
        if not caller.operator and (held is None or not rights.rights(db, caller, held).see):
            raise NotFound("attachment-unknown", f"No attachment {attachment_id}.")
        raise Refused(
            "attachment-not-yours", f"Attachment {attachment_id} belongs to {attachment.owner}."
        )
    require_epoch(epoch, attachment.epoch, f"Attachment {attachment_id}")
    return attachment


def require_epoch(given: int | None, present: int, what: str) -> None:
    """Raise `Conflict` (`epoch-stale`) when a caller speaks of another epoch than the present."""
    if given is not None and given != present:
        raise Conflict(
            "epoch-stale",
            f"{what} is of epoch {present}, you mean epoch {given}: nothing was changed.",
            field="epoch",
        )


def quarantine(connection: sqlite3.Connection, attachment: Attachment) -> None:
    """Keep a volatile disk that nobody else has, within the caller's transaction."""
    kept = connection.execute(
        "UPDATE disks SET quarantined_at = ? WHERE uuid = ? AND volatile = 1 "  # nosec B608 # no value in it
        f"AND state = 'available' AND quarantined_at IS NULL AND {_NO_OTHER}",
        (now(), attachment.disk_uuid, attachment.id),
    )
    if kept.rowcount:
        record_event(
            connection, "disk.quarantined", attachment.disk_uuid or "",
            f"Disk {attachment.disk_uuid} is kept: instance {attachment.instance} has failed.",
        )  # fmt: skip


def remove_attachment(
    connection: sqlite3.Connection, attachment: Attachment, *, fencing: bool = False
) -> None:
    """Mark an attachment for removal; a volatile disk goes with the last, unless in quarantine."""
    connection.execute("UPDATE attachments SET state = 'removing' WHERE id = ?", (attachment.id,))
    if fencing:
        _mark_fencing(connection, attachment)
    going = connection.execute(
        "UPDATE disks SET state = 'deleting' "  # nosec B608 # no value in it
        f"WHERE uuid = ? AND volatile = 1 AND quarantined_at IS NULL AND {_NO_OTHER}",
        (attachment.disk_uuid, attachment.id),
    )
    if going.rowcount and attachment.disk_uuid is not None:
        operation_intents.stop_work(connection, attachment.disk_uuid)


def _mark_fencing(connection: sqlite3.Connection, attachment: Attachment) -> None:
    connection.execute("UPDATE attachments SET fencing = 1 WHERE id = ?", (attachment.id,))


def insert_attachment(
    connection: sqlite3.Connection,
    owner: str,
    instance: str,
    role: str,
    access: Access,
    *,
    disk_uuid: str | None = None,
    image_id: str | None = None,
    initiator: str | None = None,
    position: int = 0,
    lease_s: int | None = None,
    migrates: str | None = None,
    migration_s: int | None = None,
) -> str:
    """Insert an attachment to be made, within the caller's transaction; return its id.

    It has a secret of its own and the next epoch of its disk. One that `migrates` another is to
    take its place within `migration_s`, and counts against nobody's quota. Raises `Conflict`
    (`already-attached`) where a unique index says no, and what `quotas.require` raises.
    """
    if migrates is None:
        quotas.require(connection, owner, Amounts(attachments=1))
    attachment_id = str(uuid_module.uuid4())
    connection.execute("UPDATE disks SET epoch = epoch + 1 WHERE uuid = ?", (disk_uuid,))
    try:
        connection.execute(
            "INSERT INTO attachments (id, disk_uuid, image_id, instance, role, position, access, "
            "initiator, chap_username, sealed_secret, state, owner, created_at, epoch, lease_s, "
            "lease_expires_at, migrates, migration_expires_at) "
            "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?1, seal(?1, ?9), 'wanted', ?10, ?11, "
            "coalesce((SELECT epoch FROM disks WHERE uuid = ?2), 0), ?12, ?13, ?14, ?15)",
            (attachment_id, disk_uuid, image_id, instance, role, position, access, initiator,
             new_secret(), owner, now(), lease_s, None if lease_s is None else later(lease_s),
             migrates, None if migration_s is None else later(migration_s)),
        )  # fmt: skip
    except sqlite3.IntegrityError as error:
        if "UNIQUE" not in str(error):
            raise
        what = f"disk {disk_uuid}" if disk_uuid else f"image {image_id}"
        raise Conflict("already-attached", f"{instance} has {what} already.") from None
    return attachment_id


def new_secret() -> str:
    """Return a CHAP secret that was never used."""
    return secrets.token_urlsafe(_CHAP_SECRET_BYTES)
