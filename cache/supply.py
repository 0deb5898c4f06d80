"""What readers are given when a chunk is not in the store: one that has not come yet is fetched, one
that was here before is repaired, which people are told of."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import trio

from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.errors import NotFound, NotVerified
from stratocache.cache.growing import UNKNOWN_DIGEST
from stratocache.cache.images import ImageStore
from stratocache.cache.repair import Repairer

Awaited = Callable[[str], Sequence[str]]
"""Returns the images whose chunks are still on their way and that a manifest may rest on; raises
`NotVerified` for a manifest that nobody may read. Called in threads."""


class Supply:
    """Supplies the readers of one image store; see `stratocache.cache.chunk_gate.Supplier`.

    What needs a repair waits until there is a repairer. Belongs to one trio loop.
    """

    def __init__(self, images: ImageStore, fetcher: ChunkFetcher, awaited: Awaited) -> None:
        self._images = images
        self._fetcher = fetcher
        self._awaited = awaited
        self._repairer: Repairer | None = None
        self._repairs = trio.Event()
        # Apart from trio's own: whoever waits for a chunk may hold one of those threads.
        self._limiter = trio.CapacityLimiter(2)

    def begin_repairs(self, repairer: Repairer) -> None:
        """Repair from now on, also for those who wait."""
        self._repairer = repairer
        self._repairs.set()

    async def supply(self, name: str, index: int, digest: bytes) -> None:
        """Return when a chunk is in the store; raises what `ChunkFetcher.fetch` or the repair does,
        and `NotVerified` for a manifest that nobody may read."""
        place = await trio.to_thread.run_sync(
            self._find, name, index, digest, limiter=self._limiter
        )
        if place is not None:
            await self._fetcher.fetch(*place)
        else:
            await (await self._begun()).supply(name, index, digest)

    async def supply_manifest(self, name: str) -> None:
        """Return when a manifest can be read again; raises what the repair does."""
        repairer = await self._begun()
        if self._images.growing(name) is None:  # else a process that died was reading it
            await repairer.supply_manifest(name)

    def waited(self, name: str, wait_s: float) -> None:
        """Count what the running task waited for a chunk."""
        self._fetcher.waited(name, wait_s)

    async def _begun(self) -> Repairer:
        await self._repairs.wait()
        assert self._repairer is not None
        return self._repairer

    def _find(self, name: str, index: int, digest: bytes) -> tuple[str, int] | None:
        """Return where a chunk is that has not come yet: an image, and the index there."""
        awaited = self._awaited(name)
        if digest == UNKNOWN_DIGEST:
            if name not in awaited:
                raise NotVerified("chunk-missing", f"Image {name} does not come any more.")
            return name, index
        for image_id in awaited:
            with suppress(NotFound, NotVerified):
                place = self._images.reader(image_id).manifest.index_of(digest)
                if place is not None:
                    return image_id, place
        return None
