"""Changes of disks that exist: snapshots are frozen and deleted, disks rolled back and grown.

Part of a reconciler's pass, before targets are made: where the files of an attached disk are
exchanged its targets go first, and come back later in the same pass, made of the new generation.
Every step may be done twice.
"""

import logging
from typing import Any

import trio

from stratocache.cache.errors import Internal, StratocacheError
from stratocache.fs import inventory, records
from stratocache.fs.blocks import Blocks
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.layers import LAYOUT, DiskFiles
from stratocache.fs.manifests import Manifests
from stratocache.fs.operation_ends import fail, finish
from stratocache.fs.records import Disk, DiskForm, Operation, Snapshot, SnapshotForm
from stratocache.fs.state import Database, now
from stratocache.fs.target_reconciliation import TargetReconciliation

log = logging.getLogger(__name__)

_CREATING = """
    SELECT snapshots.* FROM snapshots JOIN disks ON disks.uuid = disk_uuid
    WHERE snapshots.state = 'creating' AND disks.state = 'available' ORDER BY snapshots.number
"""
_DELETING = """
    SELECT snapshots.* FROM snapshots JOIN disks ON disks.uuid = disk_uuid
    WHERE snapshots.state = 'deleting' AND disks.state = 'available'
"""
# those that no save uses any more
_TRANSIENT = """
    UPDATE snapshots SET state = 'deleting' WHERE transient = 1 AND state = 'available'
    AND NOT EXISTS (
        SELECT 1 FROM operations WHERE kind = 'save' AND subject = disk_uuid
        AND operations.state IN ('pending', 'running')
        AND json_extract(request, '$.snapshot') = snapshots.id)
"""
_CHANGES = """
    SELECT * FROM operations WHERE state IN ('pending', 'running')
    AND kind IN ('rollback', 'resize') ORDER BY created_at, id
"""


