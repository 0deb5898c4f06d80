"""What users ask of disks: each function is one transaction, as in `stratocache.fs.intents`."""

import sqlite3
import uuid as uuid_module
from dataclasses import asdict

from stratocache.cache.errors import Conflict, InvalidInput
from stratocache.fs import content_hold, inventory, quotas
from stratocache.fs.disk_conditions import own_disk, refuse_busy, refuse_fenced
from stratocache.fs.migrations import require_settled
from stratocache.fs.operation_intents import add_operation, stop_work
from stratocache.fs.quotas import Amounts
from stratocache.fs.records import Caller, Disk, DiskRequest, Operation, Visibility
from stratocache.fs.rights import require_administrator, require_read
from stratocache.fs.state import Database, now, record_event


def create_disk(db: Database, caller: Caller, request: DiskRequest) -> Operation:
    """Ask for a disk; the operation's subject is its UUID.

    Raises `InvalidInput` (`size-missing` for a blank disk without a size, `size-too-small`,
    `origin-ambiguous`), `NotFound` (`snapshot-unknown`),
    `Refused` (`disk-not-yours`) and `Conflict` (`snapshot-busy`).
    """
    if request.reference is None and request.snapshot is None and request.size_bytes is None:
        raise InvalidInput(
            "size-missing",
            "Give a size, or a reference or a snapshot to clone.",
            field="size_bytes",
        )
    if request.reference is not None and request.snapshot is not None:
        raise InvalidInput(
            "origin-ambiguous", "Give a reference or a snapshot, not both.", field="snapshot"
        )
    uuid = str(uuid_module.uuid4())
    with db.transaction() as connection:
        if request.reference is not None:  # else when its row is made
            wanted = Amounts(bytes=request.size_bytes or 0, disks=1)
            quotas.require(connection, caller.name, wanted)
        if request.snapshot is not None:
            _insert_clone(connection, db, caller, uuid, request, request.snapshot)
        elif request.reference is None:
            insert_disk(connection, caller.name, uuid, request)
        return add_operation(connection, caller, "create-disk", uuid, asdict(request))


def _insert_clone(
    connection: sqlite3.Connection,
    db: Database,
    caller: Caller,
    uuid: str,
    request: DiskRequest,
    snapshot_id: str,
) -> None:
    snapshot = inventory.snapshot(db, caller, snapshot_id)
    if snapshot.transient or snapshot.state != "available":
        raise Conflict(
            "snapshot-busy",
            f"Snapshot {snapshot_id} is {snapshot.state}; try again when it is not.",
        )
    size_bytes = request.size_bytes or snapshot.size_bytes
    if size_bytes < snapshot.size_bytes:
        raise InvalidInput(
            "size-too-small",
            f"A clone of {snapshot_id} needs at least {snapshot.size_bytes} bytes.",
            field="size_bytes",
        )
    parent = inventory.find_disk(db, snapshot.disk_uuid)
    assert parent is not None  # a snapshot's row refers to it
    require_read(db, caller, parent)
    refuse_fenced(db, parent)
    insert_disk(
        connection, caller.name, uuid, request, size_bytes=size_bytes,
        base_image=parent.base_image, base_snapshot=snapshot.id,
        base_manifest=snapshot.id if snapshot.form == "manifest" else None,
    )  # fmt: skip


def update_disk(
    db: Database,
    caller: Caller,
    uuid: str,
    *,
    tag: str | None = None,
    visibility: Visibility | None = None,
    owner: str | None = None,
) -> Disk:
    """Change what is written about a disk; None leaves a field as it is."""
    with db.transaction() as connection:
        disk = own_disk(db, caller, uuid)
        if owner is not None and owner != disk.owner:
            require_administrator(caller)
        connection.execute(
            "UPDATE disks SET tag = coalesce(?, tag), visibility = coalesce(?, visibility), "
            "owner = coalesce(?, owner) WHERE uuid = ?",
            (tag, visibility, owner, uuid),
        )
    return inventory.disk(db, Caller(caller.name, "admin"), uuid)


def resize_disk(db: Database, caller: Caller, uuid: str, size_bytes: int) -> Operation:
    """Ask for a disk to grow; an instance that has it sees the new size when it rescans.

    Raises `InvalidInput` (`size-shrinks`) and `Conflict` (`disk-busy`, `disk-migrating`).
    """
    with db.transaction() as connection:
        disk = own_disk(db, caller, uuid)
        if size_bytes < disk.size_bytes:
            raise InvalidInput(
                "size-shrinks",
                f"Disk {uuid} has {disk.size_bytes} bytes and can only grow; copy what you need to "
                "a smaller one.",
                field="size_bytes",
            )
        _require_available(disk)
        require_settled(db, uuid)
        growth_bytes = size_bytes - max([disk.size_bytes, *_growing_to(db, uuid)])
        quotas.require(connection, disk.owner, Amounts(bytes=growth_bytes))
        return add_operation(connection, caller, "resize", uuid, {"size_bytes": size_bytes})


