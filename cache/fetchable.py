"""Images of which single chunks can be fetched: what they are, where from, and what is not here yet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import trio

from stratocache.cache.chunk_origins import (
    CastrOrigin,
    ChunkOrigin,
    RangeOrigin,
    Wanted,
    store_url,
)
from stratocache.cache.entry import Entry
from stratocache.cache.flights import place_key
from stratocache.cache.growing import UNKNOWN_DIGEST, GrowingManifest
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.qcow2_origin import Qcow2Origin
from stratocache.cache.read_ahead import ReadAhead

EntryOf = Callable[[str], Entry | None]
"""Returns the entry of an image that may be read, None for another name; called in threads."""


@dataclass
class FetchableImage:
    """An image that chunks can be fetched of."""

    entry: Entry
    manifest: Manifest | GrowingManifest
    origins: list[ChunkOrigin]
    ahead: ReadAhead
    gone: bool = False
    reads: int = 0
    """Requests that are under way."""
    idle: trio.Event = field(default_factory=trio.Event)

    def key(self, index: int) -> bytes:
        """Return what a flight of a chunk goes by: its digest, or its place while that is unknown."""
        digest = self.manifest.digest(index)
        return digest if digest != UNKNOWN_DIGEST else place_key(self.entry.identifier, index)

    def wanted(self, index: int) -> Wanted:
        """Return a chunk as origins are asked for it."""
        return Wanted(index, self.manifest.digest(index), self.manifest.chunk_bytes(index))


class FetchableImages:
    """Knows the images that chunks are fetched of. Belongs to one trio loop; looks by `limiter`."""

    def __init__(
        self, images: ImageStore, entry_of: EntryOf, client: httpx.AsyncClient,
        timeout: httpx.Timeout, limiter: trio.CapacityLimiter,
    ) -> None:  # fmt: skip
        self._images = images
        self._entry_of = entry_of
        self._client = client
        self._timeout = timeout
        self._limiter = limiter
        self._known: dict[str, FetchableImage] = {}

    async def find(self, image_id: str) -> FetchableImage | None:
        """Return an image, None for one that may not be read; raises what reading its manifest does."""
        known = self._known.get(image_id)
        if known is None:
            known = await trio.to_thread.run_sync(self._load, image_id)
            if known is not None:
                known = self._known.setdefault(image_id, known)
        return known

    def drop(self, image_id: str) -> FetchableImage | None:
        """Know an image no more; return it."""
        return self._known.pop(image_id, None)

    def _load(self, image_id: str) -> FetchableImage | None:
        entry = self._entry_of(image_id)
        if entry is None:
            return None
        # shared with the image's readers: a manifest is large
        growing = self._images.growing(image_id)
        if growing is not None:
            # nothing proves a chunk that comes by itself
            return FetchableImage(entry, growing, [], ReadAhead(growing.chunk_count))
        manifest = self._images.reader(image_id).manifest
        origins = self._origins(entry, manifest.size_bytes)
        return FetchableImage(entry, manifest, origins, ReadAhead(manifest.chunk_count))

    def _origins(self, entry: Entry, size_bytes: int) -> list[ChunkOrigin]:
        """Return where single chunks of an image may be read; none when only the whole can be."""
        client, timeout = self._client, self._timeout
        found: list[ChunkOrigin] = []
        if entry.index is not None:
            found.append(CastrOrigin(store_url(entry.index.url), client, timeout))
        if entry.compression != "none":
            return found
        for location in entry.locations:
            if entry.format == "raw":
                found.append(RangeOrigin(location, size_bytes, client, timeout))
            elif not location.startswith("file:"):
                found.append(Qcow2Origin(location, entry.size_bytes, size_bytes, client, timeout))
        return found

    async def missing(self, image: FetchableImage, indexes: Sequence[int]) -> list[int]:
        """Return which of some chunks are not in the store."""

        def look() -> list[int]:
            chunks, manifest = self._images.chunks, image.manifest
            return [
                index
                for index in indexes
                if not manifest.is_zero(index) and manifest.digest(index) not in chunks
            ]

        return await trio.to_thread.run_sync(look, limiter=self._limiter)

    async def has(self, digest: bytes) -> bool:
        """Tell whether a chunk is in the store."""
        return await trio.to_thread.run_sync(
            self._images.chunks.__contains__, digest, limiter=self._limiter
        )
