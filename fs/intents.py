"""Writes of the state database on behalf of users: what should be, and work that is asked for.

Each function is one transaction that checks every rule and either records the whole intent or
raises and records nothing. The caller pokes `blockd` afterwards; `blockd` makes it so
(`stratocache.fs.reconciler`, `stratocache.fs.operations`). Limits on single values are checked at
the edge, in `stratocache.api.models`. What is asked of disks and snapshots is in
`stratocache.fs.disk_intents` and `stratocache.fs.snapshot_intents`.
"""

import json
import secrets
import sqlite3
import uuid as uuid_module
from dataclasses import asdict
from typing import Any

from stratocache.cache.errors import Conflict, NotFound, Refused
from stratocache.cache.structured_log import ON_BEHALF
from stratocache.fs import content_hold, idempotency, inventory, quotas, records, rights
from stratocache.fs.quotas import Amounts
from stratocache.fs.records import (
    Access,
    Attachment,
    Caller,
    Disk,
    Image,
    Launch,
    LaunchRequest,
    Operation,
)
from stratocache.fs.state import Database, later, now, record_event

_CHAP_SECRET_BYTES = (
    12  # 16 characters: the longest that every initiator accepts (RFC 7143, 12.1.3)
)

_NO_OTHER = """NOT EXISTS (
    SELECT 1 FROM attachments WHERE disk_uuid = disks.uuid AND id <> ? AND state <> 'removing')
"""

CANCELLABLE = frozenset({
    "fetch", "launch", "create-disk", "hydrate", "import-disk", "save", "evict", "verify-image",
    "resolve",
})  # fmt: skip
"""Kinds of operations that can be asked to stop."""


def request_fetch(db: Database, caller: Caller, reference: str, *, pin: bool = False) -> Operation:
    """Ask for an image to be in the cache, for good when `pin` is set (operators only)."""
    if pin:
        require_operator(caller)
    with db.transaction() as connection:
        return add_operation(
            connection, caller, "fetch", reference, {"reference": reference, "pin": pin}
        )


def request_image_deletion(db: Database, caller: Caller, image_id: str) -> Operation:
    """Ask for an image to leave the cache.

    Raises `Conflict` (`image-in-use`, `image-pinned`, `image-busy`) and `NotFound`.
    """
    require_operator(caller)
    with db.transaction() as connection:
        image = inventory.image(db, image_id)
        if image.state == "fetching":
            raise Conflict("image-busy", f"Image {image_id} is being fetched; cancel that first.")
        if image.pinned:
            raise Conflict("image-pinned", f"Image {image_id} is pinned; unpin it first.")
        _refuse_used_image(db, image_id)
        if image.state == "provisional":
            _refuse_needed_image(db, image_id)
        connection.execute("UPDATE images SET state = 'deleting' WHERE id = ?", (image_id,))
        return add_operation(connection, caller, "delete-image", image_id, {})


def _refuse_used_image(db: Database, image_id: str) -> None:
    clone = db.row("SELECT uuid FROM disks WHERE base_manifest = ?", image_id)
    if clone is not None:
        raise Conflict("image-in-use", f"Image {image_id} is the base of disk {clone['uuid']}.")
    held = db.row("SELECT instance FROM attachments WHERE image_id = ?", image_id)
    if held is not None:
        raise Conflict("image-in-use", f"Image {image_id} is attached to {held['instance']}.")


def _refuse_needed_image(db: Database, image_id: str) -> None:
    """Raise while any disk began as an incomplete image: a snapshot of it may lack chunks, which
    only this image's entry says where to get."""
    for uuid in inventory.disks_of_image(db, image_id):
        raise Conflict(
            "image-in-use", f"Image {image_id} is not complete, and disk {uuid} began as it."
        )


def set_pin(db: Database, caller: Caller, image_id: str, pinned: bool) -> Image:
    """Pin or unpin an image; doing so twice is no error."""
    require_operator(caller)
    with db.transaction() as connection:
        inventory.image(db, image_id)
        connection.execute("UPDATE images SET pinned = ? WHERE id = ?", (pinned, image_id))
    return inventory.image(db, image_id)


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
        check_attachable(db, caller, disk, access)
        attachment_id = insert_attachment(
            connection, caller.name, instance, "disk", access,
            disk_uuid=uuid, initiator=initiator, lease_s=lease_s,
        )  # fmt: skip
        return add_operation(connection, caller, "attach", attachment_id, {"disk": uuid})


