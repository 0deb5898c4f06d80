"""Disks on their way in and out: files are made or removed, then the rows say so."""

import logging
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Cancelled, Internal, StratocacheError
from stratocache.cache.images import ImageStore
from stratocache.fs import inventory, records, space_plan
from stratocache.fs.blocks import Blocks
from stratocache.fs.clones import Clone
from stratocache.fs.disk_presence import DiskPresence
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.manifests import Manifests
from stratocache.fs.operation_ends import fail, finish, undo_launch
from stratocache.fs.operation_intents import stop_work
from stratocache.fs.records import Disk, DiskForm
from stratocache.fs.state import Database, record_event, timestamp

log = logging.getLogger(__name__)

_PARALLEL_DISKS = 8
# neither attached, nor being worked on, nor having a snapshot that is being cloned
_DELETABLE = """
    SELECT * FROM disks WHERE state = 'deleting'
    AND NOT EXISTS (SELECT 1 FROM attachments WHERE disk_uuid = disks.uuid)
    AND NOT EXISTS (
        SELECT 1 FROM operations WHERE subject = disks.uuid AND kind IN ('hydrate', 'save')
        AND state IN ('pending', 'running'))
    AND NOT EXISTS (
        SELECT 1 FROM snapshots JOIN disks AS clones ON clones.base_snapshot = snapshots.id
        WHERE snapshots.disk_uuid = disks.uuid AND clones.state = 'creating')
"""
_QUARANTINE_OVER = """
    SELECT uuid FROM disks WHERE quarantined_at <= ? AND state = 'available'
    AND NOT EXISTS (SELECT 1 FROM attachments WHERE disk_uuid = disks.uuid)
"""


