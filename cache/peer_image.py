"""A whole image from peers: one gives the manifest, all give chunks; the entry's digests prove it.

Nothing says beforehand that the manifest is right. Each chunk has the digest that it names, and the
whole must have those that were signed; if it has not, who gave the manifest is at fault.
"""

import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from stratocache.cache.chunk_origins import Moved, Unavailable, Wanted
from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotVerified, OriginFailed, StratocacheError
from stratocache.cache.manifest import Manifest, index_bytes
from stratocache.cache.origin import Backoff
from stratocache.cache.peers import Offer, Peers

_AHEAD = 8
"""Chunks on their way while others are hashed: 4 MiB."""


async def offered_manifest(
    peers: Peers, entry: Entry, there: Manifest | None
) -> Offer[Manifest] | None:
    """Return a peer's manifest of a raw image, checked as far as that goes without the image."""

    def check(content: bytes) -> Manifest:
        manifest = Manifest.parse(content, "it", image_bytes_max=entry.size_bytes)
        if manifest.size_bytes != entry.size_bytes or there not in (None, manifest):
            raise NotVerified("manifest-invalid", "it is the manifest of another image.")
        return manifest

    return await peers.manifest(entry.identifier, index_bytes(entry.size_bytes), check)


@dataclass
class _Place:
    """One chunk, in its turn."""

    come: trio.Event = field(default_factory=trio.Event)
    data: bytes = b""
    error: Exception | None = None


class PeerImage:
    """The bytes that a manifest describes, from here and from peers, in order."""

    def __init__(
        self, peers: Peers, store: ChunkStore, entry: Entry, manifest: Manifest, attempts: int,
        moved: Moved,
    ) -> None:  # fmt: skip
        self._peers = peers
        self._store = store
        self._identifier = entry.identifier
        self._manifest = manifest
        self._attempts = attempts
        self._moved = moved
        self._backoff = Backoff()
        self._places: dict[int, _Place] = {}
        self._limiter = trio.CapacityLimiter(_AHEAD)

    @asynccontextmanager
    async def chunks(self) -> AsyncIterator[Iterator[bytes]]:
        """Yield an iterator over all chunks, for one thread at a time of the running loop's.

        It raises `OriginFailed` (`peers-lack`) when no peer gives a chunk.
        """
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            try:
                yield self._iterate(nursery)
            except Exception as error:  # noqa: BLE001 -- raised below, outside the nursery
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def _iterate(self, nursery: trio.Nursery) -> Iterator[bytes]:
        for index in range(self._manifest.chunk_count):
            yield trio.from_thread.run(self._take, nursery, index)

    async def _take(self, nursery: trio.Nursery, index: int) -> bytes:
        """Return one chunk, and let the next ones be on their way."""
        for coming in range(index, min(index + _AHEAD, self._manifest.chunk_count)):
            if coming not in self._places:
                self._places[coming] = _Place()
                nursery.start_soon(self._bring, coming, self._places[coming])
        place = self._places[index]
        await place.come.wait()
        del self._places[index]
        if place.error is not None:
            raise place.error
        return place.data

    async def _bring(self, index: int, place: _Place) -> None:
        try:
            place.data = await self._obtain(index)
        except (StratocacheError, OSError) as error:
            place.error = error
        place.come.set()

    async def _obtain(self, index: int) -> bytes:
        manifest = self._manifest
        wanted = Wanted(index, manifest.digest(index), manifest.chunk_bytes(index))
        if manifest.is_zero(index):
            return bytes(wanted.size_bytes)
        data = await trio.to_thread.run_sync(self._local, wanted, limiter=self._limiter)
        for attempt in range(self._attempts):
            if data is not None:
                return data
            if attempt:
                await trio.sleep(self._backoff.pause_s(attempt, 0))
            data = await self._ask(wanted)
        if data is not None:
            return data
        raise OriginFailed(
            "peers-lack", f"No peer gives chunk {wanted.digest.hex()} of {self._identifier}."
        )

    def _local(self, wanted: Wanted) -> bytes | None:
        """Return a chunk that the store has already, whole."""
        try:
            return os.pread(self._store.open(wanted.digest), CHUNK_BYTES, 0)
        except NotVerified:
            return None

    async def _ask(self, wanted: Wanted) -> bytes | None:
        found: list[bytes] = []

        async def deliver(item: Wanted, data: bytes) -> None:
            digest = await trio.to_thread.run_sync(_sha256, data, limiter=self._limiter)
            if digest != item.digest:
                raise Unavailable(f"it serves a wrong chunk {item.index}", "wrong")
            found.append(data)

        places = (self._identifier, wanted.digest)
        for origin in [*self._peers.origins(*places), *self._peers.last_resort(*places)]:
            try:
                await origin.read([wanted], deliver, self._moved)
            except Unavailable as error:
                self._peers.note(origin.location, error)
            else:
                self._peers.health.succeeded(origin.location)
                return found[0]
        return None


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
