"""What the cache saved: the bytes of an image that were here when somebody asked for it.

Counted in the transaction that makes the image used, so that it is counted once.
"""

import sqlite3

from stratocache.fs.records import COMPLETE, Image, Operation
from stratocache.fs.state import now
from stratocache.fs.tallies import add_tally


def here_before(connection: sqlite3.Connection, operation: Operation, image: Image) -> int:
    """Return the bytes of an image that were here before an operation began, zeros not counted.

    An image that the operation had to wait for counts for nothing, also if others did the work; one
    whose manifest has not been measured yet neither.
    """
    if image.size_bytes is None or operation.created_at < (image.verified_at or image.created_at):
        return 0
    row = connection.execute(
        "SELECT stored_bytes, local_bytes FROM manifest_sizes "
        "LEFT JOIN image_traffic ON image_id = name WHERE name = ?",
        (image.id,),
    ).fetchone()
    if row is None:
        return 0
    stored_bytes = int(row["stored_bytes"])
    if image.state in COMPLETE:
        return stored_bytes
    missing_bytes = image.size_bytes - int(row["local_bytes"] or 0)
    return max(0, stored_bytes - missing_bytes)


def count_savings(
    connection: sqlite3.Connection, operation: Operation, image: Image, disk: str | None = None
) -> None:
    """Add what an operation did not have to fetch of an image, for the clone `disk` if it makes
    one."""
    saved_bytes = here_before(connection, operation, image)
    if not saved_bytes:
        return
    values = (saved_bytes, now(), image.id)
    connection.execute(
        "INSERT INTO image_traffic (cache_saved_bytes, updated_at, image_id) VALUES (?, ?, ?) "
        "ON CONFLICT (image_id) DO UPDATE SET "
        "cache_saved_bytes = cache_saved_bytes + excluded.cache_saved_bytes",
        values,
    )
    if disk is not None:
        connection.execute(
            "INSERT INTO disk_traffic (cache_saved_bytes, updated_at, disk_number) "
            "SELECT ?, ?, number FROM disks WHERE uuid = ?",
            (saved_bytes, now(), disk),
        )
    add_tally(connection, "cache_saved_bytes", saved_bytes)
