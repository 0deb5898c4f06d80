"""What those who fetch and repair ask of the rows of images."""

from collections.abc import Callable, Sequence

from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotVerified
from stratocache.fs import inventory
from stratocache.fs.records import READABLE, Image
from stratocache.fs.state import Database


def entry_finder(db: Database) -> Callable[[str], Entry | None]:
    """Return the `ChunkFetcher`'s way to entries: of images whose chunks may be fetched."""

    def find(image_id: str) -> Entry | None:
        image = inventory.find_image(db, image_id)
        servable = image is not None and image.state in ("fetching", *READABLE)
        return image.entry if image is not None and servable else None

    return find


def awaited_finder(db: Database) -> Callable[[str], Sequence[str]]:
    """Return the `Supply`'s way to images whose chunks a manifest may wait for.

    An image waits for its own, as long as it is provisional; a snapshot for those of any image.
    """

    def find(name: str) -> Sequence[str]:
        image = inventory.find_image(db, name)
        if image is None:
            rows = db.rows("SELECT id FROM images WHERE state = 'provisional'")
            return [row["id"] for row in rows]
        if image.state == "rejected":
            raise rejected(image)
        return [name] if image.state == "provisional" else []

    return find


def rejected(image: Image) -> NotVerified:
    """Return the error for whoever wants to use a rejected image."""
    return NotVerified(
        "image-rejected",
        f"Image {image.id} is not what its endorser promised; delete it to fetch it again.",
    )
