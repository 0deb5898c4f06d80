"""Images that are served before they are complete: every chunk is proven, the whole is not yet.

Once an image has landed (`stratocache.fs.landing`) it can be cloned and attached; what a guest reads
comes on demand. A task per provisional image brings the rest and compares the whole with its entry:
then it is verified, or rejected. cache/DEMAND.md has the states and the order of the steps.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import trio

from stratocache.cache.completion import Completion
from stratocache.cache.configuration import Configuration
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.entry import Entry
from stratocache.cache.errors import Internal, NotFound, NotVerified, StratocacheError
from stratocache.cache.images import ImageStore
from stratocache.cache.promises import FetchedImage
from stratocache.fs import inventory, records
from stratocache.fs.boot_sets import BootSets
from stratocache.fs.landing import Interest, Landing
from stratocache.fs.records import Image
from stratocache.fs.state import Database, now, record_event
from stratocache.fs.traffic_record import TrafficRecord

log = logging.getLogger(__name__)

Report = Callable[[int, int | None], None]

RETRY_S = 30.0
"""After a completion that failed, while somebody uses the image."""


@dataclass
class _Attempt:
    """One run through all that is missing."""

    ended: trio.Event = field(default_factory=trio.Event)
    error: StratocacheError | None = None


@dataclass
class _Task:
    """The completion of one image."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    attempt: _Attempt = field(default_factory=_Attempt)
    stopped: trio.Event = field(default_factory=trio.Event)
    done_bytes: int = 0
    total_bytes: int | None = None
    reports: list[Report] = field(default_factory=list)


