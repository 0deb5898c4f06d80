"""The rows that launches and clones of images want, once the images are here.

Each function belongs to the caller's transaction; the reconciler makes the rows real. Done once,
however often it is run: a launch that has its boot disk, and a disk that has its row, is recorded.
"""

import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

from stratocache.cache.errors import Conflict, InvalidInput, StratocacheError
from stratocache.fs import attachment_intents, disk_conditions, disk_intents, inventory, records
from stratocache.fs.cache_savings import count_savings
from stratocache.fs.records import Caller, DiskRequest, Image, LaunchRequest, Operation
from stratocache.fs.state import Database, now

PROMPT_KINDS = frozenset({"launch", "create-disk"})
"""Operations that need no task when their images are here."""


def launch_request(operation: Operation) -> LaunchRequest:
    """Return what a launch asked for."""
    return LaunchRequest(**{
        **operation.request,
        "disks": tuple(operation.request["disks"]),
        "readonly": tuple(operation.request["readonly"]),
    })  # fmt: skip


def record_cached(
    db: Database,
    operations: Iterable[Operation],
    cached: Callable[[str], Image | None],
    record_failure: Callable[[sqlite3.Connection, Operation, StratocacheError], None],
) -> set[str]:
    """Record what launches and clones of cached images want, all in one transaction.

    `cached` returns the image of a reference, or None when it is not here. Returns the ids of the
    operations that need no task: those recorded, and those that failed.
    """
    ended = set()
    find = cache(cached)
    with db.transaction() as connection:
        for operation in operations:
            connection.execute("SAVEPOINT operation")
            try:
                done = _record_one(connection, db, operation, find)
            except StratocacheError as error:
                connection.execute("ROLLBACK TO operation")
                record_failure(connection, operation, error)
                done = True
            connection.execute("RELEASE operation")
            if done:
                ended.add(operation.id)
    return ended


def _record_one(
    connection: sqlite3.Connection,
    db: Database,
    operation: Operation,
    find: Callable[[str], Image | None],
) -> bool:
    """Record what an operation wants if all of its images are here; return whether they are."""
    if operation.kind == "launch":
        request = launch_request(operation)
        found = [find(reference) for reference in (request.reference, *request.readonly)]
        images = [image for image in found if image is not None]
        if len(images) < len(found):
            return False
        insert_launch(connection, db, operation, request, images[0], images[1:])
    else:
        disk = DiskRequest(**operation.request)
        assert disk.reference is not None  # a blank disk's row is made with its operation
        image = find(disk.reference)
        if image is None:
            return False
        insert_clone(connection, operation, disk, image)
    connection.execute(
        "UPDATE operations SET state = 'running', updated_at = ? WHERE id = ? AND state = 'pending'",
        (now(), operation.id),
    )
    return True


def insert_launch(
    connection: sqlite3.Connection,
    db: Database,
    operation: Operation,
    request: LaunchRequest,
    boot: Image,
    shared: Iterable[Image],
) -> None:
    """Insert the disk and the attachments of a launch.

    Raises what the intents of disks and attachments raise, and `Conflict` (`image-busy`).
    """
    authorised = Caller(operation.owner, "admin")  # checked when the launch was asked for
    if inventory.launch(db, request.instance).boot_disk is not None:
        return
    uuid = operation.id  # the clone's UUID, so that a repetition makes the same disk
    disk = DiskRequest(
        size_bytes=_clone_size_bytes(boot, request.size_bytes),
        tag=f"{request.instance} boot"[:40],
        kind="machine",
        volatile=True,
    )
    disk_intents.insert_disk(
        connection, operation.owner, uuid, disk, base_image=boot.id, base_manifest=boot.id
    )
    attach = _attacher(connection, operation.owner, request)
    attach("boot", "rw", disk_uuid=uuid)
    for other in request.disks:
        wanted = inventory.disk(db, authorised, other)
        disk_conditions.check_attachable(db, authorised, wanted, "rw")
        attach("disk", "rw", disk_uuid=other)
    _hold(connection, boot)
    count_savings(connection, operation, boot, uuid)
    for image in shared:
        attach("readonly", "ro", image_id=image.id)
        _hold(connection, image)
        count_savings(connection, operation, image)
    connection.execute(
        "UPDATE launches SET boot_disk = ? WHERE instance = ?", (uuid, request.instance)
    )


def insert_clone(
    connection: sqlite3.Connection, operation: Operation, request: DiskRequest, image: Image
) -> None:
    """Insert the disk that is a clone of an image; raises `InvalidInput`, `Conflict`."""
    sized = replace(request, size_bytes=_clone_size_bytes(image, request.size_bytes))
    disk_intents.insert_disk(
        connection, operation.owner, operation.subject, sized,
        base_image=image.id, base_manifest=image.id,
    )  # fmt: skip
    _hold(connection, image)
    count_savings(connection, operation, image, operation.subject)


def _attacher(
    connection: sqlite3.Connection, owner: str, request: LaunchRequest
) -> Callable[..., str]:
    position = 0

    def attach(
        role: str,
        access: records.Access,
        *,
        disk_uuid: str | None = None,
        image_id: str | None = None,
    ) -> str:
        nonlocal position
        position += 1
        return attachment_intents.insert_attachment(
            connection, owner, request.instance, role, access, disk_uuid=disk_uuid,
            image_id=image_id, initiator=request.initiator, position=position - 1,
        )  # fmt: skip

    return attach


def _clone_size_bytes(image: Image, wanted_bytes: int | None) -> int:
    assert image.size_bytes is not None  # provisional or verified
    if wanted_bytes is not None and wanted_bytes < image.size_bytes:
        raise InvalidInput(
            "size-too-small",
            f"A clone of {image.id} needs at least {image.size_bytes} bytes.",
            field="size_bytes",
        )
    return wanted_bytes or image.size_bytes


def _hold(connection: sqlite3.Connection, image: Image) -> None:
    """Note the use of an image in the transaction that makes it used; it may be going meanwhile."""
    held = connection.execute(
        f"UPDATE images SET last_used_at = ? WHERE id = ? AND state IN {records.SERVABLE}",  # nosec B608 # no value in it
        (now(), image.id),
    )
    if held.rowcount != 1:
        raise Conflict("image-busy", f"Image {image.id} cannot be used any more; try again.")
