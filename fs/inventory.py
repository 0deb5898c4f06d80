"""Reads of the state database: what exists, by name, for those who may see it."""

import json
from collections.abc import Sequence

from stratocache.cache.errors import NotFound
from stratocache.fs import pages, records, rights
from stratocache.fs.pages import Condition, Page
from stratocache.fs.records import (
    Attachment,
    Caller,
    Disk,
    Image,
    Launch,
    Operation,
    Snapshot,
)
from stratocache.fs.state import Database


def images(db: Database, *, state: str | None = None, page: Page | None = None) -> list[Image]:
    """Return all images, or those of a state or of a page; oldest first unless the page says."""
    rows = pages.select(db, "images", "number", equal={"state": state}, page=page)
    return [records.image_from(row) for row in rows]


def find_image(db: Database, image_id: str) -> Image | None:
    """Return an image in any state, or None."""
    row = db.row("SELECT * FROM images WHERE id = ?", image_id)
    return records.image_from(row) if row else None


def image(db: Database, image_id: str) -> Image:
    """Return an image; raises `NotFound` with code `image-unknown`."""
    found = find_image(db, image_id)
    if found is None:
        raise NotFound("image-unknown", f"No image {image_id} is cached here; fetch it first.")
    return found


def is_fenced(db: Database, disk: Disk) -> bool:
    """Tell whether a disk began as an image that was rejected."""
    image = find_image(db, disk.base_image or "")
    return image is not None and image.state == "rejected"


def disks_of_image(db: Database, image_id: str) -> list[str]:
    """Return the UUIDs of all disks that began as an image, oldest first."""
    rows = db.rows("SELECT uuid FROM disks WHERE base_image = ? ORDER BY number", image_id)
    return [row["uuid"] for row in rows]


def disks(
    db: Database,
    caller: Caller,
    *,
    state: str | None = None,
    tag: str | None = None,
    owner: str | None = None,
    visibility: str | None = None,
    kind: str | None = None,
    base_image: str | None = None,
    page: Page | None = None,
) -> list[Disk]:
    """Return the disks that the caller may see and that match every given value.

    All of them, or those of a page; in the order of their numbers unless that says another.
    """
    equal = {
        "state": state, "tag": tag, "owner": owner, "visibility": visibility, "kind": kind,
        "base_image": base_image,
    }  # fmt: skip
    rows = pages.select(
        db, "disks", "number", visible=visible_disks(caller), equal=equal, page=page
    )
    return [records.disk_from(row) for row in rows]


def visible_disks(caller: Caller) -> Condition:
    """Return what holds for disks that the caller may see, as `may_see`."""
    if caller.operator:
        return pages.EVERYTHING
    return Condition(
        "(owner = ? OR visibility = 'public' "
        "OR uuid IN (SELECT disk_uuid FROM disk_shares WHERE user = ?))",
        (caller.name, caller.name),
    )


def find_disk(db: Database, uuid: str) -> Disk | None:
    """Return a disk in any state, or None."""
    row = db.row("SELECT * FROM disks WHERE uuid = ?", uuid)
    return records.disk_from(row) if row else None


def disk(db: Database, caller: Caller, uuid: str) -> Disk:
    """Return a disk; one that the caller may not see does not exist (`NotFound`, `disk-unknown`)."""
    found = find_disk(db, uuid)
    if found is None or not may_see(db, caller, found):
        raise NotFound("disk-unknown", f"No disk {uuid}; `stratocache disk ls` lists yours.")
    return found


def may_see(db: Database, caller: Caller, disk: Disk) -> bool:
    """Tell whether a disk exists for the caller (`stratocache.fs.rights`)."""
    return rights.rights(db, caller, disk).see


def snapshots(db: Database, disk_uuid: str) -> list[Snapshot]:
    """Return the snapshots of a disk in any state, oldest first."""
    rows = db.rows("SELECT * FROM snapshots WHERE disk_uuid = ? ORDER BY number", disk_uuid)
    return [records.snapshot_from(row) for row in rows]