def check_attachable(db: Database, caller: Caller, disk: Disk, access: Access) -> None:
    """Raise unless the caller may attach the disk in this way now.

    `Conflict`: `disk-attached` naming the holder, `disk-fencing` while the holder is cut off,
    `disk-missing`, `disk-busy`, `disk-quarantined`. `Refused`: `disk-not-yours`, `disk-readonly`.
    """
    if disk.state != "available":
        raise Conflict("disk-busy", f"Disk {disk.uuid} is {disk.state}; try again when it is not.")
    if disk.problem is not None:
        raise Conflict("disk-missing", f"{disk.problem} Bring them back, or delete the disk.")
    refuse_busy(db, disk.uuid, "rollback")
    refuse_fenced(db, disk)
    granted = rights.require_read(db, caller, disk)
    if access == "rw":
        if not granted.write:
            raise Refused("disk-not-yours", f"Disk {disk.uuid} may only be attached read-only.")
        if disk.kind == "readonly":
            raise Refused(
                "disk-readonly", f"Disk {disk.uuid} is read-only; attach it with access ro."
            )
        if disk.quarantined_at is not None:
            raise Conflict(
                "disk-quarantined",
                f"Disk {disk.uuid} is in quarantine; restore it, or attach it with access ro.",
            )
    for other in inventory.attachments(db, disk_uuid=disk.uuid):
        if "rw" in (access, other.access):
            if other.fencing:
                raise Conflict(
                    "disk-fencing",
                    f"Disk {disk.uuid} is being taken from {other.instance}; try again in a moment.",
                )
            raise Conflict(
                "disk-attached",
                f"Disk {disk.uuid} is attached to {other.instance} ({other.access}); detach it first.",
            )
    content_hold.require_unheld(db, disk.uuid, for_reading=access == "ro")


def refuse_fenced(db: Database, disk: Disk) -> None:
    """Raise `Refused` (`disk-fenced`) for a disk that began as an image that was rejected."""
    if inventory.is_fenced(db, disk):
        raise Refused(
            "disk-fenced",
            f"Disk {disk.uuid} began as image {disk.base_image}, which is not what its endorser promised; "
            "download what you need of it and delete it.",
        )


