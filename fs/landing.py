"""Landing: an image that is being fetched becomes servable, before all of it is here.

Where its entry endorses a chunk index, as soon as that has been checked and one origin has given a
chunk by it, or its stream has; without one, where the policy for its endorser allows it. See
cache/DEMAND.md.
"""

import logging
from contextlib import suppress
from typing import Protocol

import httpx
import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.endorsed_index import read_index
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotFound, NotVerified, OriginFailed, Refused
from stratocache.cache.growing import GrowingManifest
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.promises import judge
from stratocache.cache.provisional_policy import provisional_allowed
from stratocache.cache.stage import Stage
from stratocache.fs.operation_intents import add_operation
from stratocache.fs.records import Caller
from stratocache.fs.state import Database, record_event
from stratocache.fs.traffic_record import TrafficRecord

log = logging.getLogger(__name__)

_SELF = Caller("blockd", "admin")


class Interest(Protocol):
    """Who waits for an image."""

    @property
    def followed(self) -> bool:
        """Whether an operation waits for the complete image."""


class Landing:
    """Lands images. Belongs to one trio loop."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        images: ImageStore,
        client: httpx.AsyncClient,
        fetcher: ChunkFetcher,
        record: TrafficRecord,
    ) -> None:
        self._configuration = configuration
        self._settings = configuration.fetch
        self._db = db
        self._images = images
        self._client = client
        self._fetcher = fetcher
        self._record = record

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
        await trio.to_thread.run_sync(self.grow, entry)
        reason = await self._fetcher.start_stream(identifier)
        if reason is not None:
            log.warning("image %s is fetched whole: %s", identifier, reason)
            return False
        await trio.to_thread.run_sync(
            self._record_landing, entry, entry.size_bytes, 0, interest,
            "nothing of it is proven yet",
        )  # fmt: skip
        return True

    def grow(self, entry: Entry) -> None:
        """Let an image grow into its manifest, from where it was if it did before; blocks."""
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


def _stored_bytes(manifest: Manifest) -> int:
    return sum(
        manifest.chunk_bytes(index)
        for index in range(manifest.chunk_count)
        if not manifest.is_zero(index)
    )
