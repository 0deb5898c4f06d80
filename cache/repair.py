"""Self-repair: a chunk or manifest that is damaged or gone is brought back while its reader waits.

One repair per chunk however many wait for it; it goes on when they no longer do. A chunk may be one
of several images: each one's origin is asked, that of the image being read first. KEEPING.md tells
the order of things and what is promised.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import trio

from stratocache.cache.errors import (
    Internal,
    NotFound,
    NotVerified,
    OriginFailed,
    StratocacheError,
)
from stratocache.cache.images import ImageStore
from stratocache.cache.restoration import Origins

log = logging.getLogger(__name__)

_T = TypeVar("_T")

WAIT_S = 20.0
"""How long a reader waits: less than the 30 s after which Linux initiators give up a command."""
RETRY_S = 30.0
"""How long a chunk that no origin had is not asked for again."""
_KEPT_FAILURES_MAX = 4096
_RESTORES_MAX = 3


class Witness(Protocol):
    """Who is told of repairs; called in threads."""

    def chunk_repaired(self, digest: bytes, identifier: str) -> None:
        """A chunk is whole again, from an image's origin."""

    def chunk_lost(self, digest: bytes, identifiers: Sequence[str], reason: str) -> None:
        """No origin has a chunk of these images."""

    def manifest_repaired(self, identifier: str) -> None:
        """A manifest is whole again."""

    def manifest_lost(self, identifier: str, reason: str) -> None:
        """A manifest cannot be made again."""


@dataclass
class _Repair:
    """One repair under way; whoever needs it waits for its end."""

    ended: trio.Event = field(default_factory=trio.Event)
    error: StratocacheError | None = None


class Repairer:
    """Repairs chunks and manifests of one image store; repairs run in `nursery`.

    Readers come to it through `stratocache.cache.supply`. Its methods belong to the nursery's loop.
    """

    def __init__(
        self, images: ImageStore, origins: Origins, witness: Witness, nursery: trio.Nursery,
        *, wait_s: float = WAIT_S, retry_s: float = RETRY_S,
    ) -> None:  # fmt: skip
        self._images = images
        self._origins = origins
        self._witness = witness
        self._nursery = nursery
        self._wait_s = wait_s
        self._retry_s = retry_s
        self._repairs: dict[Hashable, _Repair] = {}
        self._failures: dict[Hashable, tuple[float, StratocacheError]] = {}
        # Apart from trio's own: whoever waits for a repair may hold one of those threads.
        self._limiter = trio.CapacityLimiter(2)

    async def supply(self, name: str, index: int, digest: bytes) -> None:
        """Return when a chunk can be opened again.

        Raises `NotVerified` (`chunk-lost`) when no origin has it, `OriginFailed` (`repair-late`)
        when that takes longer than a reader waits.
        """
        await self._wait(digest, lambda: self._mend_chunk(digest, name, index))

    async def supply_manifest(self, name: str) -> None:
        """Return when a manifest can be read again.

        Raises `NotVerified` (`manifest-lost`) and `OriginFailed` (`repair-late`).
        """
        await self._wait(name, lambda: self._mend_manifest(name))

    def forgive(self) -> None:
        """Ask again for what could not be had lately."""
        self._failures.clear()

    async def _wait(self, key: Hashable, mend: Callable[[], Awaitable[None]]) -> None:
        repair = self._repairs.get(key)
        if repair is None:
            at, error = self._failures.get(key, (0.0, None))
            if error is not None and time.monotonic() < at + self._retry_s:
                raise _again(error)
            repair = self._repairs[key] = _Repair()
            self._nursery.start_soon(self._run, key, repair, mend)
        with trio.move_on_after(self._wait_s):
            await repair.ended.wait()
        if not repair.ended.is_set():
            raise OriginFailed(
                "repair-late", "What is damaged here is still being fetched again; try again."
            )
        if repair.error is not None:
            raise _again(repair.error)

    async def _run(
        self, key: Hashable, repair: _Repair, mend: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            await mend()
            self._failures.pop(key, None)
        except StratocacheError as error:
            self._note_failure(key, repair, error)
        except Exception as bug:
            log.exception("a repair failed")
            self._note_failure(key, repair, Internal("internal", f"A repair failed: {bug!r}."))
        except trio.Cancelled:
            repair.error = OriginFailed("repair-late", "The daemon is stopping; try again.")
            raise
        finally:
            del self._repairs[key]
            repair.ended.set()

    def _note_failure(self, key: Hashable, repair: _Repair, error: StratocacheError) -> None:
        repair.error = error
        if len(self._failures) >= _KEPT_FAILURES_MAX:
            self._failures.clear()
        self._failures[key] = (time.monotonic(), error)

    async def _mend_chunk(self, digest: bytes, identifier: str, index: int) -> None:
        if await self._opens(digest):
            return  # somebody put it back meanwhile
        with suppress(StratocacheError):
            # without it nobody knows which bytes of the image the chunk is
            await self.supply_manifest(identifier)
        uses = await self._thread(self._images.uses, digest)
        uses.sort(key=lambda use: use[0] != identifier)
        reasons = []
        for name, place in uses or [(identifier, index)]:
            try:
                for _ in range(_RESTORES_MAX):  # it may rot again before it is looked at
                    await self._origins.restore(name, place)
                    if await self._opens(digest):
                        await self._thread(self._witness.chunk_repaired, digest, name)
                        return
            except StratocacheError as error:
                log.warning("chunk %s of %s: %s", digest.hex(), name, error)
                reasons.append(error.message)
                continue
            reasons.append(f"{name} was fetched again, but not this chunk.")
        names = [name for name, _ in uses]
        reason = " ".join(dict.fromkeys(reasons))
        await self._thread(self._witness.chunk_lost, digest, names, reason)
        raise NotVerified("chunk-lost", f"Chunk {digest.hex()} is lost: {reason}")

    async def _opens(self, digest: bytes) -> bool:
        try:
            await self._thread(self._images.chunks.open, digest)
        except NotVerified:
            return False
        return True

    async def _mend_manifest(self, identifier: str) -> None:
        try:
            await self._thread(self._images.manifest, identifier)
            return
        except (NotVerified, NotFound) as error:
            log.error("manifest %s: %s", identifier, error)
        remembered = self._images.remembered_manifest(identifier)
        await self._thread(self._images.copy_to_quarantine, identifier)
        try:
            if remembered is not None:
                await self._thread(self._images.publish, identifier, remembered)
            else:
                await self._origins.remake(identifier)
        except StratocacheError as error:
            await self._thread(self._witness.manifest_lost, identifier, error.message)
            raise NotVerified(
                "manifest-lost", f"The manifest of {identifier} is lost: {error.message}"
            ) from error
        await self._thread(self._witness.manifest_repaired, identifier)

    async def _thread(self, call: Callable[..., _T], *arguments: object) -> _T:
        return await trio.to_thread.run_sync(call, *arguments, limiter=self._limiter)


def _again(error: StratocacheError) -> StratocacheError:
    """Return a copy: one exception raised to many would collect their tracebacks."""
    return type(error)(error.code, error.message, field=error.field)
