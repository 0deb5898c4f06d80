"""Opening chunks: each is verified once however many wait for it, and what is missing is asked for."""

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from stratocache.cache.chunks import ChunkDescriptor, ChunkStore
from stratocache.cache.errors import NotVerified, StratocacheError, Unreachable

OPENINGS_MAX = 3
"""How often a chunk is mended for one read before the read fails."""


class Supplier(Protocol):
    """Brings what a manifest names and is not in the store, and manifests that are damaged or gone;
    belongs to the trio loop."""

    async def supply(self, name: str, index: int, digest: bytes) -> None:
        """Return when chunk `index` of the manifest `name` is in the store, else raise why not."""

    async def supply_manifest(self, name: str) -> None:
        """Return when the manifest `name` can be read again, else raise why not."""

    def waited(self, name: str, wait_s: float) -> None:
        """Take note that the running task waited for a chunk of the manifest `name`."""


class _Opening:
    """One chunk that is being opened."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.remote = False
        self.error: Exception | None = None
        """Why it could not be fetched: for all who wait, as trying again would take as long."""


class OpeningGate:
    """Opens and verifies chunks in threads, each once however many tasks wait for it.

    What is missing, or was moved to quarantine, is asked of the `supplier`, if there is one; `token`
    is of the supplier's loop.
    """

    def __init__(self, chunks: ChunkStore) -> None:
        self.supplier: Supplier | None = None
        self._chunks = chunks
        self._opening: dict[bytes, _Opening] = {}
        self.token: trio.lowlevel.TrioToken | None = None
        self.coming: trio.Event | None = None
        """Set when the supplier that is expected is there; None = none is expected."""

    async def open(
        self, digest: bytes, name: str, index: int, fetched: set[int] | None = None
    ) -> ChunkDescriptor:
        """Return the descriptor of a chunk: chunk `index` of the manifest `name`, which is added to
        `fetched` when it had to be.

        Raises what `ChunkStore.open` and the supplier do.
        """
        while True:
            descriptor = self._chunks.opened(digest)
            if descriptor is not None:
                return descriptor
            opening = self._opening.get(digest)
            mine = opening is None
            if opening is None:
                opening = self._opening[digest] = _Opening()
            started = trio.current_time()
            try:
                if mine:
                    return await self._open(opening, digest, name, index)
                await opening.ended.wait()
                if opening.error is not None:
                    raise opening.error
            finally:
                if mine:
                    del self._opening[digest]
                    opening.ended.set()
                if opening.remote and fetched is not None:
                    fetched.add(index)
                if opening.remote and self.supplier is not None:
                    self.supplier.waited(name, trio.current_time() - started)

    async def _open(
        self, opening: _Opening, digest: bytes, name: str, index: int
    ) -> ChunkDescriptor:
        try:
            for _ in range(OPENINGS_MAX):
                try:
                    return await trio.to_thread.run_sync(self._chunks.open, digest)
                except NotVerified:
                    if not self.supplies:
                        raise
                opening.remote = True
                await (await self._expected()).supply(name, index, digest)
            return await trio.to_thread.run_sync(self._chunks.open, digest)
        except (StratocacheError, OSError) as error:
            # a verdict may be about this manifest alone, and costs no time
            if opening.remote and not isinstance(error, NotVerified):
                opening.error = error
            raise

    @property
    def supplies(self) -> bool:
        """Whether there is a supplier, or one is expected."""
        return self.supplier is not None or self.coming is not None

    async def _expected(self) -> Supplier:
        if self.coming is not None:
            await self.coming.wait()
        assert self.supplier is not None
        return self.supplier

    async def supply(self, digest: bytes, name: str, index: int) -> None:
        """Let the supplier bring a chunk, as soon as it is there, and count what that takes."""
        started = trio.current_time()
        supplier = await self._expected()
        try:
            await supplier.supply(name, index, digest)
        finally:
            supplier.waited(name, trio.current_time() - started)

    async def supply_manifest(self, name: str) -> None:
        """Let the supplier bring a manifest, as soon as it is there."""
        await (await self._expected()).supply_manifest(name)

    def open_blocking(self, digest: bytes, name: str, index: int) -> ChunkDescriptor:
        """Do what `open` does, from a thread that is not the loop's."""
        for _ in range(OPENINGS_MAX):
            try:
                return self._chunks.open(digest)
            except NotVerified:
                if not self.supplies:
                    raise
            self.wait_for(self.open, digest, name, index)
        return self._chunks.open(digest)

    def wait_for(self, mend: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Let the supplier's loop do something, and wait for it; raises what that raises."""
        try:
            trio.from_thread.run(_beside, mend, *arguments, trio_token=self.token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise Unreachable("stopping", "The daemon is stopping; try again.") from None


async def _beside(mend: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """Mend on behalf of a thread that waits, which must not keep others from having a thread."""
    limiter = trio.to_thread.current_default_thread_limiter()
    limiter.total_tokens += 1
    try:
        await mend(*arguments)
    finally:
        limiter.total_tokens -= 1
