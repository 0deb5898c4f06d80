"""What users ask of images; see `stratocache.fs.operation_intents`."""

from stratocache.cache.errors import Conflict
from stratocache.fs import inventory, operation_intents, rights
from stratocache.fs.records import Caller, Image, Operation
from stratocache.fs.state import Database


def request_fetch(db: Database, caller: Caller, reference: str, *, pin: bool = False) -> Operation:
    """Ask for an image to be in the cache, for good when `pin` is set (operators only)."""
    if pin:
        rights.require_operator(caller)
    with db.transaction() as connection:
        return operation_intents.add_operation(
            connection, caller, "fetch", reference, {"reference": reference, "pin": pin}
        )


def request_image_deletion(db: Database, caller: Caller, image_id: str) -> Operation:
    """Ask for an image to leave the cache.

    Raises `Conflict` (`image-in-use`, `image-pinned`, `image-busy`) and `NotFound`.
    """
    rights.require_operator(caller)
    with db.transaction() as connection:
        image = inventory.image(db, image_id)
        if image.state == "fetching":
            raise Conflict("image-busy", f"Image {image_id} is being fetched; cancel that first.")
        if image.pinned:
            raise Conflict("image-pinned", f"Image {image_id} is pinned; unpin it first.")
        _refuse_used_image(db, image_id)
        if image.state == "provisional":
            _refuse_needed_image(db, image_id)
        connection.execute("UPDATE images SET state = 'deleting' WHERE id = ?", (image_id,))
        return operation_intents.add_operation(connection, caller, "delete-image", image_id, {})


def _refuse_used_image(db: Database, image_id: str) -> None:
    clone = db.row("SELECT uuid FROM disks WHERE base_manifest = ?", image_id)
    if clone is not None:
        raise Conflict("image-in-use", f"Image {image_id} is the base of disk {clone['uuid']}.")
    held = db.row("SELECT instance FROM attachments WHERE image_id = ?", image_id)
    if held is not None:
        raise Conflict("image-in-use", f"Image {image_id} is attached to {held['instance']}.")


def _refuse_needed_image(db: Database, image_id: str) -> None:
    """Raise while any disk began as an incomplete image: a snapshot of it may lack chunks, which
    only this image's entry says where to get."""
    for uuid in inventory.disks_of_image(db, image_id):
        raise Conflict(
            "image-in-use", f"Image {image_id} is not complete, and disk {uuid} began as it."
        )


def set_pin(db: Database, caller: Caller, image_id: str, pinned: bool) -> Image:
    """Pin or unpin an image; doing so twice is no error."""
    rights.require_operator(caller)
    with db.transaction() as connection:
        inventory.image(db, image_id)
        connection.execute("UPDATE images SET pinned = ? WHERE id = ?", (pinned, image_id))
    return inventory.image(db, image_id)
