"""What must be so of a disk before something is done with it."""

from stratocache.cache.errors import Conflict, Refused
from stratocache.fs import content_hold, inventory, rights
from stratocache.fs.records import Access, Caller, Disk
from stratocache.fs.state import Database


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
                f"Disk {disk.uuid} is attached to {other.instance} ({other.access}); detach it "
                "first.",
            )
    content_hold.require_unheld(db, disk.uuid, for_reading=access == "ro")


def refuse_fenced(db: Database, disk: Disk) -> None:
    """Raise `Refused` (`disk-fenced`) for a disk that began as an image that was rejected."""
    if inventory.is_fenced(db, disk):
        raise Refused(
            "disk-fenced",
            f"Disk {disk.uuid} began as image {disk.base_image}, which is not what its endorser "
            "promised; download what you need of it and delete it.",
        )


def refuse_busy(db: Database, uuid: str, *kinds: str) -> None:
    """Raise `Conflict` (`disk-busy`) while an operation of one of these kinds is open on a disk."""
    for operation in inventory.open_operations(db, uuid, *kinds):
        raise Conflict(
            "disk-busy",
            f"Operation {operation.id} ({operation.kind}) is under way on disk {uuid}; "
            "wait for its end.",
        )


def own_disk(db: Database, caller: Caller, uuid: str) -> Disk:
    """Return a disk that the caller may change; raises `Refused` (`disk-not-yours`), `NotFound`."""
    disk = inventory.disk(db, caller, uuid)
    if not rights.rights(db, caller, disk).own:
        raise Refused("disk-not-yours", f"Disk {uuid} belongs to {disk.owner}.")
    return disk
