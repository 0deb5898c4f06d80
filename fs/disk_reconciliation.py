"""Disks on their way in and out: files are made or removed, then the rows say so."""

import logging
import os

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Internal, NoSpace, StratocacheError
from stratocache.cache.images import ImageStore
from stratocache.fs import records
from stratocache.fs.blocks import Blocks
from stratocache.fs.disks import DiskStore
from stratocache.fs.operations import fail, finish, undo_launch
from stratocache.fs.records import Disk, DiskForm
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

_PARALLEL_DISKS = 8


class DiskReconciliation:
    """Makes the files of disks agree with their rows; every step may be done twice."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        images: ImageStore,
        disks: DiskStore,
        blocks: Blocks,
    ) -> None:
        self._configuration = configuration
        self._db = db
        self._images = images
        self._disks = disks
        self._blocks = blocks

    async def create(self) -> None:
        """Make the files of disks that are being created, several at a time."""
        rows = self._db.rows("SELECT * FROM disks WHERE state = 'creating' ORDER BY number")
        disks = [records.disk_from(row) for row in rows]
        outcomes: dict[str, DiskForm | StratocacheError] = {}
        limiter = trio.CapacityLimiter(_PARALLEL_DISKS)

        async def make(disk: Disk) -> None:
            try:
                outcomes[disk.uuid] = await trio.to_thread.run_sync(
                    self._create_disk, disk, limiter=limiter
                )
            except StratocacheError as error:
                outcomes[disk.uuid] = error
            except Exception as error:
                log.exception("creating disk %s failed", disk.uuid)
                outcomes[disk.uuid] = Internal("internal", f"Creating the disk failed: {error!r}.")

        async with trio.open_nursery() as nursery:
            for disk in disks:
                nursery.start_soon(make, disk)
        if disks:
            await trio.to_thread.run_sync(self._record_disks, disks, outcomes)

    def _create_disk(self, disk: Disk) -> DiskForm:
        space = os.statvfs(self._configuration.state_dir)
        free_bytes = space.f_bavail * space.f_frsize
        if free_bytes < self._configuration.space.reserve_bytes:
            raise NoSpace(
                "no-space",
                f"Only {free_bytes} bytes are free below {self._configuration.state_dir}, the "
                f"reserve is {self._configuration.space.reserve_bytes}; free some space.",
            )
        if disk.base_image is None:
            return self._disks.create_blank(disk.uuid, disk.size_bytes)
        return self._disks.create_clone(
            disk.uuid, disk.size_bytes, self._images.reader(disk.base_image)
        )

    def _record_disks(
        self, disks: list[Disk], outcomes: dict[str, DiskForm | StratocacheError]
    ) -> None:
        for disk in disks:
            if isinstance(outcomes[disk.uuid], StratocacheError):
                self._disks.delete(disk.uuid)
        with self._db.transaction() as connection:
            for disk in disks:
                outcome = outcomes[disk.uuid]
                if isinstance(outcome, StratocacheError):
                    self._record_failed_disk(disk, outcome)
                    continue
                connection.execute(
                    "UPDATE disks SET state = 'available', form = ? "
                    "WHERE uuid = ? AND state = 'creating'",
                    (outcome, disk.uuid),
                )
                finish(connection, "create-disk", disk.uuid, {"disk": disk.uuid})

    def _record_failed_disk(self, disk: Disk, error: StratocacheError) -> None:
        connection = self._db.connection
        fail(connection, "create-disk", disk.uuid, error)
        launch = self._db.row("SELECT instance FROM launches WHERE boot_disk = ?", disk.uuid)
        if launch is not None:
            undo_launch(connection, self._db, launch["instance"], error)
        else:
            connection.execute("DELETE FROM disks WHERE uuid = ?", (disk.uuid,))

    async def delete(self) -> None:
        """Remove the files and rows of disks that nobody has attached any more."""
        rows = self._db.rows(
            "SELECT uuid, number FROM disks WHERE state = 'deleting' AND NOT EXISTS "
            "(SELECT 1 FROM attachments WHERE disk_uuid = disks.uuid)"
        )
        for row in rows:
            uuid = row["uuid"]
            self._blocks.forget_disk(row["number"])
            try:
                await trio.to_thread.run_sync(self._disks.delete, uuid)
            except OSError:
                log.exception("deleting disk %s failed; it is tried again", uuid)
                continue
            await trio.to_thread.run_sync(self._record_deleted_disk, uuid)

    def _record_deleted_disk(self, uuid: str) -> None:
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM disks WHERE uuid = ?", (uuid,))
            finish(connection, "delete-disk", uuid, {})