def hydrate_disk(db: Database, caller: Caller, uuid: str) -> Operation:
    """Ask for an overlay to become a raw disk; asked again it answers with what is under way.

    Raises `Conflict` (`disk-busy`, `disk-migrating`, `disk-raw`).
    """
    with db.transaction() as connection:
        disk = own_disk(db, caller, uuid)
        under_way = inventory.open_operations(db, uuid, "hydrate")
        if under_way:
            return under_way[0]
        _require_available(disk)
        if disk.form == "raw":
            raise Conflict("disk-raw", f"Disk {uuid} is complete already; there is nothing to do.")
        refuse_busy(db, uuid, "rollback")
        require_settled(db, uuid)
        content_hold.require_unheld(db, uuid)
        return add_operation(connection, caller, "hydrate", uuid, {})


def restore_disk(db: Database, caller: Caller, uuid: str) -> Disk:
    """Make a disk that is in quarantine an ordinary one; raises `Conflict` (`disk-not-quarantined`)."""
    with db.transaction() as connection:
        disk = own_disk(db, caller, uuid)
        _require_available(disk)
        if disk.quarantined_at is None:
            raise Conflict("disk-not-quarantined", f"Disk {uuid} is not in quarantine.")
        connection.execute(
            "UPDATE disks SET quarantined_at = NULL, volatile = 0 WHERE uuid = ?", (uuid,)
        )
        record_event(
            connection, "disk.restored", uuid, f"{caller.name} took disk {uuid} out of quarantine."
        )
    return inventory.disk(db, Caller(caller.name, "admin"), uuid)


def delete_disk(
    db: Database, caller: Caller, uuid: str, *, with_snapshots: bool = False
) -> Operation:
    """Ask for a disk to be deleted, `with_snapshots` also when it has some.

    Raises `Conflict` (`disk-attached`, `disk-busy`, `disk-has-snapshots`).
    """
    with db.transaction() as connection:
        disk = own_disk(db, caller, uuid)
        if disk.state == "creating":
            raise Conflict("disk-busy", f"Disk {uuid} is being created; wait or cancel that.")
        holder = db.row("SELECT instance FROM attachments WHERE disk_uuid = ?", uuid)
        if holder is not None:
            raise Conflict(
                "disk-attached",
                f"Disk {uuid} is attached to {holder['instance']}; detach it first.",
            )
        refuse_busy(db, uuid, "rollback", "resize", "save")
        content_hold.require_unheld(db, uuid)
        snapshots = [item.id for item in inventory.snapshots(db, uuid) if not item.transient]
        if snapshots and not with_snapshots:
            raise Conflict(
                "disk-has-snapshots",
                f"Disk {uuid} has the snapshots {', '.join(snapshots)}; delete them first, or with "
                "it (?snapshots=delete, --snapshots).",
            )
        connection.execute("UPDATE disks SET state = 'deleting' WHERE uuid = ?", (uuid,))
        stop_work(connection, uuid)
        return add_operation(connection, caller, "delete-disk", uuid, {})


def insert_disk(
    connection: sqlite3.Connection,
    owner: str,
    uuid: str,
    request: DiskRequest,
    *,
    size_bytes: int | None = None,
    base_image: str | None = None,
    base_snapshot: str | None = None,
    base_manifest: str | None = None,
) -> None:
    """Insert a disk to be created, within the caller's transaction.

    The size, of the request unless given, must be known; `base_manifest` is what its files will be
    made of and is kept from now on. Raises what `quotas.require` raises.
    """
    wanted_bytes = size_bytes or request.size_bytes
    assert wanted_bytes is not None
    quotas.require(connection, owner, Amounts(bytes=wanted_bytes, disks=1))
    connection.execute(
        "INSERT INTO disks (uuid, state, size_bytes, base_image, base_snapshot, base_manifest, "
        "owner, tag, visibility, kind, volatile, created_at) "
        "VALUES (?, 'creating', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (uuid, wanted_bytes, base_image, base_snapshot, base_manifest, owner,
         request.tag, request.visibility, request.kind, request.volatile, now()),
    )  # fmt: skip


def _require_available(disk: Disk) -> None:
    if disk.state != "available":
        raise Conflict("disk-busy", f"Disk {disk.uuid} is {disk.state}; try again when it is not.")


def _growing_to(db: Database, uuid: str) -> list[int]:
    """Return the sizes that a disk is being grown to."""
    under_way = inventory.open_operations(db, uuid, "resize")
    return [operation.request["size_bytes"] for operation in under_way]