def snapshot_page(
    db: Database, disk_uuid: str, page: Page, *, tag: str | None = None, state: str | None = None
) -> list[Snapshot]:
    """Return a page of a disk's snapshots that match every given value; none that a save made."""
    own = Condition("disk_uuid = ? AND NOT transient", (disk_uuid,))
    equal = {"tag": tag, "state": state}
    rows = pages.select(db, "snapshots", "number", visible=own, equal=equal, page=page)
    return [records.snapshot_from(row) for row in rows]


def find_snapshot(db: Database, snapshot_id: str) -> Snapshot | None:
    """Return a snapshot in any state, or None."""
    row = db.row("SELECT * FROM snapshots WHERE id = ?", snapshot_id)
    return records.snapshot_from(row) if row else None


def snapshot(
    db: Database, caller: Caller, snapshot_id: str, *, disk_uuid: str | None = None
) -> Snapshot:
    """Return a snapshot of a disk that the caller may see (`NotFound`, `snapshot-unknown`).

    With `disk_uuid` it must be that disk's, and a disk that is unknown is `disk-unknown`.
    """
    if disk_uuid is not None:
        disk(db, caller, disk_uuid)
    found = find_snapshot(db, snapshot_id)
    if found is not None and disk_uuid in (None, found.disk_uuid):
        parent = find_disk(db, found.disk_uuid)
        if parent is not None and may_see(db, caller, parent):
            return found
    raise NotFound(
        "snapshot-unknown", f"No snapshot {snapshot_id}; `stratocache disk snapshots` lists them."
    )


def open_operations(db: Database, subject: str, *kinds: str) -> list[Operation]:
    """Return the operations on a subject that have not ended, oldest first, of these kinds."""
    marks = ", ".join("?" * len(kinds))
    rows = db.rows(
        "SELECT * FROM operations WHERE subject = ? AND state IN ('pending', 'running') "  # nosec B608 # no value in it
        f"AND kind IN ({marks}) ORDER BY created_at, id",
        subject,
        *kinds,
    )
    return [records.operation_from(row) for row in rows]


def attachments(
    db: Database,
    *,
    disk_uuid: str | None = None,
    instance: str | None = None,
    image_id: str | None = None,
) -> list[Attachment]:
    """Return the attachments that match every given value, in the order of their instance."""
    given = {"disk_uuid": disk_uuid, "instance": instance, "image_id": image_id}
    wanted = {column: value for column, value in given.items() if value is not None}
    # only the columns that are asked for, so that SQLite uses their indexes
    conditions = "".join(f" AND {column} = ?" for column in wanted)
    rows = db.rows(
        f"SELECT * FROM attachments WHERE 1{conditions} ORDER BY instance, position, number",  # nosec B608 # no value in it
        *wanted.values(),
    )
    return [records.attachment_from(row) for row in rows]


def attachment_page(
    db: Database,
    caller: Caller,
    page: Page,
    *,
    disk_uuid: str | None = None,
    instance: str | None = None,
    image_id: str | None = None,
    state: str | None = None,
    owner: str | None = None,
) -> list[Attachment]:
    """Return a page of the attachments that match every given value: the caller's own, and those of
    disks that the caller may see."""
    visible = visible_disks(caller)
    if visible != pages.EVERYTHING:
        visible = Condition(
            f"(owner = ? OR disk_uuid IN (SELECT uuid FROM disks WHERE {visible.text}))",  # nosec B608 # no value in it
            (caller.name, *visible.values),
        )
    equal = {
        "disk_uuid": disk_uuid, "instance": instance, "image_id": image_id, "state": state,
        "owner": owner,
    }  # fmt: skip
    rows = pages.select(db, "attachments", "number", visible=visible, equal=equal, page=page)
    return [records.attachment_from(row) for row in rows]


