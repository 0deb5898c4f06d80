"""Whether the files of disks are there: a disk without them is reported, never made anew.

A guest that has such a disk keeps what its target has open, for as long as tgtd lives; nobody else
may attach it until the files are back.
"""

import logging
from pathlib import Path

from stratocache.cache.errors import StratocacheError
from stratocache.fs.disks import DiskStore
from stratocache.fs.layers import RAW
from stratocache.fs.records import Disk
from stratocache.fs.state import Database, record_event

log = logging.getLogger(__name__)


class DiskPresence:
    """Looks at the files of disks and keeps what it found in their rows. Methods block."""

    def __init__(self, db: Database, disks: DiskStore) -> None:
        self._db = db
        self._disks = disks

    def look(self, disk: Disk) -> str | None:
        """Return what is wrong with an available disk's files, None when they are there.

        What has changed since the last look is recorded, with an event.
        """
        missing = self._missing(disk.uuid)
        problem = f"The files of disk {disk.uuid} are missing ({missing})." if missing else None
        if problem != disk.problem:
            log.error("%s", problem or f"the files of disk {disk.uuid} are there again")
            with self._db.transaction() as connection:
                connection.execute(
                    "UPDATE disks SET problem = ? WHERE uuid = ?", (problem, disk.uuid)
                )
                record_event(
                    connection, "disk.missing" if problem else "disk.found", disk.uuid,
                    problem or f"The files of disk {disk.uuid} are there again.",
                )  # fmt: skip
        return problem

    def _missing(self, uuid: str) -> Path | None:
        """Return a file that is missing; one that a change of layers takes away meanwhile is not."""
        files = self._disks.files(uuid)
        while True:
            form = self._disks.form(uuid)
            if form is None:
                return files.data(RAW)
            if form == "raw":
                return None
            try:
                layout = files.layout()
            except (StratocacheError, OSError):
                return None  # unreadable, which opening it says better
            if layout is None:
                return None  # of the first release, or raw by now
            for path in (files.data(layout.top), files.bitmap(layout.top)):
                if not path.exists():
                    if files.layout() != layout:
                        break
                    return path
            else:
                return None
