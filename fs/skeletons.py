"""Skeletons: images of which eviction left the boot set, so that their next launch boots at once.

A skeleton is a provisional image whose rest nobody brings: its manifest was proven when it was whole,
and every chunk is compared with it. It sleeps (`Image.asleep`) until it is launched, fetched or
pinned; then it is completed and verified as any provisional image. Eviction takes a skeleton that
sleeps after all images that are whole.
"""

import sqlite3
from contextlib import suppress

from stratocache.cache import bootset, seals
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import NotVerified
from stratocache.cache.manifest import Manifest
from stratocache.fs.records import Image
from stratocache.fs.state import now

SLEEP_AGAIN = """
    UPDATE images SET skeleton_since = ? WHERE state = 'provisional' AND skeleton_since IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM disks WHERE base_image = images.id)
    AND NOT EXISTS (SELECT 1 FROM attachments WHERE image_id = images.id)
"""
"""For skeletons that nothing was made of since they woke, or nothing is left of that."""


def boot_chunks(configuration: Configuration, image: Image) -> dict[bytes, int]:
    """Return the chunks, with their sizes, that stay of an image at first; none when it goes whole.

    That is so without a boot set, and when its origins have single chunks of it only by luck.
    """
    entry = image.entry
    by_parts = entry.format == "raw" or entry.compression == "none"
    if image.state != "verified" or image.size_bytes is None or not by_parts:
        return {}
    indexes: list[int] = []
    manifest: Manifest | None = None
    with suppress(FileNotFoundError, NotVerified):
        path = configuration.state_dir / "bootsets" / image.id
        indexes = bootset.decode(bootset.read(path), image.size_bytes)
        manifest = seals.read_manifest(configuration.state_dir, image.id)
    if manifest is None:
        return {}
    return {
        manifest.digest(index): manifest.chunk_bytes(index)
        for index in indexes
        if not manifest.is_zero(index)
    }


def record_reduction(connection: sqlite3.Connection, image_id: str, kept_bytes: int) -> bool:
    """Make a whole image a skeleton, within the caller's transaction; tell whether it was whole."""
    reduced = connection.execute(
        "UPDATE images SET state = 'provisional', skeleton_since = ? "
        "WHERE id = ? AND state = 'verified'",
        (now(), image_id),
    )
    connection.execute(
        "UPDATE image_traffic SET local_bytes = ?, rate_bytes_s = 0 WHERE image_id = ?",
        (kept_bytes, image_id),
    )
    return reduced.rowcount == 1