def places(db: Database, attachments: Sequence[Attachment]) -> dict[str, int]:
    """Return which disk of its instance each of some attachments is, counted from 0, by id."""
    rows = db.rows(
        "SELECT id, row_number() OVER (PARTITION BY instance ORDER BY number) - 1 AS place "
        "FROM attachments WHERE instance IN (SELECT value FROM json_each(?))",
        json.dumps(sorted({attachment.instance for attachment in attachments})),
    )
    return {row["id"]: row["place"] for row in rows}


def attachments_of(db: Database, disks: Sequence[Disk]) -> dict[str, list[Attachment]]:
    """Return the attachments of some disks, by UUID."""
    found: dict[str, list[Attachment]] = {disk.uuid: [] for disk in disks}
    rows = db.rows(
        "SELECT * FROM attachments WHERE disk_uuid IN (SELECT value FROM json_each(?)) "
        "ORDER BY instance, position, number",
        json.dumps(list(found)),
    )
    for row in rows:
        found[row["disk_uuid"]].append(records.attachment_from(row))
    return found


def attachment(db: Database, attachment_id: str) -> Attachment:
    """Return an attachment; raises `NotFound` with code `attachment-unknown`."""
    row = db.row("SELECT * FROM attachments WHERE id = ?", attachment_id)
    if row is None:
        raise NotFound("attachment-unknown", f"No attachment {attachment_id}; it may be detached.")
    return records.attachment_from(row)


def launch(db: Database, instance: str) -> Launch:
    """Return a launch; raises `NotFound` with code `instance-unknown`."""
    row = db.row("SELECT * FROM launches WHERE instance = ?", instance)
    if row is None:
        raise NotFound("instance-unknown", f"No instance {instance} was launched here.")
    return records.launch_from(row)


def launches(
    db: Database,
    caller: Caller | None = None,
    *,
    state: str | None = None,
    instance: str | None = None,
    page: Page | None = None,
) -> list[Launch]:
    """Return all launches, or those that `caller` may see, that match every given value.

    Oldest first, unless the page says another order.
    """
    visible = pages.EVERYTHING
    if caller is not None and not caller.operator:
        visible = Condition(
            "EXISTS (SELECT 1 FROM operations WHERE id = operation_id AND owner = ?)",
            (caller.name,),
        )
    equal = {"state": state, "instance": instance}
    rows = pages.select(db, "launches", "epoch", visible=visible, equal=equal, page=page)
    return [records.launch_from(row) for row in rows]


def operation(db: Database, operation_id: str) -> Operation:
    """Return an operation; raises `NotFound` with code `operation-unknown`."""
    row = db.row("SELECT * FROM operations WHERE id = ?", operation_id)
    if row is None:
        raise NotFound("operation-unknown", f"No operation {operation_id}.")
    return records.operation_from(row)


def operations(db: Database, *, subject: str | None = None, limit: int = 1000) -> list[Operation]:
    """Return operations, newest first, of one subject when given."""
    rows = db.rows(
        "SELECT * FROM operations WHERE (?1 IS NULL OR subject = ?1) "
        "ORDER BY created_at DESC, id LIMIT ?2",
        subject,
        limit,
    )
    return [records.operation_from(row) for row in rows]


def operation_page(
    db: Database,
    caller: Caller,
    page: Page,
    *,
    state: str | None = None,
    kind: str | None = None,
    subject: str | None = None,
    owner: str | None = None,
) -> list[Operation]:
    """Return a page of the operations that match every given value: the caller's, or all for an
    operator."""
    visible = pages.EVERYTHING
    if not caller.operator:
        visible = Condition("owner = ?", (caller.name,))
    equal = {"state": state, "kind": kind, "subject": subject, "owner": owner}
    rows = pages.select(db, "operations", "id", visible=visible, equal=equal, page=page)
    return [records.operation_from(row) for row in rows]