class ProvisionalImages:
    """Completes images that have landed; tasks run in `nursery`. Belongs to one trio loop."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        images: ImageStore,
        client: httpx.AsyncClient,
        fetcher: ChunkFetcher,
        boot_sets: BootSets,
        record: TrafficRecord,
        nursery: trio.Nursery,
        wake: Callable[[], None],
    ) -> None:
        self._landing = Landing(configuration, db, images, client, fetcher, record)
        self._db = db
        self._images = images
        self._client = client
        self._fetcher = fetcher
        self._completion = Completion(fetcher, images, attempts=configuration.fetch.attempts)
        self.boot_sets = boot_sets
        self._record = record
        self._nursery = nursery
        self._wake = wake
        self._tasks: dict[str, _Task] = {}

    async def land(self, entry: Entry, interest: Interest) -> bool:
        """Land an image, as `Landing.land` does, and begin to complete it."""
        landed = await self._landing.land(entry, interest)
        if landed:
            self.look()
            self._wake()
        return landed

    def look(self) -> None:
        """Start the completion of every provisional image that has none, unless it sleeps."""
        for row in self._db.rows("SELECT * FROM images WHERE state = 'provisional'"):
            image = records.image_from(row)
            if image.id not in self._tasks and not image.asleep:
                self._tasks[image.id] = _Task()
                self._nursery.start_soon(self._run, image, self._tasks[image.id])

    def note_launch(self, image: Image) -> None:
        """Learn what the first boot of an image reads from now on, and let it read undisturbed."""
        self.boot_sets.learn(image.id)
        if image.state == "provisional":
            self._fetcher.expect_reads()

    async def wait(self, image_id: str, report: Report) -> None:
        """Return when the completion of a provisional image, or one attempt at it, has ended.

        Raises why the attempt failed. The completion goes on when the caller is cancelled.
        """
        await trio.to_thread.run_sync(self._awake, image_id)
        self.look()
        task = self._tasks.get(image_id)
        if task is None:
            return
        attempt = task.attempt
        task.reports.append(report)
        report(task.done_bytes, task.total_bytes)
        try:
            await attempt.ended.wait()
        finally:
            task.reports.remove(report)
        if attempt.error is not None:
            raise attempt.error

    def _awake(self, image_id: str) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE images SET last_used_at = ? WHERE id = ? AND skeleton_since IS NOT NULL",
                (now(), image_id),
            )

    async def stop(self, image_id: str) -> None:
        """End the completion of an image that is about to be deleted."""
        task = self._tasks.get(image_id)
        if task is not None:
            task.scope.cancel()
            await task.stopped.wait()
        await self._fetcher.forget(image_id)
        await self._fetcher.discard(image_id)
        await self.boot_sets.stop_learning(image_id)
        await trio.to_thread.run_sync(self.boot_sets.forget, image_id)

    async def _run(self, image: Image, task: _Task) -> None:
        try:
            with task.scope:
                while True:
                    if await self._attempt(image, task):
                        break
                    await trio.sleep(RETRY_S)
                    found = inventory.find_image(self._db, image.id)
                    if found is None or found.asleep:
                        break
        finally:
            del self._tasks[image.id]
            task.attempt.ended.set()
            task.stopped.set()
            self._wake()

    async def _attempt(self, image: Image, task: _Task) -> bool:
        """Try to complete an image; return False when that must be tried again."""
        attempt = task.attempt

        def progress(done_bytes: int, total_bytes: int | None) -> None:
            task.done_bytes, task.total_bytes = done_bytes, total_bytes
            self._record.progress(image.id, done_bytes, total_bytes)
            for report in task.reports:
                report(done_bytes, total_bytes)

        try:
            await self.boot_sets.fetch(image.entry, self._client)
            boot_set = await trio.to_thread.run_sync(self.boot_sets.load, image.id)
            found = await self._completion.complete(image.entry, boot_set, progress)
            await trio.to_thread.run_sync(self._record_verified, found)
            await self._fetcher.discard(image.id)
        except StratocacheError as error:
            attempt.error = error
        except Exception as error:
            log.exception("completing image %s failed", image.id)
            attempt.error = Internal("internal", f"Completing {image.id} failed: {error!r}.")
        if attempt.error is not None and attempt.error.code == "image-rejected":
            await self._reject(image, attempt.error)
        elif attempt.error is not None:
            log.warning("image %s is not complete yet: %s", image.id, attempt.error)
            task.attempt = _Attempt()
            attempt.ended.set()
            self._wake()
            return False
        return True

    def _record_verified(self, found: FetchedImage) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE images SET state = 'verified', sha256 = ?, verified_at = ?, "
                "skeleton_since = NULL "
                "WHERE id = ? AND state = 'provisional'",
                (found.sha256, now(), found.identifier),
            )
            record_event(
                connection, "image.verified", found.identifier,
                f"Image {found.identifier} is complete, its digests are proven.",
            )  # fmt: skip

    async def _reject(self, image: Image, error: StratocacheError) -> None:
        await self._fetcher.forget(image.id)
        with trio.CancelScope(shield=True):
            await self._fetcher.discard(image.id)
            await trio.to_thread.run_sync(self._record_rejected, image, error)
            await trio.to_thread.run_sync(self._images.quarantine, image.id)

    def _record_rejected(self, image: Image, error: StratocacheError) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE images SET state = 'rejected' WHERE id = ? AND state = 'provisional'",
                (image.id,),
            )
            disks = inventory.disks_of_image(self._db, image.id)
            record_event(connection, "image.rejected", image.id, error.message + _fenced(disks))
            for uuid in disks:
                record_event(
                    connection, "disk.fenced", uuid,
                    f"Disk {uuid} cannot be attached: its image {image.id} was rejected.",
                )  # fmt: skip

    def sweep(self) -> None:
        """At start, take up images that grow, and end what a crash left half done of a rejection.
        Blocks."""
        for row in self._db.rows("SELECT * FROM images WHERE state = 'provisional'"):
            image = records.image_from(row)
            there = self._images.manifest_path(image.id).exists()
            if image.unproven and not there and self._images.growing(image.id) is None:
                self._landing.grow(image.entry)
        for row in self._db.rows("SELECT id FROM images WHERE state = 'rejected'"):
            try:
                self._images.quarantine(row["id"])
            except (NotFound, NotVerified) as error:
                log.warning("chunks of rejected image %s stay: %s", row["id"], error)


def _fenced(disks: Sequence[str]) -> str:
    if not disks:
        return ""
    return f" Disks of it are fenced: {', '.join(disks)}."
