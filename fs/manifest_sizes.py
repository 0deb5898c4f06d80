"""What each image and snapshot would take alone: how much space is saved as they share chunks.

Manifests are large, so each is read once, here, and its sum kept in `manifest_sizes`.
"""

import logging
from contextlib import suppress

import trio

from stratocache.cache.errors import NotFound, NotVerified
from stratocache.cache.images import ImageStore
from stratocache.fs.records import READABLE
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

_UNKNOWN = f"""
    SELECT id FROM images WHERE state IN {READABLE}
        AND id NOT IN (SELECT name FROM manifest_sizes)
    UNION ALL SELECT id FROM snapshots WHERE form = 'manifest' AND state = 'available'
        AND id NOT IN (SELECT name FROM manifest_sizes)
"""  # nosec B608 # no value in it
_KNOWN_OR_GONE = (
    "SELECT 1 FROM images WHERE id = ?1 UNION ALL SELECT 1 FROM snapshots WHERE id = ?1"
)


class ManifestSizes:
    """Keeps the table up to date; rows go with those of images and snapshots, by triggers."""

    def __init__(self, db: Database, images: ImageStore) -> None:
        self._db = db
        self._images = images

    async def look(self) -> None:
        """Read manifests that are new; what cannot be read now is read another time."""
        unknown = [row["id"] for row in self._db.rows(_UNKNOWN)]
        if unknown:
            await trio.to_thread.run_sync(self._measure, unknown)

    def _measure(self, names: list[str]) -> None:
        sizes = []
        for name in names:
            if self._images.growing(name) is not None:
                continue  # its manifest is not whole yet
            with suppress(NotFound, NotVerified):
                sizes.append((self._images.reader(name).manifest.stored_bytes(), name))
        with self._db.transaction() as connection:
            for stored_bytes, name in sizes:
                connection.execute(
                    "INSERT OR IGNORE INTO manifest_sizes (stored_bytes, name) "
                    f"SELECT ?2, ?1 WHERE EXISTS ({_KNOWN_OR_GONE})",
                    (name, stored_bytes),
                )


def shared_bytes(db: Database, chunk_bytes: int) -> int:
    """Return what images and snapshots would take beyond `chunk_bytes`, which all chunks take, if
    each had its own."""
    row = db.row("SELECT coalesce(sum(stored_bytes), 0) FROM manifest_sizes")
    assert row is not None
    return max(0, int(row[0]) - chunk_bytes)