def refuse_busy(db: Database, uuid: str, *kinds: str) -> None:
    """Raise `Conflict` (`disk-busy`) while an operation of one of these kinds is open on a disk."""
    for operation in inventory.open_operations(db, uuid, *kinds):
        raise Conflict(
            "disk-busy",
            f"Operation {operation.id} ({operation.kind}) is under way on disk {uuid}; "
            "wait for its end.",
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
        return add_operation(connection, caller, "detach", attachment_id, {"force": force})


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
    if not may_change(caller, attachment.owner, ending=ending):
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


def request_launch(db: Database, caller: Caller, request: LaunchRequest) -> Operation:
    """Ask for everything that booting an instance needs; repeated, it answers with the first.

    Raises `Conflict` (`instance-exists`) when the instance was launched with another request.
    """
    wanted = asdict(request)
    with db.transaction() as connection:
        row = db.row("SELECT * FROM launches WHERE instance = ?", request.instance)
        if row is not None:
            launch = records.launch_from(row)
            if launch.state == "ending":
                raise Conflict(
                    "instance-busy",
                    f"Instance {request.instance} is being taken down; try again in a moment.",
                )
            # requests of older versions lack what they did not know
            if {"lease_s": None, **launch.request} == json.loads(json.dumps(wanted)):
                return inventory.operation(db, launch.operation_id)
            raise Conflict(
                "instance-exists",
                f"Instance {request.instance} was launched with another request; halt it first.",
            )
        for uuid in request.disks:
            check_attachable(db, caller, inventory.disk(db, caller, uuid), "rw")
        held = Amounts(
            bytes=request.size_bytes or 0,
            disks=1,
            attachments=1 + len(request.disks) + len(request.readonly),
        )
        quotas.require(connection, caller.name, held)
        operation = add_operation(connection, caller, "launch", request.instance, wanted)
        connection.execute(
            "INSERT INTO launches (instance, operation_id, request, state, lease_s, created_at) "
            "VALUES (?, ?, ?, 'preparing', ?, ?)",
            (request.instance, operation.id, json.dumps(wanted), request.lease_s, now()),
        )
        return operation


def halt(
    db: Database,
    caller: Caller,
    instance: str,
    *,
    failed: bool = False,
    epoch: int | None = None,
) -> Operation:
    """Ask for an instance's attachments to end, and its volatile disks to be deleted.

    Those of an instance that has `failed` go to quarantine instead. Raises `Conflict`
    (`epoch-stale`) when the instance has been launched anew since.
    """
    with db.transaction() as connection:
        launch = own_launch(db, caller, instance, epoch=epoch, ending=True)
        if launch.state == "preparing":
            raise Conflict(
                "instance-busy",
                f"Instance {instance} is being launched; cancel operation {launch.operation_id}.",
            )
        if launch.state == "ending":
            under_way = inventory.open_operations(db, instance, "halt")
            if under_way:
                return under_way[0]
        end_launch(connection, db, instance, failed=failed)
        return add_operation(connection, caller, "halt", instance, {"failed": failed})


def own_launch(
    db: Database,
    caller: Caller,
    instance: str,
    *,
    epoch: int | None = None,
    ending: bool = False,
) -> Launch:
    """Return a launch that the caller may change, or end: operators may end everybody's.

    Raises `NotFound`, `Refused` (`launch-not-yours`) and `Conflict` (`epoch-stale`).
    """
    launch = inventory.launch(db, instance)
    owner = inventory.operation(db, launch.operation_id).owner
    if not may_change(caller, owner, ending=ending):
        if not caller.operator:
            raise NotFound("instance-unknown", f"No instance {instance} was launched here.")
        raise Refused("launch-not-yours", f"Instance {instance} was launched by {owner}.")
    require_epoch(epoch, launch.epoch, f"Instance {instance}")
    return launch


def end_launch(
    connection: sqlite3.Connection,
    db: Database,
    instance: str,
    *,
    failed: bool = False,
    fencing: bool = False,
) -> None:
    """Mark all of a launch for removal, within the caller's transaction."""
    connection.execute("UPDATE launches SET state = 'ending' WHERE instance = ?", (instance,))
    for attachment in inventory.attachments(db, instance=instance):
        if failed:
            quarantine(connection, attachment)
        remove_attachment(connection, attachment, fencing=fencing)


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
        stop_work(connection, attachment.disk_uuid)


def _mark_fencing(connection: sqlite3.Connection, attachment: Attachment) -> None:
    connection.execute("UPDATE attachments SET fencing = 1 WHERE id = ?", (attachment.id,))


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
    if not may_change(caller, operation.owner, ending=True):
        raise NotFound("operation-unknown", f"No operation {operation_id}.")
    return operation


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


def own_disk(db: Database, caller: Caller, uuid: str) -> Disk:
    """Return a disk that the caller may change; raises `Refused` (`disk-not-yours`), `NotFound`."""
    disk = inventory.disk(db, caller, uuid)
    if not rights.rights(db, caller, disk).own:
        raise Refused("disk-not-yours", f"Disk {uuid} belongs to {disk.owner}.")
    return disk


def may_change(caller: Caller, owner: str, *, ending: bool) -> bool:
    """Tell whether the caller may change, or end, what somebody has asked for."""
    return caller.name == owner or (caller.operator if ending else caller.administrator)


def require_administrator(caller: Caller) -> None:
    """Raise `Refused` (`not-allowed`) for others than administrators."""
    if not caller.administrator:
        raise Refused("not-allowed", "Only administrators may do this.")


def require_operator(caller: Caller) -> None:
    """Raise `Refused` (`not-allowed`) for ordinary users."""
    if not caller.operator:
        raise Refused("not-allowed", "Only operators and administrators may do this.")
