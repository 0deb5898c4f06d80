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