class DiskChanges:
    """Makes wanted changes of disks."""

    def __init__(
        self,
        db: Database,
        disks: DiskStore,
        blocks: Blocks,
        manifests: Manifests,
        targets: TargetReconciliation,
        work: DiskWork,
    ) -> None:
        self._db = db
        self._disks = disks
        self._blocks = blocks
        self._manifests = manifests
        self._targets = targets
        self._work = work

    async def apply(self) -> bool:
        """Make all changes that can be made now; return False when one must be tried again."""
        settled = True
        for row in self._db.rows(_CREATING):
            settled &= await self._freeze(records.snapshot_from(row))
        for row in self._db.rows(_CHANGES):
            settled &= await self._change(records.operation_from(row))
        if self._db.row("SELECT 1 FROM snapshots WHERE transient = 1 LIMIT 1") is not None:
            await trio.to_thread.run_sync(self._drop_transient)
        for row in self._db.rows(_DELETING):
            settled &= await self._delete(records.snapshot_from(row))
        return settled

    # -- snapshots

    async def _freeze(self, snapshot: Snapshot) -> bool:
        disk = inventory.find_disk(self._db, snapshot.disk_uuid)
        assert disk is not None  # the snapshot's row refers to it
        if any(item.state == "absorbing" for item in inventory.snapshots(self._db, disk.uuid)):
            return True  # its end wakes the reconciler
        await self._work.interrupt(disk.uuid)
        try:
            frozen = await self._take(disk, snapshot)
        except (StratocacheError, OSError) as error:
            log.error("snapshot %s of disk %s: %s", snapshot.id, disk.uuid, error)
            await trio.to_thread.run_sync(self._record_unfrozen, snapshot, _as_ours(error))
            return False
        if frozen is None:
            return False
        await trio.to_thread.run_sync(self._record_frozen, snapshot, disk, *frozen)
        return True

    async def _take(self, disk: Disk, snapshot: Snapshot) -> tuple[SnapshotForm, int] | None:
        """Freeze; return the snapshot's form and size, or None when that must be tried again."""
        if disk.form == "raw":
            if await trio.to_thread.run_sync(self._disks.reflink_supported):
                size_bytes = disk.size_bytes
                await trio.to_thread.run_sync(self._disks.snapshot_raw, disk.uuid, snapshot.id)
                return "file", size_bytes
            if not await self._targets.release(disk.uuid):
                return None
            if await trio.to_thread.run_sync(self._disks.form, disk.uuid) == "raw":
                await trio.to_thread.run_sync(self._disks.freeze_raw, disk.uuid)
            return "manifest", disk.size_bytes
        overlay = await self._blocks.open_overlay(disk.number)
        try:
            await overlay.freeze()
        except OSError as error:
            if overlay.frozen is None:
                raise
            log.error("snapshot %s is not durable yet: %s", snapshot.id, error)
            return None
        assert overlay.frozen is not None
        return "manifest", overlay.frozen.size_bytes

    def _record_frozen(
        self, snapshot: Snapshot, disk: Disk, form: SnapshotForm, size_bytes: int
    ) -> None:
        state = "absorbing" if form == "manifest" else "available"
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE snapshots SET state = ?, form = ?, size_bytes = ?, frozen_at = ? "
                "WHERE id = ? AND state = 'creating'",
                (state, form, size_bytes, now(), snapshot.id),
            )
            if form == "manifest" and disk.form == "raw":
                connection.execute(
                    "UPDATE disks SET form = 'overlay', generation = generation + 1 "
                    "WHERE uuid = ? AND form = 'raw'",
                    (disk.uuid,),
                )
            finish(
                connection, "snapshot", snapshot.id, {"snapshot": snapshot.id, "disk": disk.uuid}
            )

    def _record_unfrozen(self, snapshot: Snapshot, error: StratocacheError) -> None:
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM snapshots WHERE id = ?", (snapshot.id,))
            fail(connection, "snapshot", snapshot.id, error)
            for operation in inventory.open_operations(self._db, snapshot.disk_uuid, "save"):
                if operation.request["snapshot"] == snapshot.id:
                    fail(connection, "save", snapshot.disk_uuid, error, operation.id)

    def _drop_transient(self) -> None:
        with self._db.transaction() as connection:
            connection.execute(_TRANSIENT)

    async def _delete(self, snapshot: Snapshot) -> bool:
        if snapshot.form == "file":
            cloning = self._db.row(
                "SELECT 1 FROM disks WHERE base_snapshot = ? AND state = 'creating'", snapshot.id
            )
            if cloning is not None:
                return False
            try:
                await trio.to_thread.run_sync(
                    self._disks.delete_raw_snapshot, snapshot.disk_uuid, snapshot.id
                )
            except OSError:
                log.exception("deleting snapshot %s failed; it is tried again", snapshot.id)
                return False
        await trio.to_thread.run_sync(self._record_deleted, snapshot)
        return True

    def _record_deleted(self, snapshot: Snapshot) -> None:
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM snapshots WHERE id = ?", (snapshot.id,))
            finish(connection, "delete-snapshot", snapshot.id, {})
        if snapshot.form == "manifest":
            self._manifests.collect(snapshot.id)

    # -- disks

    async def _change(self, operation: Operation) -> bool:
        disk = inventory.find_disk(self._db, operation.subject)
        if disk is None or disk.state != "available":
            return True
        steps = {"rollback": self._roll_back, "resize": self._resize}
        try:
            return await steps[operation.kind](operation, disk)
        except (StratocacheError, OSError) as error:
            log.error("%s of disk %s: %s", operation.kind, disk.uuid, error)
            await trio.to_thread.run_sync(self._record_failure, operation, _as_ours(error))
            return False

    async def _roll_back(self, operation: Operation, disk: Disk) -> bool:
        pending = [item.state for item in inventory.snapshots(self._db, disk.uuid)]
        if "absorbing" in pending or "creating" in pending:
            return True  # the end of absorbing wakes the reconciler
        snapshot = inventory.find_snapshot(self._db, operation.request["snapshot"])
        assert snapshot is not None  # not deleted while this operation is open
        await self._work.interrupt(disk.uuid)
        async with self._blocks.closed(disk.number, flush=False):
            form = await trio.to_thread.run_sync(self._exchange, disk, snapshot)
        fields: dict[str, Any] = {
            "form": form, "base_manifest": snapshot.id if form == "overlay" else None
        }  # fmt: skip
        await trio.to_thread.run_sync(self._record_change, operation, disk, fields)
        return True

    def _exchange(self, disk: Disk, snapshot: Snapshot) -> DiskForm:
        """Replace the files of a disk by what it was at a snapshot."""
        if snapshot.form == "manifest":
            self._disks.rollback_overlay(disk.uuid, snapshot.id, disk.size_bytes)
            return "overlay"
        self._disks.rollback_raw(disk.uuid, snapshot.id)
        _end_overlay(self._disks.files(disk.uuid))
        if snapshot.size_bytes < disk.size_bytes:
            self._disks.grow_raw(disk.uuid, disk.size_bytes)
        return "raw"

    async def _resize(self, operation: Operation, disk: Disk) -> bool:
        size_bytes = operation.request["size_bytes"]
        if size_bytes > disk.size_bytes:
            if disk.form == "raw":
                await trio.to_thread.run_sync(self._disks.grow_raw, disk.uuid, size_bytes)
            else:
                await self._work.interrupt(disk.uuid)
                overlay = await self._blocks.open_overlay(disk.number)
                await overlay.grow(size_bytes)
        fields = {"size_bytes": max(size_bytes, disk.size_bytes)}
        await trio.to_thread.run_sync(self._record_change, operation, disk, fields)
        return True

    def _record_change(self, operation: Operation, disk: Disk, fields: dict[str, Any]) -> None:
        assignments = ", ".join(f"{column} = :{column}" for column in fields)
        with self._db.transaction() as connection:
            connection.execute(
                f"UPDATE disks SET {assignments}, generation = generation + 1 WHERE uuid = :uuid",  # nosec B608 # no value in it
                {**fields, "uuid": disk.uuid},
            )
            finish(connection, operation.kind, disk.uuid, {"disk": disk.uuid}, operation.id)
        if "base_manifest" in fields:
            self._manifests.collect(disk.base_manifest)

    def _record_failure(self, operation: Operation, error: StratocacheError) -> None:
        with self._db.transaction() as connection:
            fail(connection, operation.kind, operation.subject, error, operation.id)


def _end_overlay(files: DiskFiles) -> None:
    """Let a disk whose raw file is whole and durable be that file alone; on a raw one do nothing."""
    layout = files.layout()
    if layout is not None:
        files.storage.remove(files.directory / LAYOUT)
        files.storage.sync_directory(files.directory)
        files.remove_layer(layout.top)
        files.sweep(None)


def _as_ours(error: StratocacheError | OSError) -> StratocacheError:
    if isinstance(error, StratocacheError):
        return error
    return Internal("disk-failed", f"The files of the disk could not be changed: {error}.")
