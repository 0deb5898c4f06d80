"""What a caller may do with a disk: the one place that knows owners, visibility, shares and roles."""

from dataclasses import dataclass

from stratocache.cache.errors import Refused
from stratocache.fs.records import Caller, Disk
from stratocache.fs.state import Database


@dataclass(frozen=True, slots=True)
class Rights:
    """What somebody may do with one disk; each includes those before it."""

    see: bool = False
    """That it exists, and what is written about it."""
    read: bool = False
    """Its content: download it, clone it, attach it read-only."""
    write: bool = False
    """Its content: attach it read-write, upload, take snapshots."""
    own: bool = False
    """Everything else: change, grow, roll back, share and delete it."""


_ALL = Rights(see=True, read=True, write=True, own=True)


def rights(db: Database, caller: Caller, disk: Disk) -> Rights:
    """Return what the caller may do with a disk; an operator sees all, and no private content."""
    if caller.administrator or disk.owner == caller.name:
        return _ALL
    row = db.row(
        "SELECT access FROM disk_shares WHERE disk_uuid = ? AND user = ?", disk.uuid, caller.name
    )
    readable = row is not None or disk.visibility == "public"
    return Rights(
        see=readable or caller.operator,
        read=readable,
        write=row is not None and row["access"] == "write",
    )


def require_write(db: Database, caller: Caller, disk: Disk) -> None:
    """Raise `Refused` (`disk-not-yours`) unless the caller may write the disk."""
    if not rights(db, caller, disk).write:
        raise Refused(
            "disk-not-yours", f"Disk {disk.uuid} belongs to {disk.owner}, who can share it."
        )


def require_read(db: Database, caller: Caller, disk: Disk) -> Rights:
    """Return the caller's rights; raises `Refused` (`disk-not-yours`) unless it may read the disk."""
    granted = rights(db, caller, disk)
    if not granted.read:
        raise Refused(
            "disk-not-yours", f"Disk {disk.uuid} is private to {disk.owner}, who can share it."
        )
    return granted
