"""What a caller may do with a disk: the one place that knows owners, visibility and roles."""

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
    public = disk.visibility == "public"
    return Rights(see=public or caller.operator, read=public)


def require_read(db: Database, caller: Caller, disk: Disk) -> Rights:
    """Return the caller's rights; raises `Refused` (`disk-not-yours`) unless it may read the disk."""
    granted = rights(db, caller, disk)
    if not granted.read:
        raise Refused(
            "disk-not-yours", f"Disk {disk.uuid} is private to {disk.owner}, who can share it."
        )
    return granted
