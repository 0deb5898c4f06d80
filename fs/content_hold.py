"""Holds: a disk is kept as it is while its bytes are being read or replaced.

A hold is a lock (flock(2)) on the disk's directory, or on a snapshot's file: shared while its
bytes are downloaded, exclusive while they are replaced. The kernel lets go of it with the process, so that no crash
leaves one. Taking a hold and asking for one both happen within a write transaction of the state
database: whoever comes second sees the other's row or the other's lock.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from stratocache.cache.errors import Conflict
from stratocache.fs import inventory
from stratocache.fs.content_source import snapshot_path
from stratocache.fs.records import Disk, Snapshot
from stratocache.fs.state import Database

_CHANGING = ("create-disk", "delete-disk", "hydrate", "resize", "rollback")
"""Kinds of operations that change what a disk is while it is not attached."""


class Hold:
    """A disk's directory, locked until `release`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Let go of the disk; done twice it is no error."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def hold_for_reading(db: Database, disk: Disk) -> Hold:
    """Keep a disk from being written, changed or deleted; many may read it at once.

    Call within a write transaction. Raises `Conflict`: `disk-attached` when it is attached
    read-write, `disk-busy` when it is not available, being replaced or about to change.
    """
    _require_rest(db, disk, *_CHANGING)
    for attachment in inventory.attachments(db, disk_uuid=disk.uuid):
        if attachment.access == "rw":
            raise _attached(disk, attachment.instance)
    return _lock_disk(db, disk.uuid, fcntl.LOCK_SH)


def hold_for_writing(db: Database, disk: Disk) -> Hold:
    """Keep a disk for oneself; call within a write transaction. Raises as `hold_for_reading`."""
    _require_rest(db, disk, *_CHANGING, "save")
    for attachment in inventory.attachments(db, disk_uuid=disk.uuid):
        raise _attached(disk, attachment.instance)
    for snapshot in inventory.snapshots(db, disk.uuid):
        if snapshot.state in ("creating", "absorbing"):
            raise Conflict(
                "disk-busy",
                f"Snapshot {snapshot.id} of disk {disk.uuid} is being made; try again after that.",
            )
    return _lock_disk(db, disk.uuid, fcntl.LOCK_EX)


def hold_snapshot(db: Database, snapshot: Snapshot) -> Hold:
    """Keep a snapshot from being deleted; call within a write transaction.

    Raises `Conflict` (`snapshot-busy`).
    """
    busy = Conflict("snapshot-busy", f"Snapshot {snapshot.id} is {snapshot.state}; try again.")
    if snapshot.state != "available":
        raise busy
    return _lock(snapshot_path(db.path.parent, snapshot), fcntl.LOCK_SH, busy)


def require_unheld_snapshot(db: Database, snapshot: Snapshot) -> None:
    """Raise `Conflict` (`snapshot-busy`) while a snapshot is being downloaded."""
    busy = Conflict(
        "snapshot-busy", f"Snapshot {snapshot.id} is being downloaded; try again after that."
    )
    with suppress(FileNotFoundError):
        _lock(snapshot_path(db.path.parent, snapshot), fcntl.LOCK_EX, busy).release()


def require_unheld(db: Database, uuid: str, *, for_reading: bool = False) -> None:
    """Raise `Conflict` (`disk-busy`) when the bytes of a disk are being moved in or out.

    Call within the write transaction that records what is to happen to the disk; `for_reading`
    when that leaves the bytes alone, as a read-only attachment does.
    """
    with suppress(FileNotFoundError):  # a disk without files is nobody's to hold
        _lock_disk(db, uuid, fcntl.LOCK_SH if for_reading else fcntl.LOCK_EX).release()


def disk_directory(db: Database, uuid: str) -> Path:
    """Return where the files of a disk are."""
    return db.path.parent / "disks" / uuid


def _lock_disk(db: Database, uuid: str, kind: int) -> Hold:
    busy = Conflict(
        "disk-busy", f"Disk {uuid} is being downloaded or uploaded; try again after that."
    )
    return _lock(disk_directory(db, uuid), kind, busy)


def _lock(path: Path, kind: int, busy: Conflict) -> Hold:
    hold = Hold(descriptor := os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        hold.release()
        raise busy from None
    return hold


def _require_rest(db: Database, disk: Disk, *kinds: str) -> None:
    if disk.state != "available":
        raise Conflict("disk-busy", f"Disk {disk.uuid} is {disk.state}; try again when it is not.")
    for operation in inventory.open_operations(db, disk.uuid, *kinds):
        raise Conflict(
            "disk-busy",
            f"Operation {operation.id} ({operation.kind}) is changing disk {disk.uuid}; "
            "try again after that.",
        )


def _attached(disk: Disk, instance: str) -> Conflict:
    return Conflict(
        "disk-attached",
        f"Disk {disk.uuid} is attached to {instance}; detach it first, or use a snapshot.",
    )
