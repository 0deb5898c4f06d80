"""Images that are served before they are complete: every chunk is proven, the whole is not yet.

An image whose entry endorses a chunk index *lands* as soon as that index has been checked and one
origin has given a chunk by it, or its stream has. From then on it can be cloned and attached; what a
guest reads comes on demand. One without an index lands too where the policy for its endorser allows
it; what has flowed past of it *grows* into its manifest. A task per provisional image brings the rest
and compares the whole with its entry: then it is verified, or rejected. cache/DEMAND.md has the states
and the order of the steps.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import httpx
import trio

from stratocache.cache.completion import Completion
from stratocache.cache.configuration import Configuration
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.endorsed_index import read_index
from stratocache.cache.entry import Entry
from stratocache.cache.errors import (
    Internal,
    NotFound,
    NotVerified,
    OriginFailed,
    Refused,
    StratocacheError,
)
from stratocache.cache.growing import GrowingManifest
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.promises import FetchedImage, judge
from stratocache.cache.provisional_policy import provisional_allowed
from stratocache.cache.stage import Stage
from stratocache.fs import inventory, records
from stratocache.fs.boot_sets import BootSets
from stratocache.fs.operation_intents import add_operation
from stratocache.fs.records import READABLE, Caller, Image
from stratocache.fs.state import Database, now, record_event
from stratocache.fs.traffic_record import TrafficRecord

log = logging.getLogger(__name__)

Report = Callable[[int, int | None], None]

RETRY_S = 30.0
"""After a completion that failed, while somebody uses the image."""
_SELF = Caller("blockd", "admin")


class Interest(Protocol):
    """Who waits for an image."""

    @property
    def followed(self) -> bool:
        """Whether an operation waits for the complete image."""


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
    """Lands images and completes them; tasks run in `nursery`. Belongs to one trio loop."""

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
        self._configuration = configuration
        self._settings = configuration.fetch
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

    # Landing.

    async def land(self, entry: Entry, interest: Interest) -> bool:
        """Make an image that is being fetched servable now; return False when it must come whole.

        When no operation waits for its completion one is added, to be seen and cancelled. Raises
        `NoSpace`, `OSError`, and for an image without an index what `judge` does.
        """
        identifier = entry.identifier
        if entry.index is None and entry.format != "raw":
            return False
        await self._fetcher.forget(identifier)  # another entry may have been tried before
        landed = False
        try:
            if entry.index is not None:
                landed = await self._land_proven(entry, interest)
            elif provisional_allowed(self._configuration, entry):
                landed = await self._land_growing(entry, interest)
        finally:
            if not landed:
                with trio.CancelScope(shield=True):
                    await self._fetcher.forget(identifier)
                    await trio.to_thread.run_sync(self._take_back, identifier)
        if landed:
            self.look()
            self._wake()
        return landed

    async def _land_proven(self, entry: Entry, interest: Interest) -> bool:
        """Land an image whose every chunk its index proves."""
        identifier = entry.identifier
        try:
            manifest = await read_index(entry, self._client, self._settings, self._fetcher.peers)
        except (NotVerified, NotFound, Refused, OriginFailed) as error:
            await trio.to_thread.run_sync(self._note_unusable, identifier, error.message)
            return False
        await trio.to_thread.run_sync(self._images.publish, identifier, manifest)
        missing = await self._fetcher.missing(identifier)
        if missing and not await self._fetcher.bring(identifier, missing[:1]):
            reason: str | None = "no origin gives single chunks"
            if await self._fetcher.is_streamed(identifier):
                reason = await self._fetcher.start_stream(identifier)
            if reason is not None:
                await trio.to_thread.run_sync(self._note_unusable, identifier, reason)
                return False
        missing_bytes = sum(map(manifest.chunk_bytes, missing))
        dedup_bytes = max(0, _stored_bytes(manifest) - missing_bytes)
        await trio.to_thread.run_sync(
            self._record_landing, entry, manifest.size_bytes, dedup_bytes, interest,
            "each chunk is verified",
        )  # fmt: skip
        return True

    async def _land_growing(self, entry: Entry, interest: Interest) -> bool:
        """Land an image of which nothing is proven before all of it is here."""
        identifier = entry.identifier
        judge(entry, self._settings.max_image_bytes)
        await trio.to_thread.run_sync(self._grow, entry)
        reason = await self._fetcher.start_stream(identifier)
        if reason is not None:
            log.warning("image %s is fetched whole: %s", identifier, reason)
            return False
        await trio.to_thread.run_sync(
            self._record_landing, entry, entry.size_bytes, 0, interest,
            "nothing of it is proven yet",
        )  # fmt: skip
        return True

    def _grow(self, entry: Entry) -> None:
        record = Stage(self._configuration.state_dir / "stage" / entry.identifier).digests
        self._images.grow(entry.identifier, GrowingManifest(entry.size_bytes, record))

    def _take_back(self, identifier: str) -> None:
        """Remove what an image had that does not land now; what was downloaded stays."""
        with suppress(NotFound):
            self._images.remove(identifier)
        Stage(self._configuration.state_dir / "stage" / identifier).digests.unlink(missing_ok=True)

    def _note_unusable(self, identifier: str, reason: str) -> None:
        log.warning("image %s is fetched whole: %s", identifier, reason)
        with self._db.transaction() as connection:
            record_event(
                connection, "image.index-unusable", identifier,
                f"Image {identifier} is fetched whole before it is served: {reason}",
            )  # fmt: skip

    def _record_landing(
        self, entry: Entry, size_bytes: int, dedup_bytes: int, interest: Interest, proof: str
    ) -> None:
        identifier = entry.identifier
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE images SET state = 'provisional', size_bytes = ? "
                "WHERE id = ? AND state = 'fetching'",
                (size_bytes, identifier),
            )
            self._record.begin(connection, identifier, dedup_bytes)
            if not interest.followed:
                reference = f"{entry.catalogue}:{identifier}"
                add_operation(
                    connection, _SELF, "fetch", reference, {"reference": reference, "pin": False}
                )
            record_event(
                connection, "image.provisional", identifier,
                f"Image {identifier} is served; {proof}, the rest of it follows.",
            )  # fmt: skip

    # Completion.

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

    # Rejection.

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
                self._grow(image.entry)
        for row in self._db.rows("SELECT id FROM images WHERE state = 'rejected'"):
            try:
                self._images.quarantine(row["id"])
            except (NotFound, NotVerified) as error:
                log.warning("chunks of rejected image %s stay: %s", row["id"], error)


def entry_finder(db: Database) -> Callable[[str], Entry | None]:
    """Return the `ChunkFetcher`'s way to entries: of images whose chunks may be fetched."""

    def find(image_id: str) -> Entry | None:
        image = inventory.find_image(db, image_id)
        servable = image is not None and image.state in ("fetching", *READABLE)
        return image.entry if image is not None and servable else None

    return find


def awaited_finder(db: Database) -> Callable[[str], Sequence[str]]:
    """Return the `Supply`'s way to images whose chunks a manifest may wait for.

    An image waits for its own, as long as it is provisional; a snapshot for those of any image.
    """

    def find(name: str) -> Sequence[str]:
        image = inventory.find_image(db, name)
        if image is None:
            rows = db.rows("SELECT id FROM images WHERE state = 'provisional'")
            return [row["id"] for row in rows]
        if image.state == "rejected":
            raise rejected(image)
        return [name] if image.state == "provisional" else []

    return find


def rejected(image: Image) -> NotVerified:
    """Return the error for whoever wants to use a rejected image."""
    return NotVerified(
        "image-rejected",
        f"Image {image.id} is not what its endorser promised; delete it to fetch it again.",
    )


def _fenced(disks: Sequence[str]) -> str:
    if not disks:
        return ""
    return f" Disks of it are fenced: {', '.join(disks)}."


def _stored_bytes(manifest: Manifest) -> int:
    return sum(
        manifest.chunk_bytes(index)
        for index in range(manifest.chunk_count)
        if not manifest.is_zero(index)
    )