class DiskReconciliation:
    """Makes the files of disks agree with their rows; every step may be done twice."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        images: ImageStore,
        disks: DiskStore,
        blocks: Blocks,
        manifests: Manifests,
        work: DiskWork,
    ) -> None:
        self._configuration = configuration
        self._db = db
        self._images = images
        self._disks = disks
        self._blocks = blocks
        self._manifests = manifests
        self._work = work
        self._presence = DiskPresence(db, disks)

    def adopt(self) -> None:
        """At start, let the rows say which form the files of disks have: a crash may have come
        between the two. Overlays of the first release get a layout. Blocks on file I/O."""
        for row in self._db.rows("SELECT * FROM disks WHERE state = 'available'"):
            disk = records.disk_from(row)
            try:
                if disk.base_manifest is not None:
                    self._disks.adopt_overlay(disk.uuid, disk.base_manifest)
                form = self._disks.form(disk.uuid)
                if form == "raw" and disk.form == "overlay":
                    # a promotion that died after its deciding step: the layer's other names go
                    self._disks.finish_promotion(disk.uuid)
                if form is not None:
                    # the frozen layer of a disk that nobody opens could take its space for ever
                    self._disks.tidy(disk.uuid)
            except (StratocacheError, OSError):
                log.exception("the files of disk %s cannot be looked at", disk.uuid)
                continue
            if form is None or disk.problem is not None:
                self._presence.look(disk)
            if form is not None and form != disk.form:
                self._record_form(disk, form)

    def _record_form(self, disk: Disk, form: DiskForm) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE disks SET form = ?1, generation = generation + 1, "
                "base_manifest = CASE ?1 WHEN 'raw' THEN NULL ELSE base_manifest END "
                "WHERE uuid = ?2",
                (form, disk.uuid),
            )
        if form == "raw":
            self._manifests.collect(disk.base_manifest)

    async def create(self) -> None:
        """Make the files of disks that are being created, several at a time."""
        rows = self._db.rows("SELECT * FROM disks WHERE state = 'creating' ORDER BY number")
        disks = [records.disk_from(row) for row in rows]
        if not disks:
            return
        outcomes: dict[str, DiskForm | StratocacheError] = {}
        try:
            outcomes = await trio.to_thread.run_sync(self._create_clones, disks)
        except Exception:
            log.exception("making %d disks together failed; they are made singly", len(disks))
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
                if disk.uuid not in outcomes:
                    nursery.start_soon(make, disk)
        await trio.to_thread.run_sync(self._record_disks, disks, outcomes)

    def _create_clones(self, disks: list[Disk]) -> dict[str, DiskForm | StratocacheError]:
        """Make those that can share extents, together; what is left, one by one will tell why."""
        wanted = [
            disk for disk in disks if disk.base_manifest is not None and self._is_complete(disk)
        ]
        outcomes: dict[str, DiskForm | StratocacheError] = {}
        if not (
            wanted
            and self._disks.reflink_supported()
            and space_plan.admits_all(self._configuration, self._db)
        ):
            return outcomes
        clones = []
        for disk in wanted:
            assert disk.base_manifest is not None
            try:
                reader = self._images.reader(disk.base_manifest)
                clones.append(Clone(disk.uuid, disk.size_bytes, reader))
            except StratocacheError as error:
                outcomes[disk.uuid] = error
        forms, failures = self._disks.create_clones(clones)
        outcomes.update(forms)
        for uuid, failure in failures.items():
            if isinstance(failure, StratocacheError):
                outcomes[uuid] = failure
        return outcomes

    def _is_complete(self, disk: Disk) -> bool:
        """Tell whether all of what a disk is cloned from is here."""
        image = inventory.find_image(self._db, disk.base_image or "")
        return image is None or image.state != "provisional"

    def _create_disk(self, disk: Disk) -> DiskForm:
        space_plan.admit(self._configuration, self._db, disk.uuid, disk.size_bytes)
        if disk.base_manifest is not None:
            base = self._images.mended_reader(disk.base_manifest)
            return self._disks.create_clone(
                disk.uuid, disk.size_bytes, base, disk.base_manifest,
                complete=self._is_complete(disk),
            )  # fmt: skip
        if disk.base_snapshot is not None:
            snapshot = inventory.find_snapshot(self._db, disk.base_snapshot)
            assert snapshot is not None  # it stays as long as a disk is being made of it
            return self._disks.clone_raw_snapshot(
                disk.uuid, disk.size_bytes, snapshot.disk_uuid, snapshot.id
            )
        return self._disks.create_blank(disk.uuid, disk.size_bytes)

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
                    "UPDATE disks SET state = 'available', form = ?1, "
                    "base_manifest = CASE ?1 WHEN 'raw' THEN NULL ELSE base_manifest END "
                    "WHERE uuid = ?2 AND state = 'creating'",
                    (outcome, disk.uuid),
                )
                finish(connection, "create-disk", disk.uuid, {"disk": disk.uuid})
        self._manifests.collect(*{disk.base_manifest for disk in disks})

    def _record_failed_disk(self, disk: Disk, error: StratocacheError) -> None:
        connection = self._db.connection
        fail(connection, "create-disk", disk.uuid, error)
        launch = self._db.row("SELECT instance FROM launches WHERE boot_disk = ?", disk.uuid)
        if launch is not None:
            undo_launch(connection, self._db, launch["instance"], error)
        else:
            connection.execute("DELETE FROM disks WHERE uuid = ?", (disk.uuid,))

    def end_quarantine(self) -> None:
        """Give up disks whose time in quarantine is over. Blocks."""
        period = timedelta(seconds=self._configuration.quarantine.period_s)
        for row in self._db.rows(_QUARANTINE_OVER, timestamp(datetime.now(UTC) - period)):
            with self._db.transaction() as connection:
                given_up = connection.execute(
                    "UPDATE disks SET state = 'deleting' "
                    "WHERE uuid = ? AND state = 'available' AND quarantined_at IS NOT NULL",
                    (row["uuid"],),
                )
                if given_up.rowcount:
                    stop_work(connection, row["uuid"])
                    record_event(
                        connection, "disk.quarantine-over", row["uuid"],
                        f"Disk {row['uuid']} was not restored in time and is deleted.",
                    )  # fmt: skip

    async def delete(self) -> None:
        """Remove the files and rows of disks that nobody has attached any more, several at a time."""
        disks = [records.disk_from(row) for row in self._db.rows(_DELETABLE)]
        if not disks:
            return
        gone: list[Disk] = []
        limiter = trio.CapacityLimiter(_PARALLEL_DISKS)

        async def remove(disk: Disk) -> None:
            await self._work.interrupt(disk.uuid)
            self._blocks.forget_disk(disk.number)
            try:
                await trio.to_thread.run_sync(self._disks.delete, disk.uuid, limiter=limiter)
            except OSError:
                log.exception("deleting disk %s failed; it is tried again", disk.uuid)
            else:
                gone.append(disk)

        async with trio.open_nursery() as nursery:
            for disk in disks:
                nursery.start_soon(remove, disk)
        await trio.to_thread.run_sync(self._record_deleted_disks, gone)

    def _record_deleted_disks(self, disks: list[Disk]) -> None:
        manifests: set[str | None] = set()
        with self._db.transaction() as connection:
            for disk in disks:
                manifests |= {disk.base_manifest, *self._record_deleted_disk(connection, disk)}
        self._manifests.collect(*manifests)

    def _record_deleted_disk(self, connection: sqlite3.Connection, disk: Disk) -> Sequence[str]:
        """Remove the rows of a disk; return its snapshots, which have gone too."""
        gone = Cancelled("disk-deleted", f"Disk {disk.uuid} has been deleted.")
        snapshots = [item.id for item in inventory.snapshots(self._db, disk.uuid)]
        for snapshot_id in snapshots:
            fail(connection, "snapshot", snapshot_id, gone)
            finish(connection, "delete-snapshot", snapshot_id, {})
        for kind in ("rollback", "resize"):
            fail(connection, kind, disk.uuid, gone)
        connection.execute("DELETE FROM snapshots WHERE disk_uuid = ?", (disk.uuid,))
        connection.execute("DELETE FROM disks WHERE uuid = ?", (disk.uuid,))
        finish(connection, "delete-disk", disk.uuid, {})
        return snapshots
