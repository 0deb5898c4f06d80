"""Makes what is agree with what should be: disk files, iSCSI targets, rows on their way out.

One pass looks at every row that is not at rest and at every target that exists, does what is
missing, and records what it did in few transactions. Every step may be done twice, so a crash
anywhere is repaired by the next pass. Passes never overlap.
"""

import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Conflict
from stratocache.cache.images import ImageStore
from stratocache.fs import launch_ends
from stratocache.fs.blocks import Blocks
from stratocache.fs.disk_changes import DiskChanges
from stratocache.fs.disk_reconciliation import DiskReconciliation
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.leases import Leases, utc_now
from stratocache.fs.manifests import Manifests
from stratocache.fs.operation_ends import fail, finish
from stratocache.fs.partition import mounted_images
from stratocache.fs.state import Database
from stratocache.fs.target import TargetDaemon
from stratocache.fs.target_reconciliation import TargetReconciliation

log = logging.getLogger(__name__)


class Reconciler:
    """Reconciles one host.

    `before_removal` ends whatever is done to an image, before its files go.
    """

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        images: ImageStore,
        disks: DiskStore,
        targets: TargetDaemon,
        blocks: Blocks,
        work: DiskWork,
        clock: Callable[[], datetime] = utc_now,
        before_removal: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._before_removal = before_removal or _nothing_to_do
        self._configuration = configuration
        self._db = db
        self._blocks = blocks
        self.manifests = Manifests(db, images, disks)
        self.leases = Leases(db, clock)
        self.targets = TargetReconciliation(configuration, db, disks, targets)
        self.exclusive = trio.Lock()
        """Held during a pass: whoever holds it may exchange the files of disks."""
        self._disks = DiskReconciliation(
            configuration, db, images, disks, blocks, self.manifests, work
        )
        self._changes = DiskChanges(db, disks, blocks, self.manifests, self.targets, work)

    async def adopt(self) -> None:
        """At start, before the first pass, look at what a crash may have left of disks' files."""
        await trio.to_thread.run_sync(self._disks.adopt)

    async def reconcile(self) -> bool:
        """Run one pass; return whether something is still to be done."""
        async with self.exclusive:
            if self.leases.remaining_s() == 0:
                await trio.to_thread.run_sync(self.leases.expire)
            await self._disks.create()
            settled = await self._changes.apply()
            settled &= await self.targets.reconcile()
            await trio.to_thread.run_sync(self._disks.end_quarantine)
            await self._disks.delete()
            await self._delete_images()
            if launch_ends.unsettled(self._db):
                await trio.to_thread.run_sync(launch_ends.settle, self._db)
            return not settled

    async def _delete_images(self) -> None:
        rows = self._db.rows("SELECT id, number FROM images WHERE state = 'deleting'")
        mounted = mounted_images(self._configuration.blocks) if rows else {}
        for row in rows:
            if row["id"] in mounted:
                await trio.to_thread.run_sync(self._keep_mounted, row["id"], mounted[row["id"]])
                continue
            await self._before_removal(row["id"])
            self._blocks.forget_image(row["number"])
            try:
                await trio.to_thread.run_sync(self.manifests.remove, row["id"])
            except OSError:
                log.exception("deleting image %s failed; it is tried again", row["id"])
                continue
            await trio.to_thread.run_sync(self._record_deleted_image, row["id"])

    def _keep_mounted(self, image_id: str, mount_points: list[Path]) -> None:
        where = ", ".join(map(str, mount_points)) or "this host"
        error = Conflict(
            "image-mounted", f"Image {image_id} is mounted at {where}; run image umount first."
        )
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE images SET state = CASE WHEN verified_at IS NULL THEN 'provisional' "
                "WHEN withdrawn_at IS NULL THEN 'verified' ELSE 'withdrawn' END WHERE id = ?",
                (image_id,),
            )
            fail(connection, "delete-image", image_id, error)

    def _record_deleted_image(self, image_id: str) -> None:
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM images WHERE id = ?", (image_id,))
            finish(connection, "delete-image", image_id, {})


async def _nothing_to_do(_: str) -> None:
    """Stand in where nothing is ever done to images."""
