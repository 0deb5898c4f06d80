"""Makes what is agree with what should be: disk files, iSCSI targets, rows on their way out.

One pass looks at every row that is not at rest and at every target that exists, does what is
missing, and records what it did in few transactions. Every step may be done twice, so a crash
anywhere is repaired by the next pass. Passes never overlap.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import cast

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import (
    Cancelled,
    Conflict,
    ErrorRecord,
    Internal,
    NoSpace,
    NotFound,
    StratocacheError,
    Unreachable,
    from_record,
)
from stratocache.cache.images import ImageStore
from stratocache.fs import intents, inventory, records
from stratocache.fs.blocks import Blocks
from stratocache.fs.disks import DiskStore
from stratocache.fs.operations import fail, finish, undo_launch
from stratocache.fs.partition import mounted_images
from stratocache.fs.records import Attachment, Caller, Disk, DiskForm
from stratocache.fs.state import Database, record_event
from stratocache.fs.target import Target, TargetDaemon, iqn_of, serial_of

log = logging.getLogger(__name__)

_EVERYONE = Caller("blockd", True)
_PARALLEL_DISKS = 8


class Reconciler:
    """Reconciles one host."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        images: ImageStore,
        disks: DiskStore,
        targets: TargetDaemon,
        blocks: Blocks,
    ) -> None:
        self._configuration = configuration
        self._db = db
        self._images = images
        self._disks = disks
        self._targets = targets
        self._blocks = blocks
        self._secrets = configuration.run_dir / "secrets"

    async def reconcile(self) -> bool:
        """Run one pass; return whether something is still to be done."""
        await self._create_disks()
        settled = await self._reconcile_targets()
        await self._delete_disks()
        await self._delete_images()
        await trio.to_thread.run_sync(self._settle_launches)
        return not settled

    # -- disks

    async def _create_disks(self) -> None:
        rows = self._db.rows("SELECT * FROM disks WHERE state = 'creating' ORDER BY number")
        disks = [records.disk_from(row) for row in rows]
        outcomes: dict[str, DiskForm | StratocacheError] = {}
        limiter = trio.CapacityLimiter(_PARALLEL_DISKS)

        async def create(disk: Disk) -> None:
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
                nursery.start_soon(create, disk)
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

    async def _delete_disks(self) -> None:
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

    async def _delete_images(self) -> None:
        rows = self._db.rows("SELECT id, number FROM images WHERE state = 'deleting'")
        mounted = mounted_images(self._configuration.blocks) if rows else {}
        for row in rows:
            if row["id"] in mounted:
                await trio.to_thread.run_sync(self._keep_mounted, row["id"], mounted[row["id"]])
                continue
            self._blocks.forget_image(row["number"])
            try:
                with suppress(NotFound):  # removed by a pass that did not live to record it
                    await trio.to_thread.run_sync(self._images.remove, row["id"])
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
            connection.execute("UPDATE images SET state = 'verified' WHERE id = ?", (image_id,))
            fail(connection, "delete-image", image_id, error)

    def _record_deleted_image(self, image_id: str) -> None:
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM images WHERE id = ?", (image_id,))
            finish(connection, "delete-image", image_id, {})

    # -- targets

    async def _reconcile_targets(self) -> bool:
        """Make targets agree with attachments; return False when that must be tried again."""
        wanted = await trio.to_thread.run_sync(self._wanted_targets)
        removing = [item for item in inventory.attachments(self._db) if item.state == "removing"]
        try:
            actual = await self._targets.list()
        except Unreachable as error:
            log.info("targets wait: %s", error)
            return False
        settled = True
        ended: list[Attachment] = []
        stale = set(actual) - set(wanted) - {item.number for item in removing}
        for number in stale:
            settled &= await self._remove_target(number)
        for item in removing:
            if item.number not in actual or await self._remove_target(item.number):
                ended.append(item)
            else:
                settled = False
        made: list[Attachment] = []
        failed: list[tuple[Attachment, StratocacheError]] = []
        for number, (item, target) in wanted.items():
            try:
                if not (number in actual and actual[number].matches(target)):
                    await self._targets.create(target)
                if item.state == "wanted":
                    made.append(item)
            except Unreachable as error:
                log.info("target of attachment %s waits: %s", item.id, error)
                settled = False
            except StratocacheError as error:
                log.error("target of attachment %s: %s", item.id, error)
                settled = False
                if item.state == "wanted":
                    failed.append((item, error))
        if ended or made or failed:
            await trio.to_thread.run_sync(self._record_attachments, ended, made, failed)
        return settled

    async def _remove_target(self, number: int) -> bool:
        try:
            await self._targets.remove(number)
        except StratocacheError as error:
            log.warning("target %d stays for now: %s", number, error)
            return False
        return True

    def _wanted_targets(self) -> dict[int, tuple[Attachment, Target]]:
        """Return the targets that should be, by number; their secrets' files are written."""
        wanted = {}
        items = inventory.attachments(self._db)
        self._secrets.mkdir(mode=0o700, exist_ok=True)
        for item in items:
            backing = None if item.state == "removing" else self._backing(item)
            if backing is not None:
                wanted[item.number] = (item, _target(item, backing))
                _write_secret(self._secrets / item.id, item.chap_secret)
        for name in set(os.listdir(self._secrets)) - {item.id for item in items}:
            (self._secrets / name).unlink(missing_ok=True)
        return wanted

    def _backing(self, item: Attachment) -> Path | None:
        """Return the file that an attachment exports, or None while there is none."""
        if item.image_id is not None:
            return self._configuration.blocks / "images" / item.image_id
        disk = inventory.disk(self._db, _EVERYONE, item.disk_uuid or "")
        if disk.form == "raw":
            return self._disks.data_path(disk.uuid)
        if disk.form == "overlay":
            return self._configuration.blocks / "disks" / disk.uuid
        return None

    def _record_attachments(
        self,
        ended: list[Attachment],
        made: list[Attachment],
        failed: list[tuple[Attachment, StratocacheError]],
    ) -> None:
        for item in ended:
            (self._secrets / item.id).unlink(missing_ok=True)
        with self._db.transaction() as connection:
            for item in ended:
                connection.execute("DELETE FROM attachments WHERE id = ?", (item.id,))
                fail(connection, "attach", item.id, Cancelled("detached", "It was detached."))
                finish(connection, "detach", item.id, {})
            for item in made:
                connection.execute(
                    "UPDATE attachments SET state = 'ready' WHERE id = ? AND state = 'wanted'",
                    (item.id,),
                )
                finish(connection, "attach", item.id, {"attachment": item.id})
            for item, error in failed:
                fail(connection, "attach", item.id, error)
                launch = self._db.row("SELECT 1 FROM launches WHERE instance = ?", item.instance)
                if launch is not None:
                    undo_launch(connection, self._db, item.instance, error)
                else:
                    intents.remove_attachment(connection, item)

    # -- launches

    def _settle_launches(self) -> None:
        """Call launches active whose attachments are ready, drop those of which nothing is left."""
        rows = self._db.rows(
            "SELECT * FROM launches WHERE state = 'ending' "
            "OR state = 'preparing' AND boot_disk IS NOT NULL"
        )
        for row in rows:
            launch = records.launch_from(row)
            items = inventory.attachments(self._db, instance=launch.instance)
            with self._db.transaction() as connection:
                if launch.state == "preparing" and all(item.state == "ready" for item in items):
                    connection.execute(
                        "UPDATE launches SET state = 'active' WHERE instance = ?",
                        (launch.instance,),
                    )
                    finish(connection, "launch", launch.instance, {"instance": launch.instance})
                gone = not items and inventory.find_disk(self._db, launch.boot_disk or "") is None
                if launch.state == "ending" and gone:
                    connection.execute(
                        "DELETE FROM launches WHERE instance = ?", (launch.instance,)
                    )
                    finish(connection, "halt", launch.instance, {})
                    started = inventory.operation(self._db, launch.operation_id)
                    if started.error is not None:
                        error = from_record(cast(ErrorRecord, started.error))
                        fail(connection, "launch", launch.instance, error)
                    record_event(
                        connection, "launch.ended", launch.instance,
                        f"Nothing of instance {launch.instance} is left.",
                    )  # fmt: skip


def _target(item: Attachment, backing: Path) -> Target:
    return Target(
        number=item.number,
        iqn=iqn_of(item.id),
        backing=backing,
        read_only=item.access == "ro",
        serial=serial_of(item.disk_uuid or item.image_id or ""),
        chap_username=item.chap_username,
        chap_secret=item.chap_secret,
        initiator=item.initiator,
    )


def _write_secret(path: Path, secret: str) -> None:
    """Write a CHAP secret where QEMU may read it by name, so that no command line shows it."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)
    partial.rename(path)
