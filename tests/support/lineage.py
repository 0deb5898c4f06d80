"""Rows of disks and snapshots that began as one image, for tests of what is shown of them."""

from uuid import UUID

from stratocache.fs.state import Database, now
from support.api_daemon import IMAGE_ID


def add_disk(
    db: Database, *, of: str | None = None, owner: str = "root", public: bool = False, tag: str = ""
) -> str:
    """Insert an overlay disk that began as the image, a clone `of` a snapshot; return its UUID."""
    uuid = _next(db, "disks")
    db.connection.execute(
        "INSERT INTO disks (uuid, state, size_bytes, base_image, base_snapshot, base_manifest, form, "
        "owner, tag, visibility, kind, volatile, created_at) "
        "VALUES (?, 'available', 4096, ?, ?, ?, 'overlay', ?, ?, ?, 'data', 0, ?)",
        (uuid, IMAGE_ID, of, of or IMAGE_ID, owner, tag, "public" if public else "private", now()),
    )
    return uuid


def add_snapshot(db: Database, disk: str, *, tag: str = "") -> str:
    """Insert a snapshot of a disk; return its id."""
    snapshot = _next(db, "snapshots")
    db.connection.execute(
        "INSERT INTO snapshots (id, disk_uuid, state, form, size_bytes, tag, owner, created_at) "
        "VALUES (?, ?, 'available', 'manifest', 4096, ?, 'root', ?)",
        (snapshot, disk, tag, now()),
    )
    return snapshot


def _next(db: Database, table: str) -> str:
    number = db.row(f"SELECT count(*) FROM {table}")
    assert number is not None
    return str(UUID(int=number[0] + (1 << 100 if table == "snapshots" else 0), version=4))
