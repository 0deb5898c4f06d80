"""What users ask of snapshots: each function is one transaction, as in `stratocache.fs.intents`."""

import sqlite3
import uuid as uuid_module
from dataclasses import asdict

from stratocache.cache.errors import Conflict
from stratocache.fs import content_hold, inventory
from stratocache.fs.disk_conditions import own_disk, refuse_busy
from stratocache.fs.migrations import require_settled
from stratocache.fs.operation_intents import add_operation
from stratocache.fs.records import Caller, Disk, Operation, SaveRequest, Snapshot
from stratocache.fs.rights import require_write
from stratocache.fs.state import Database, now


def create_snapshot(db: Database, caller: Caller, uuid: str, *, tag: str = "") -> Operation:
    """Ask for a snapshot of a disk; the operation's subject is its id.

    The operation is done as soon as the disk's present content is kept for good. Raises `Conflict`
    (`disk-busy`, `disk-migrating`).
    """
    with db.transaction() as connection:
        disk = inventory.disk(db, caller, uuid)
        require_write(db, caller, disk)
        _require_at_rest(db, disk)
        require_settled(db, uuid)
        snapshot_id = _insert(connection, disk, caller.name, tag=tag)
        return add_operation(
            connection, caller, "snapshot", snapshot_id, {"disk": uuid, "tag": tag}
        )


def delete_snapshot(db: Database, caller: Caller, uuid: str, snapshot_id: str) -> Operation:
    """Ask for a snapshot to go, from anywhere among a disk's; its clones are not touched.

    Asked again it answers with the operation under way. Raises `Conflict` (`snapshot-busy`).
    """
    with db.transaction() as connection:
        own_disk(db, caller, uuid)
        snapshot = inventory.snapshot(db, caller, snapshot_id, disk_uuid=uuid)
        under_way = inventory.open_operations(db, snapshot_id, "delete-snapshot")
        if under_way:
            return under_way[0]
        _require_available(snapshot)
        for operation in inventory.open_operations(db, uuid, "rollback", "save"):
            if operation.request["snapshot"] == snapshot_id:
                raise Conflict(
                    "snapshot-busy",
                    f"Operation {operation.id} ({operation.kind}) uses snapshot {snapshot_id}; "
                    "wait for its end.",
                )
        content_hold.require_unheld_snapshot(db, snapshot)
        connection.execute("UPDATE snapshots SET state = 'deleting' WHERE id = ?", (snapshot_id,))
        return add_operation(connection, caller, "delete-snapshot", snapshot_id, {"disk": uuid})


def rollback(db: Database, caller: Caller, uuid: str, snapshot_id: str) -> Operation:
    """Ask for a disk to become again what it was at a snapshot; its size stays what it is now.

    What was written since is lost, other snapshots stay. The same asked again answers with the
    operation under way. Raises `Conflict` (`disk-attached`, `disk-busy`, `snapshot-busy`).
    """
    with db.transaction() as connection:
        own_disk(db, caller, uuid)
        for operation in inventory.open_operations(db, uuid, "rollback"):
            if operation.request["snapshot"] == snapshot_id:
                return operation
        _changeable(db, caller, uuid)
        holder = db.row("SELECT instance FROM attachments WHERE disk_uuid = ?", uuid)
        if holder is not None:
            raise Conflict(
                "disk-attached",
                f"Disk {uuid} is attached to {holder['instance']}; detach it before the rollback.",
            )
        refuse_busy(db, uuid, "hydrate", "resize")
        content_hold.require_unheld(db, uuid)
        _require_available(inventory.snapshot(db, caller, snapshot_id, disk_uuid=uuid))
        return add_operation(connection, caller, "rollback", uuid, {"snapshot": snapshot_id})


def save_disk(db: Database, caller: Caller, uuid: str, request: SaveRequest) -> Operation:
    """Ask for a disk, as it is now or was at a snapshot, to become an image of this host's cache.

    Raises `Conflict` (`disk-busy`, `disk-migrating`, `snapshot-busy`).
    """
    with db.transaction() as connection:
        disk = _changeable(db, caller, uuid)
        wanted = asdict(request)
        if request.snapshot is None:
            require_settled(db, uuid)
            wanted["snapshot"] = _insert(connection, disk, caller.name, transient=True)
        else:
            _require_available(inventory.snapshot(db, caller, request.snapshot, disk_uuid=uuid))
        return add_operation(connection, caller, "save", uuid, wanted)


def _insert(
    connection: sqlite3.Connection,
    disk: Disk,
    owner: str,
    *,
    tag: str = "",
    transient: bool = False,
) -> str:
    snapshot_id = str(uuid_module.uuid4())
    connection.execute(
        "INSERT INTO snapshots (id, disk_uuid, state, size_bytes, tag, transient, owner, "
        "created_at) VALUES (?, ?, 'creating', ?, ?, ?, ?, ?)",
        (snapshot_id, disk.uuid, disk.size_bytes, tag, transient, owner, now()),
    )
    return snapshot_id


def _changeable(db: Database, caller: Caller, uuid: str) -> Disk:
    disk = own_disk(db, caller, uuid)
    _require_at_rest(db, disk)
    return disk


def _require_at_rest(db: Database, disk: Disk) -> None:
    if disk.state != "available":
        raise Conflict("disk-busy", f"Disk {disk.uuid} is {disk.state}; try again when it is not.")
    refuse_busy(db, disk.uuid, "rollback")


def _require_available(snapshot: Snapshot) -> None:
    if snapshot.transient:
        raise Conflict(
            "snapshot-busy", f"Snapshot {snapshot.id} is part of a save and goes with it."
        )
    if snapshot.state != "available":
        raise Conflict(
            "snapshot-busy",
            f"Snapshot {snapshot.id} is {snapshot.state}; try again when it is not.",
        )
