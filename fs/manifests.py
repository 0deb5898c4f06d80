"""Which manifests must stay: those that an image, a snapshot or the base of a disk names."""

import logging
from contextlib import suppress

from stratocache.cache.errors import NotFound, NotVerified
from stratocache.cache.images import ImageStore
from stratocache.fs.disks import DiskStore
from stratocache.fs.records import READABLE
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

_NAMED = """
    SELECT id AS name FROM images
    UNION SELECT id FROM snapshots WHERE form IS NOT 'file'
    UNION SELECT base_manifest FROM disks WHERE base_manifest IS NOT NULL
"""


_PUBLISHED = f"""
    SELECT id AS name FROM images WHERE state IN {READABLE}
    UNION SELECT id FROM snapshots WHERE form = 'manifest' AND state = 'available'
    UNION SELECT base_manifest FROM disks WHERE base_manifest IS NOT NULL AND form = 'overlay'
    EXCEPT SELECT id FROM images
        WHERE state = 'provisional' AND skeleton_since IS NULL
        AND json_extract(entry, '$.index') IS NULL
"""  # nosec B608 # no value in it
# (an image without an index has its manifest when all of it has flowed past)


_INCOMPLETE = "SELECT id FROM images WHERE state IN ('fetching', 'provisional', 'rejected')"


def published_manifests(db: Database) -> set[str]:
    """Return the names of all manifests that must have a file, whatever is under way."""
    return {row["name"] for row in db.rows(_PUBLISHED)}


def incomplete_manifests(db: Database) -> set[str]:
    """Return the names of images whose chunks may be missing: no loss, they come or are unwanted."""
    return {row["id"] for row in db.rows(_INCOMPLETE)}


def named_manifests(db: Database) -> set[str]:
    """Return the names of all manifests that must stay."""
    return {row["name"] for row in db.rows(_NAMED)}


class Manifests:
    """Removes manifests once nothing names them. Methods block and may run in any thread.

    A name never comes back: only what is named can be named again. So nothing can begin to need a
    manifest between the look at the rows and its removal. What a crash leaves is swept at start.
    """

    def __init__(self, db: Database, images: ImageStore, disks: DiskStore) -> None:
        self._db = db
        self._images = images
        self._disks = disks

    def collect(self, *names: str | None) -> None:
        """Remove those of these manifests that nothing names any more."""
        unnamed = sorted({name for name in names if name is not None and not self._is_named(name)})
        if not unnamed:
            return
        try:
            self.remove(*unnamed)
        except OSError:
            log.exception("manifests stay until the next start, some of %s", ", ".join(unnamed))

    def remove(self, *names: str) -> None:
        """Remove manifests and the chunks that no other one names; absent is fine."""
        for name in names:
            with suppress(NotFound, NotVerified):
                self._disks.forget_image(self._images.reader(name))
        self._images.remove_all(names)

    def _is_named(self, name: str) -> bool:
        return self._db.row(f"SELECT 1 FROM ({_NAMED}) WHERE name = ?", name) is not None  # nosec B608 # no value in it
