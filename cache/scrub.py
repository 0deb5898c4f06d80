"""The scrubber's walk: every chunk is hashed as the medium has it, every manifest read, once a pass.

Chunks go in the order of their digests, then manifests in the order of their names, so that a
position says what has been done. The thread that reads is of the lowest priority, for the processor
and for the medium, and of no use to anybody else: guests' reads never wait for it.
"""

import ctypes
import logging
import os
import platform
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotFound, NotVerified, StratocacheError
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.repair import Repairer

log = logging.getLogger(__name__)

_NICEST = 19
_IOPRIO_WHO_PROCESS, _IOPRIO_IDLE = 1, 3 << 13  # ioprio_set(2)
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_BURST_S = 0.25
"""How far the walk may be ahead of its rate."""
_STAT_BATCH = 256

_T = TypeVar("_T")


@dataclass
class Tally:
    """What one pass has found so far."""

    position: str = ""
    chunks: int = 0
    chunk_bytes: int = 0
    manifests: int = 0
    damaged: int = 0
    repaired: int = 0


class Scrub:
    """Walks one image store; `note` is called after each step, and may wait or stop the walk.

    `published` returns the names of the manifests that must have a file, `incomplete` those of
    images whose chunks may be missing; both run in a thread.
    """

    def __init__(
        self,
        images: ImageStore,
        repairer: Repairer,
        *,
        bytes_per_s: int,
        published: Callable[[], set[str]],
        incomplete: Callable[[], set[str]],
        note: Callable[[Tally], Awaitable[None]],
    ) -> None:
        self._images = images
        self._repairer = repairer
        self._published = published
        self._incomplete = incomplete
        self._note = note
        self._pace = _Pace(bytes_per_s)
        self._reader = ThreadPoolExecutor(1, "scrub", initializer=_give_way)
        self._limiter = trio.CapacityLimiter(1)

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(wait=True)

    async def walk(self, tally: Tally) -> None:
        """Go on where a tally stands, to the end."""
        for first_byte in range(256):
            if tally.position > f"chunk {first_byte:02x}g":  # behind all of this byte
                continue
            for digest in await self._read(partial(self._digests, first_byte)):
                if f"chunk {digest.hex()}" > tally.position:
                    await self._look_at_chunk(digest, tally)
        for name in await self._read(self._names):
            if f"manifest {name}" > tally.position:
                await self._look_at_manifest(name, tally)

    def _names(self) -> list[str]:
        return sorted({*self._images.identifiers(), *self._published()})

    def _digests(self, first_byte: int) -> list[bytes]:
        return sorted(self._images.chunks.digests(first_byte))

    async def _look_at_chunk(self, digest: bytes, tally: Tally) -> None:
        await self._pace.wait(CHUNK_BYTES)
        try:
            tally.chunk_bytes += await self._read(partial(self._images.chunks.inspect, digest))
        except NotVerified as error:
            # one that went while we came to it is not missed: no manifest names it
            uses = await self._read(partial(self._images.uses, digest))
            if uses or error.code == "chunk-corrupt":
                tally.damaged += 1
            if uses:
                name, index = uses[0]
                tally.repaired += await self._repair(
                    partial(self._repairer.supply, name, index, digest)
                )
        tally.chunks += 1
        tally.position = f"chunk {digest.hex()}"
        await self._note(tally)

    async def _look_at_manifest(self, name: str, tally: Tally) -> None:
        try:
            manifest = await self._read(partial(self._images.manifest, name))
            await self._read(partial(self._images.seal, name))
            await self._look_for_missing(name, manifest, tally)
        except (NotFound, NotVerified) as error:
            # one may have gone while we came to it
            if isinstance(error, NotVerified) or name in await self._read(self._published):
                tally.damaged += 1
                tally.repaired += await self._repair(partial(self._repairer.supply_manifest, name))
        tally.manifests += 1
        tally.position = f"manifest {name}"
        await self._note(tally)

    async def _look_for_missing(self, name: str, manifest: Manifest, tally: Tally) -> None:
        """Find chunks of a manifest that have no file: the walk over the files cannot."""
        for start in range(0, manifest.chunk_count, _STAT_BATCH):
            indexes = range(start, min(start + _STAT_BATCH, manifest.chunk_count))
            for index in await self._read(partial(self._missing, name, manifest, indexes)):
                tally.damaged += 1
                digest = manifest.digest(index)
                tally.repaired += await self._repair(
                    partial(self._repairer.supply, name, index, digest)
                )

    def _missing(self, name: str, manifest: Manifest, indexes: range) -> list[int]:
        missing = [
            index
            for index in indexes
            if not manifest.is_zero(index) and manifest.digest(index) not in self._images.chunks
        ]
        incomplete = self._incomplete() if missing else set()
        if name in incomplete:
            return []
        # a snapshot has chunks of images that may still be on their way
        awaited: set[bytes] = set()
        for other in incomplete:
            with suppress(NotFound, NotVerified):
                awaited.update(self._images.manifest(other).stored())
        return [index for index in missing if manifest.digest(index) not in awaited]

    async def _repair(self, repair: Callable[[], Awaitable[None]]) -> bool:
        with suppress(StratocacheError):
            await repair()
            return True
        return False  # the witness has told of it

    async def _read(self, call: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(
            lambda: self._reader.submit(call).result(), limiter=self._limiter
        )


class _Pace:
    """Keeps a rate, without making up for time that was lost."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._due_s = 0.0

    async def wait(self, size_bytes: int) -> None:
        now_s = trio.current_time()
        self._due_s = max(self._due_s, now_s - _BURST_S) + size_bytes / self._bytes_per_s
        await trio.sleep(max(0.0, self._due_s - now_s))


def _give_way() -> None:
    """Give the calling thread the lowest priority there is."""
    thread_id = ctypes.CDLL(None).gettid()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread_id, _NICEST)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, thread_id, _IOPRIO_IDLE)
