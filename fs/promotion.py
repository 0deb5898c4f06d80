"""Promotion: an overlay becomes a raw disk, which needs no base, while it is in use.

Everything that the overlay does not have is filled in from what is below (`Overlay.fill`); what is
there says how far it has come, so that it goes on after any interruption. Then the disk is switched:
its target goes, its files are exchanged, and the next pass makes the target again on the file. The
initiator logs in again and repeats what was under way.

On file systems with reflinks every overlay is promoted by itself, elsewhere when somebody asks.
"""

import logging
from collections.abc import Callable
from functools import partial

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Cancelled, Conflict, StratocacheError
from stratocache.cache.space import Space
from stratocache.fs import disk_intents, inventory
from stratocache.fs.acquisition import Report
from stratocache.fs.blocks import Blocks
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.manifests import Manifests
from stratocache.fs.migrations import is_migrating
from stratocache.fs.operation_ends import finish
from stratocache.fs.records import Caller, Disk, Operation
from stratocache.fs.state import Database, record_event
from stratocache.fs.target_reconciliation import TargetReconciliation

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_PROMOTABLE = """
    SELECT uuid, owner FROM disks WHERE form = 'overlay' AND state = 'available' AND NOT EXISTS (
        SELECT 1 FROM operations WHERE subject = uuid AND kind = 'hydrate' AND state <> 'done')
    AND NOT EXISTS (
        SELECT 1 FROM images WHERE id = base_image AND state NOT IN ('verified', 'withdrawn'))
"""


class Promotion:
    """Performs the operations of kind `hydrate`.

    `exclusive` is held by the reconciler during its passes, so that none makes targets while the
    files of their disk are exchanged.
    """

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        disks: DiskStore,
        blocks: Blocks,
        manifests: Manifests,
        work: DiskWork,
        targets: TargetReconciliation,
        exclusive: trio.Lock,
        wake: Callable[[], None],
    ) -> None:
        self._db = db
        self._disks = disks
        self._blocks = blocks
        self._manifests = manifests
        self._work = work
        self._targets = targets
        self._exclusive = exclusive
        self._wake = wake
        self._space = Space(configuration.state_dir, configuration.space.reserve_bytes)

    async def look(self) -> None:
        """Ask for the promotion of overlays that can share all that they lack."""
        if not await trio.to_thread.run_sync(self._disks.reflink_supported):
            return
        for row in self._db.rows(_PROMOTABLE):
            try:
                await trio.to_thread.run_sync(
                    disk_intents.hydrate_disk, self._db, Caller(row["owner"], "admin"), row["uuid"]
                )
            except StratocacheError as error:
                log.debug("disk %s is not promoted now: %s", row["uuid"], error)

    async def perform(self, operation: Operation, report: Report) -> None:
        """Promote a disk; raises `Cancelled`, `NoSpace` and what reading the base raises."""
        uuid = operation.subject
        while True:
            disk = inventory.find_disk(self._db, uuid)
            if disk is None or disk.state != "available":
                raise Cancelled("disk-deleted", f"Disk {uuid} has been deleted.")
            if disk.form == "raw":
                await trio.to_thread.run_sync(self._record, operation, disk)
                return
            if not self._has_pending_snapshot(uuid):
                filled = await self._work.run(uuid, partial(self._fill, disk, report))
                if filled and await self._switch(operation, disk):
                    self._wake()
                    return
            await trio.sleep(_RETRY_S)

    def _has_pending_snapshot(self, uuid: str) -> bool:
        states = {item.state for item in inventory.snapshots(self._db, uuid)}
        return bool(states & {"creating", "absorbing"})

    async def _fill(self, disk: Disk, report: Report) -> None:
        reflink = await trio.to_thread.run_sync(self._disks.reflink_supported)
        overlay = await self._blocks.open_overlay(disk.number)
        missing_bytes = overlay.size_bytes - overlay.local_bytes
        if not reflink:
            self._space.require(missing_bytes)
        await overlay.fill(
            lambda done_bytes: report(done_bytes, overlay.size_bytes), reflink=reflink
        )

    async def _switch(self, operation: Operation, disk: Disk) -> bool:
        """Exchange the files; return False when that cannot be done now."""
        async with self._exclusive:
            if self._has_pending_snapshot(disk.uuid) or is_migrating(self._db, disk.uuid):
                return False
            if not await self._targets.release(disk.uuid):
                self._wake()
                return False
            # once begun it ends: a cancelled thread would go on beside the next pass
            with trio.CancelScope(shield=True):
                try:
                    async with self._blocks.closed(disk.number, flush=True):
                        await trio.to_thread.run_sync(self._disks.finish_promotion, disk.uuid)
                        await trio.to_thread.run_sync(self._record, operation, disk)
                except Conflict as conflict:
                    # frozen, or grown, after it was filled
                    log.info("disk %s is filled again: %s", disk.uuid, conflict)
                    self._wake()
                    return False
                finally:
                    self._wake()
        return True

    def _record(self, operation: Operation, disk: Disk) -> None:
        with self._db.transaction() as connection:
            switched = connection.execute(
                "UPDATE disks SET form = 'raw', base_manifest = NULL, generation = generation + 1 "
                "WHERE uuid = ? AND form = 'overlay'",
                (disk.uuid,),
            )
            finish(connection, "hydrate", disk.uuid, {"disk": disk.uuid}, operation.id)
            if switched.rowcount:
                record_event(
                    connection, "disk.promoted", disk.uuid,
                    f"Disk {disk.uuid} is complete and needs no base any more.",
                )  # fmt: skip
        self._manifests.collect(disk.base_manifest)
