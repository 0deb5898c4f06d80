"""Snapshots of raw disks on file systems that share extents: whole files, made in one call.

    STATE_DIR/disks/UUID/snapshots/ID

Each is independent of the disk and of one another, so any can be removed, and none costs a read
anything. Everything is made beside and renamed.
"""

import os
import re
from pathlib import Path

from stratocache.cache.errors import InvalidInput, NotFound
from stratocache.fs import reflink
from stratocache.fs.layers import RAW_DATA, SNAPSHOTS
from stratocache.fs.storage import FILES

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")
_INCOMING = ".new"
_DIRECTORY_MODE = 0o700


def path(directory: Path, snapshot_id: str) -> Path:
    """Return the file of a snapshot of the disk in `directory`, there or not.

    Raises `InvalidInput` (`snapshot-invalid`) for what is no identifier.
    """
    if not _IDENTIFIER.fullmatch(snapshot_id):
        raise InvalidInput(
            "snapshot-invalid", f"{snapshot_id[:80]!r} is no snapshot.", field="snapshot"
        )
    return directory / SNAPSHOTS / snapshot_id


def make(directory: Path, snapshot_id: str) -> None:
    """Make a snapshot of a raw disk, durably; one that is there stays as it is.

    Raises `OSError`, `FileNotFoundError` without a disk.
    """
    target = path(directory, snapshot_id)
    data = directory / RAW_DATA
    if not target.exists():
        size = os.stat(data).st_size
        target.parent.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
        incoming = target.with_name(target.name + _INCOMING)
        incoming.unlink(missing_ok=True)
        try:
            copy(data, incoming, size)
        except BaseException:
            incoming.unlink(missing_ok=True)
            raise
        incoming.rename(target)
    FILES.sync_directory(target.parent)
    FILES.sync_directory(directory)


def rollback(directory: Path, snapshot_id: str) -> None:
    """Replace a raw disk by a copy of a snapshot, durably; the snapshot stays."""
    source = path(directory, snapshot_id)
    incoming = directory / (RAW_DATA + _INCOMING)
    incoming.unlink(missing_ok=True)
    try:
        copy(source, incoming, size_bytes(source))
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
    incoming.rename(directory / RAW_DATA)
    FILES.sync_directory(directory)


def delete(directory: Path, snapshot_id: str) -> None:
    """Remove a snapshot, durably; none is no error."""
    target = path(directory, snapshot_id)
    if target.parent.is_dir():
        target.unlink(missing_ok=True)
        FILES.sync_directory(target.parent)


def size_bytes(snapshot: Path) -> int:
    """Return the length of a snapshot; raises `NotFound` (`snapshot-unknown`)."""
    try:
        return snapshot.stat().st_size
    except FileNotFoundError:
        raise NotFound("snapshot-unknown", f"There is no snapshot {snapshot.name}.") from None


def copy(source: Path, target: Path, size_bytes: int) -> None:
    """Make a new file that shares all of another, of that length or longer, durably.

    The kernel copies a file that is being written as it is at one moment (ioctl_ficlonerange(2)).
    Raises `OSError`.
    """
    source_descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(target, flags, 0o600)
        try:
            reflink.clone_file(source_descriptor, descriptor)
            os.ftruncate(descriptor, size_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        os.close(source_descriptor)
    FILES.sync_directory(target.parent)
