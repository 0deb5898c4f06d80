"""Disks shared with named users, beside owner and visibility (`stratocache.fs.rights`).

What is attached stays attached when a share ends; nothing new can be done then.
"""

import sqlite3
from dataclasses import dataclass
from typing import Literal

from stratocache.cache.errors import Conflict, InvalidInput, NotFound, Refused
from stratocache.fs import inventory, pages
from stratocache.fs.disk_conditions import own_disk
from stratocache.fs.pages import Condition, Page
from stratocache.fs.records import Caller
from stratocache.fs.rights import rights
from stratocache.fs.state import Database, now, record_event

ShareAccess = Literal["read", "write"]
_SHARES_MAX = 1000


@dataclass(frozen=True, slots=True)
class Share:
    """What one user may do with one disk of another."""

    number: int
    user: str
    access: ShareAccess
    """read: see, clone, download, attach read-only; write: also attach, upload, take snapshots."""
    created_at: str


def share_page(db: Database, caller: Caller, disk_uuid: str, page: Page) -> list[Share]:
    """Return a page of a disk's shares: all for its owner, else the caller's own.

    Raises `NotFound` (`disk-unknown`).
    """
    disk = inventory.disk(db, caller, disk_uuid)
    visible = Condition("disk_uuid = ?", (disk_uuid,))
    if not rights(db, caller, disk).own:
        visible = Condition("disk_uuid = ? AND user = ?", (disk_uuid, caller.name))
    rows = pages.select(db, "disk_shares", "number", visible=visible, page=page)
    return [_share(row) for row in rows]


def share(
    db: Database, caller: Caller, disk_uuid: str, user: str, access: ShareAccess
) -> tuple[Share, bool]:
    """Let a user do something with a disk; return the share, and whether it is new.

    Raises `InvalidInput` (`share-with-owner`), `Conflict` (`shares-too-many`), and as `own_disk`.
    """
    with db.transaction() as connection:
        disk = own_disk(db, caller, disk_uuid)
        if user == disk.owner:
            raise InvalidInput(
                "share-with-owner", f"Disk {disk_uuid} belongs to {user} already.", field="user"
            )
        before = _find(db, disk_uuid, user)
        counted = db.row("SELECT count(*) FROM disk_shares WHERE disk_uuid = ?", disk_uuid)
        if before is None and counted is not None and counted[0] >= _SHARES_MAX:
            raise Conflict(
                "shares-too-many",
                f"Disk {disk_uuid} is shared with {_SHARES_MAX} users; make it public instead.",
            )
        connection.execute(
            "INSERT INTO disk_shares (disk_uuid, user, access, created_at) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (disk_uuid, user) DO UPDATE SET access = excluded.access",
            (disk_uuid, user, access, now()),
        )
        if before is None or before.access != access:
            record_event(
                connection, "disk.shared", disk_uuid,
                f"{caller.name} shared disk {disk_uuid} with {user} ({access}).",
            )  # fmt: skip
        found = _find(db, disk_uuid, user)
    assert found is not None
    return found, before is None


def unshare(db: Database, caller: Caller, disk_uuid: str, user: str) -> None:
    """End a share: its disk's owner may, and who it is for.

    Raises `NotFound` (`share-unknown`, `disk-unknown`) and `Refused` (`disk-not-yours`).
    """
    with db.transaction() as connection:
        disk = inventory.disk(db, caller, disk_uuid)
        if not rights(db, caller, disk).own and user != caller.name:
            raise Refused("disk-not-yours", f"Disk {disk_uuid} belongs to {disk.owner}.")
        if _find(db, disk_uuid, user) is None:
            raise NotFound("share-unknown", f"Disk {disk_uuid} is not shared with {user}.")
        connection.execute(
            "DELETE FROM disk_shares WHERE disk_uuid = ? AND user = ?", (disk_uuid, user)
        )
        record_event(
            connection, "disk.unshared", disk_uuid,
            f"{caller.name} ended that {user} shares disk {disk_uuid}.",
        )  # fmt: skip


def _find(db: Database, disk_uuid: str, user: str) -> Share | None:
    row = db.row("SELECT * FROM disk_shares WHERE disk_uuid = ? AND user = ?", disk_uuid, user)
    return None if row is None else _share(row)


def _share(row: sqlite3.Row) -> Share:
    return Share(row["number"], row["user"], row["access"], row["created_at"])
