"""iSCSI targets and attachments: each attachment has its target, each target its attachment.

What may be found otherwise and what is done about it: ATTACHMENTS.md.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Conflict, StratocacheError, Unreachable
from stratocache.fs import inventory, orphans, records
from stratocache.fs.attachment_outcomes import Outcomes
from stratocache.fs.attachment_secrets import AttachmentSecrets
from stratocache.fs.disk_presence import DiskPresence
from stratocache.fs.disks import DiskStore
from stratocache.fs.layers import RAW_DATA
from stratocache.fs.records import Attachment, Disk
from stratocache.fs.state import Database, record_event
from stratocache.fs.target import ActualTarget, Target, TargetDaemon, iqn_of, serial_of

log = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 30.0
_CHANGED = """
    SELECT attachments.* FROM attachments LEFT JOIN disks ON disks.uuid = disk_uuid
    WHERE attachments.state <> 'ready' OR attachments.generation <> disks.generation
    ORDER BY attachments.number
"""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A target that should be."""

    item: Attachment
    target: Target
    generation: int
    new_secret: bool
    """Whether a target that is there may have another secret."""


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What should be of some attachments, by their numbers."""

    targets: dict[int, _Wanted]
    missing: dict[int, str]
    """Those whose disk has lost its files, and what to say of it."""


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
        self._secrets = AttachmentSecrets(db, configuration.run_dir)
        self._presence = DiskPresence(db, disks)
        self._known: object = None
        """The daemon's incarnation whose targets are what the rows say, as far as they are at rest."""
        self._settled: object = None
        """The incarnation whose targets were so at any time."""
        self._shared: set[str] = set()
        """Attachments of which it has been said that several initiators use them."""
        self._looked_at = 0.0
        self._looked_for: object = None
        """The incarnation that was there when a look began."""

    async def release(self, disk_uuid: str) -> bool:
        """Let go of a disk's file: remove its targets, until `reconcile` makes them again.

        Return False when one of them stays for now.
        """
        released = True
        self._known = self._settled = None
        for item in inventory.attachments(self._db, disk_uuid=disk_uuid):
            released &= await self._remove_target(item.number) is None
        return released

    async def reconcile(self) -> bool:
        """Make targets agree with attachments; return False when that must be tried again."""
        incarnation = self._looked_for = self._targets.incarnation()
        known = (
            incarnation is not None
            and incarnation == self._known
            and trio.current_time() < self._looked_at + _LOOK_INTERVAL_S
        )
        self._known = None
        if known:
            items = [records.attachment_from(row) for row in self._db.rows(_CHANGED)]
            settled = not items or await self._settle(items, None)
        else:
            try:
                settled = await self._look(undisturbed=incarnation == self._settled)
            except Unreachable as error:
                log.info("targets wait: %s", error)
                return False
        if settled:
            self._known = self._settled = incarnation
        return settled

    async def _look(self, *, undisturbed: bool) -> bool:
        """Look at all that there is; return False when something must be tried again.

        When nothing has disturbed what was settled, whatever differs was done by others.
        """
        self._looked_at = trio.current_time()
        items = await trio.to_thread.run_sync(self._all)
        actual = await self._targets.list()
        settled = True
        for number in sorted(set(actual) - {item.number for item in items}):
            settled &= await self._remove_target(number) is None
            iqn = actual[number].iqn
            await trio.to_thread.run_sync(
                self._record, "target.removed", iqn, f"Target {iqn} belongs to no attachment."
            )
        await self._report_shared(items, actual)
        return await self._settle(items, actual, undisturbed=undisturbed) and settled

    async def _settle(
        self,
        items: list[Attachment],
        actual: dict[int, ActualTarget] | None,
        *,
        undisturbed: bool = False,
    ) -> bool:
        """Make the targets of some attachments agree; return False if that must be tried again.

        Without what there is, those that are ready have a target and those that are wanted none.
        """
        outcomes = Outcomes()
        known = actual is None
        there = actual or {}
        wishes = await trio.to_thread.run_sync(self._wishes, items, not known)
        settled = True
        for item in items:
            if item.state == "removing":
                error = None if not known and item.number not in there else await self._cut(item)
                if error is None:
                    outcomes.ended.append(item)
                else:
                    settled = False
                    _note(outcomes, item, error)
            elif item.number in wishes.missing:
                _note_missing(outcomes, item, wishes.missing[item.number])
            elif item.number not in wishes.targets and (
                item.state == "ready" if known else item.number in there
            ):
                settled &= await self._remove_target(item.number) is None
        settled &= await self._make_all(
            wishes.targets.values(), there, outcomes, known=known, undisturbed=undisturbed
        )
        if not known and not await self._open_portal():
            settled = False
            outcomes.made.clear()  # nobody can log in
        if outcomes:
            await trio.to_thread.run_sync(outcomes.record, self._db)
        for item in outcomes.ended:
            self._secrets.forget(item.id)
        return settled

    async def _open_portal(self) -> bool:
        """Let initiators in, now that there is something for all of them; return False if not."""
        if self._targets.incarnation() != self._looked_for:
            return False  # started anew meanwhile, so there is nothing
        try:
            await self._targets.open_portal()
        except StratocacheError as error:
            log.warning("nobody can log in: %s", error)
            return False
        return True

    async def _make_all(
        self,
        wishes: Iterable[_Wanted],
        actual: dict[int, ActualTarget],
        outcomes: Outcomes,
        *,
        known: bool,
        undisturbed: bool,
    ) -> bool:
        """Make targets agree, all at once: the daemon makes together those that come together."""
        settled = True

        async def make(wanted: _Wanted) -> None:
            nonlocal settled
            found = actual.get(wanted.item.number)
            settled &= await self._make(
                wanted, found, outcomes, known=known, undisturbed=undisturbed
            )

        async with trio.open_nursery() as nursery:
            for wanted in wishes:
                nursery.start_soon(make, wanted)
        return settled

    async def _make(
        self,
        wanted: _Wanted,
        found: ActualTarget | None,
        outcomes: Outcomes,
        *,
        known: bool,
        undisturbed: bool,
    ) -> bool:
        """Make one target agree, after those that were to go; return False to try it again."""
        item, generation = wanted.item, wanted.generation
        try:
            if item.generation != generation or wanted.new_secret or known:
                # it may match, and yet have the old file, the old size of it, or another secret
                if found is not None or (known and item.state == "ready"):
                    await self._targets.remove(item.number)
                await self._targets.create(wanted.target)
            elif found is None or not found.matches(wanted.target):
                await self._targets.create(wanted.target)
                if item.state == "ready" and (found is not None or undisturbed):
                    difference = "its target was missing"
                    if found is not None:
                        difference = f"its target was not right: {found.difference(wanted.target)}"
                    log.error("attachment %s: %s", item.id, difference)
                    outcomes.repaired.append((item, difference))
        except Unreachable as error:
            log.info("target of attachment %s waits: %s", item.id, error)
            return False
        except StratocacheError as error:
            log.error("target of attachment %s: %s", item.id, error)
            if item.state == "wanted":
                outcomes.failed.append((item, error))
            else:
                _note(outcomes, item, error)
            return False
        if item.state == "wanted" or item.generation != generation or item.problem is not None:
            outcomes.made.append((item, generation))
        return True

    async def _cut(self, item: Attachment) -> StratocacheError | None:
        """End an attachment: None when neither its target nor any session is left."""
        error = await self._remove_target(item.number)
        if error is not None or not item.fencing:
            return error
        try:
            left = await self._targets.sessions(item.number)
        except StratocacheError as refusal:
            return refusal
        if left:
            names = ", ".join(session.initiator for session in left)
            return Conflict("target-busy", f"Sessions of {names} are left.")
        return None

    async def _remove_target(self, number: int) -> StratocacheError | None:
        try:
            await self._targets.remove(number)
        except StratocacheError as error:
            log.warning("target %d stays for now: %s", number, error)
            return error
        return None

    async def _report_shared(
        self, items: list[Attachment], actual: dict[int, ActualTarget]
    ) -> None:
        """Say once of an attachment that writes that several initiators are logged in to it."""
        for item in items:
            found = actual.get(item.number)
            names = sorted(set(found.initiators)) if found else []
            if item.access == "rw" and len(names) > 1 and item.id not in self._shared:
                self._shared.add(item.id)
                await trio.to_thread.run_sync(
                    self._record, "attachment.shared", item.id,
                    f"Several initiators write to disk {item.disk_uuid}: {', '.join(names)}; name "
                    "the right one when attaching.",
                )  # fmt: skip
        self._shared &= {item.id for item in items}

    def _record(self, kind: str, subject: str, message: str) -> None:
        with self._db.transaction() as connection:
            record_event(connection, kind, subject, message)

    def _all(self) -> list[Attachment]:
        """Return every attachment; files and operations of those that do not exist go, and disks
        whose files are known to be missing are looked at again."""
        items = inventory.attachments(self._db)
        self._secrets.sweep({item.id for item in items})
        orphans.end_orphans(self._db)
        for row in self._db.rows("SELECT * FROM disks WHERE problem IS NOT NULL"):
            self._presence.look(records.disk_from(row))
        return items

    def _wishes(self, items: list[Attachment], look: bool) -> _Wishes:
        """Return what should be; secrets' files are written. `look` at what should not change."""
        targets, missing = {}, {}
        for item in items:
            if item.state == "removing":
                continue
            disk = inventory.find_disk(self._db, item.disk_uuid or "")
            if disk is not None and disk.state == "available" and (look or item.state == "wanted"):
                problem = self._presence.look(disk)
                if problem is not None:
                    missing[item.number] = problem
                    continue
            backing = self._backing(item, disk)
            if backing is not None:
                path, generation = backing
                secret, replaced = self._secrets.hand_out(item, again=look)
                target = _target(item, path, secret)
                targets[item.number] = _Wanted(item, target, generation, replaced)
        return _Wishes(targets, missing)

    def _backing(self, item: Attachment, disk: Disk | None) -> tuple[Path, int] | None:
        """Return the file that an attachment exports and its generation, None while there is none."""
        if item.image_id is not None:
            return self._configuration.blocks / "images" / item.image_id, 0
        assert disk is not None  # the attachment's row refers to it
        if disk.form == "overlay":
            return self._configuration.blocks / "disks" / disk.uuid, disk.generation
        # what a crash left may say otherwise than the row, which is then about to be corrected
        if disk.form == "raw" and self._disks.form(disk.uuid) == "raw":
            return self._disks.data_path(disk.uuid), disk.generation
        return None


def _note(outcomes: Outcomes, item: Attachment, error: StratocacheError) -> None:
    """Keep why an attachment is not what it should be, once."""
    if item.problem != error.message:
        outcomes.stuck.append((item, error.message))


def _note_missing(outcomes: Outcomes, item: Attachment, problem: str) -> None:
    if item.state == "wanted":
        outcomes.failed.append((item, Conflict("disk-missing", problem)))
    elif item.problem != problem:
        outcomes.stuck.append((item, problem))


def _target(item: Attachment, backing: Path, secret: str) -> Target:
    return Target(
        number=item.number,
        iqn=iqn_of(item.id),
        backing=backing,
        read_only=item.access == "ro",
        serial=serial_of(item.disk_uuid or item.image_id or ""),
        chap_username=item.chap_username,
        chap_secret=secret,
        initiator=item.initiator,
        # a hole in an overlay's file would not be zeros, and FUSE makes none
        thin_provisioned=backing.name == RAW_DATA,
    )
