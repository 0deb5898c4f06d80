"""iSCSI targets and attachments: each attachment has its target, each target its attachment."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Cancelled, StratocacheError, Unreachable
from stratocache.fs import intents, inventory, records
from stratocache.fs.disks import DiskStore
from stratocache.fs.launch_ends import settle_ready
from stratocache.fs.layers import RAW_DATA
from stratocache.fs.operations import fail, finish, undo_launch
from stratocache.fs.records import Attachment
from stratocache.fs.state import Database
from stratocache.fs.target import ActualTarget, Target, TargetDaemon, iqn_of, serial_of

log = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 30.0
_CHANGED = """
    SELECT attachments.* FROM attachments LEFT JOIN disks ON disks.uuid = disk_uuid
    WHERE attachments.state <> 'ready' OR attachments.generation <> disks.generation
    ORDER BY attachments.number
"""


class TargetReconciliation:
    """Makes targets agree with attachments; every step may be done twice.

    What targets there are is looked at only when it may not be known: at first, when the daemon was
    started anew, after anything went wrong, and now and then. Else only rows that are not at rest
    are.
    """

    def __init__(
        self, configuration: Configuration, db: Database, disks: DiskStore, targets: TargetDaemon
    ) -> None:
        self._configuration = configuration
        self._db = db
        self._disks = disks
        self._targets = targets
        self._secrets = configuration.run_dir / "secrets"
        self._known: object = None
        """The daemon's incarnation whose targets are what the rows say, as far as they are at rest."""
        self._looked_at = 0.0

    async def release(self, disk_uuid: str) -> bool:
        """Let go of a disk's file: remove its targets, until `reconcile` makes them again.

        Return False when one of them stays for now.
        """
        released = True
        self._known = None
        for item in inventory.attachments(self._db, disk_uuid=disk_uuid):
            released &= await self._remove_target(item.number)
        return released

    async def reconcile(self) -> bool:
        """Make targets agree with attachments; return False when that must be tried again."""
        incarnation = self._targets.incarnation()
        known = (
            incarnation is not None
            and incarnation == self._known
            and trio.current_time() < self._looked_at + _LOOK_INTERVAL_S
        )
        self._known = None
        if known:
            items = [records.attachment_from(row) for row in self._db.rows(_CHANGED)]
            actual: dict[int, ActualTarget] = {}
            settled = not items or await self._settle(items, actual, known=True)
        else:
            self._looked_at = trio.current_time()
            items = await trio.to_thread.run_sync(self._all)
            try:
                actual = await self._targets.list()
            except Unreachable as error:
                log.info("targets wait: %s", error)
                return False
            settled = True
            for number in set(actual) - {item.number for item in items}:
                settled &= await self._remove_target(number)
            settled &= await self._settle(items, actual, known=False)
        if settled:
            self._known = incarnation
        return settled

    async def _settle(
        self, items: list[Attachment], actual: dict[int, ActualTarget], *, known: bool
    ) -> bool:
        """Make the targets of some attachments agree; return False if that must be tried again.

        When they are `known`, those that are ready have a target and those that are wanted none.
        """
        wanted = await trio.to_thread.run_sync(self._wanted_targets, items)
        settled = True
        ended: list[Attachment] = []
        for item in items:
            if item.state == "removing":
                gone = not known and item.number not in actual
                if gone or await self._remove_target(item.number):
                    ended.append(item)
                else:
                    settled = False
            elif item.number not in wanted:
                there = item.state == "ready" if known else item.number in actual
                settled &= not there or await self._remove_target(item.number)
        made, failed, all_made = await self._make_targets(wanted.values(), actual, known=known)
        if ended or made or failed:
            await trio.to_thread.run_sync(self._record_attachments, ended, made, failed)
        return settled and all_made

    async def _make_targets(
        self,
        wanted: Iterable[tuple[Attachment, Target, int]],
        actual: dict[int, ActualTarget],
        *,
        known: bool,
    ) -> tuple[list[tuple[Attachment, int]], list[tuple[Attachment, StratocacheError]], bool]:
        """Make targets; return what is to be recorded as made and as failed, and whether all are."""
        made: list[tuple[Attachment, int]] = []
        failed: list[tuple[Attachment, StratocacheError]] = []
        settled = True

        async def make(item: Attachment, target: Target, generation: int) -> None:
            nonlocal settled
            try:
                if known and item.state == "ready":
                    await self._targets.remove(item.number)
                await self._make_target(item, target, generation, actual.get(item.number))
                if item.state == "wanted" or item.generation != generation:
                    made.append((item, generation))
            except Unreachable as error:
                log.info("target of attachment %s waits: %s", item.id, error)
                settled = False
            except StratocacheError as error:
                log.error("target of attachment %s: %s", item.id, error)
                settled = False
                if item.state == "wanted":
                    failed.append((item, error))

        # all at once: the daemon makes together those that come together
        async with trio.open_nursery() as nursery:
            for item, target, generation in wanted:
                nursery.start_soon(make, item, target, generation)
        return made, failed, settled

    async def _make_target(
        self, item: Attachment, target: Target, generation: int, actual: ActualTarget | None
    ) -> None:
        if actual is not None and item.generation == generation and actual.matches(target):
            return
        if actual is not None and item.generation != generation:
            # it may match, and yet have the old file, or the old size of it
            await self._targets.remove(item.number)
        await self._targets.create(target)

    async def _remove_target(self, number: int) -> bool:
        try:
            await self._targets.remove(number)
        except StratocacheError as error:
            log.warning("target %d stays for now: %s", number, error)
            return False
        return True

    def _all(self) -> list[Attachment]:
        """Return every attachment; the files of secrets that belong to none go."""
        items = inventory.attachments(self._db)
        self._secrets.mkdir(mode=0o700, exist_ok=True)
        for name in set(os.listdir(self._secrets)) - {item.id for item in items}:
            (self._secrets / name).unlink(missing_ok=True)
        return items

    def _wanted_targets(self, items: list[Attachment]) -> dict[int, tuple[Attachment, Target, int]]:
        """Return the targets that should be, by number, with the generation of what they export;
        their secrets' files are written."""
        wanted = {}
        for item in items:
            backing = None if item.state == "removing" else self._backing(item)
            if backing is not None:
                path, generation = backing
                wanted[item.number] = (item, _target(item, path), generation)
                _write_secret(self._secrets / item.id, item.chap_secret)
        return wanted

    def _backing(self, item: Attachment) -> tuple[Path, int] | None:
        """Return the file that an attachment exports and its generation, None while there is none."""
        if item.image_id is not None:
            return self._configuration.blocks / "images" / item.image_id, 0
        disk = inventory.find_disk(self._db, item.disk_uuid or "")
        assert disk is not None  # the attachment's row refers to it
        if disk.form == "overlay":
            return self._configuration.blocks / "disks" / disk.uuid, disk.generation
        # what a crash left may say otherwise than the row, which is then about to be corrected
        if disk.form == "raw" and self._disks.form(disk.uuid) == "raw":
            return self._disks.data_path(disk.uuid), disk.generation
        return None

    def _record_attachments(
        self,
        ended: list[Attachment],
        made: list[tuple[Attachment, int]],
        failed: list[tuple[Attachment, StratocacheError]],
    ) -> None:
        for item in ended:
            (self._secrets / item.id).unlink(missing_ok=True)
        with self._db.transaction() as connection:
            for item in ended:
                connection.execute("DELETE FROM attachments WHERE id = ?", (item.id,))
                fail(connection, "attach", item.id, Cancelled("detached", "It was detached."))
                finish(connection, "detach", item.id, {})
            for item, generation in made:
                connection.execute(
                    "UPDATE attachments SET generation = ?, "
                    "state = CASE state WHEN 'wanted' THEN 'ready' ELSE state END WHERE id = ?",
                    (generation, item.id),
                )
                finish(connection, "attach", item.id, {"attachment": item.id})
            settle_ready(connection)
            for item, error in failed:
                fail(connection, "attach", item.id, error)
                launch = self._db.row("SELECT 1 FROM launches WHERE instance = ?", item.instance)
                if launch is not None:
                    undo_launch(connection, self._db, item.instance, error)
                else:
                    intents.remove_attachment(connection, item)


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
        # a hole in an overlay's file would not be zeros, and FUSE makes none
        thin_provisioned=backing.name == RAW_DATA,
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
