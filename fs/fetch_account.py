"""What fetching cost an image or a disk, as `blockd` recorded it (`stratocache.fs.traffic_record`)."""

from dataclasses import dataclass

from stratocache.fs.records import COMPLETE, Disk, Image
from stratocache.fs.state import Database


@dataclass(frozen=True, slots=True)
class ImageAccount:
    """One image; what was fetched whole has moved nothing by single chunks."""

    remote_bytes: int
    """Moved from origins, as they sent them."""
    remote_wait_s: float
    """That readers waited for chunks, all together."""
    dedup_bytes: int
    """That were here already when the image landed."""
    local_bytes: int | None
    """Of the image that are here; None while nothing can be read."""
    complete_in_s: float | None
    """When the rest is here at the present rate; 0 when it is, None when nobody knows."""


@dataclass(frozen=True, slots=True)
class DiskAccount:
    """One disk."""

    remote_bytes: int
    remote_wait_s: float


def of_image(db: Database, image: Image) -> ImageAccount:
    """Return an image's account."""
    row = db.row("SELECT * FROM image_traffic WHERE image_id = ?", image.id)
    complete = image.state in COMPLETE
    local_bytes = image.size_bytes if complete else (row["local_bytes"] if row else None)
    missing_bytes = (image.size_bytes or 0) - (local_bytes or 0)
    complete_in_s = 0.0 if complete else None
    if image.state == "provisional" and row and row["rate_bytes_s"] > 0:
        complete_in_s = round(missing_bytes / row["rate_bytes_s"], 1)
    return ImageAccount(
        remote_bytes=row["remote_bytes"] if row else 0,
        remote_wait_s=round(row["remote_wait_s"], 3) if row else 0.0,
        dedup_bytes=row["dedup_bytes"] if row else 0,
        local_bytes=local_bytes,
        complete_in_s=complete_in_s,
    )


def of_disk(db: Database, disk: Disk) -> DiskAccount:
    """Return a disk's account."""
    row = db.row("SELECT * FROM disk_traffic WHERE disk_number = ?", disk.number)
    if row is None:
        return DiskAccount(0, 0.0)
    return DiskAccount(row["remote_bytes"], round(row["remote_wait_s"], 3))
