"""Bringing back single chunks and whole manifests of images from where they came from.

A chunk is fetched alone where an origin gives single ones (`demand`); else the whole source is
fetched again, for all chunks that are missing. Whatever comes is compared with its digest before it
is stored.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import trio

from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.entry import LOCAL_CATALOGUE, Entry
from stratocache.cache.errors import (
    Internal,
    NotFound,
    NotVerified,
    OriginFailed,
    StratocacheError,
)
from stratocache.cache.fetch import Fetcher
from stratocache.cache.images import ImageStore

log = logging.getLogger(__name__)


class Origins(Protocol):
    """Where what is damaged or gone here can be had again."""

    async def restore(self, identifier: str, index: int) -> None:
        """Store one chunk of an image again.

        Raises `NotFound` (`origin-none`) when nothing but this host ever had it, and
        `OriginFailed`, `NotVerified`, `Refused`, `NoSpace`.
        """

    async def remake(self, identifier: str) -> None:
        """Publish an image's manifest again, and what is missing of its chunks; raises as above."""


@dataclass
class _Remaking:
    """The one fetch of a whole image that is under way."""

    ended: trio.Event = field(default_factory=trio.Event)
    error: StratocacheError | None = None


class EntryOrigins:
    """The origins that the stored entries of images name; `nursery` has fetches of whole images."""

    def __init__(
        self,
        images: ImageStore,
        fetcher: Fetcher,
        chunks: ChunkFetcher,
        entry_of: Callable[[str], Entry | None],
        nursery: trio.Nursery,
    ) -> None:
        self._images = images
        self._fetcher = fetcher
        self._chunks = chunks
        self._entry_of = entry_of
        self._nursery = nursery
        self._remakings: dict[str, _Remaking] = {}
        # Apart from trio's own: whoever waits for a repair may hold one of those threads.
        self._limiter = trio.CapacityLimiter(2)

    async def restore(self, identifier: str, index: int) -> None:
        """Store one chunk of an image again; see `Origins`."""
        await self._entry(identifier)
        try:
            await self._chunks.fetch(identifier, index, patient=False)
        except (OriginFailed, NotVerified) as error:
            log.info("chunk %d of %s alone: %s", index, identifier, error)
            await self.remake(identifier)

    async def remake(self, identifier: str) -> None:
        """Fetch a whole image again, once for all who ask; see `Origins`."""
        entry = await self._entry(identifier)
        remaking = self._remakings.get(identifier)
        if remaking is None:
            remaking = self._remakings[identifier] = _Remaking()
            self._nursery.start_soon(self._remake, entry, remaking)
        await remaking.ended.wait()
        if remaking.error is not None:
            raise remaking.error

    async def _remake(self, entry: Entry, remaking: _Remaking) -> None:
        try:
            await self._chunks.halt(entry.identifier)
            await self._fetcher.remake(entry)
            await self._take_back(entry.identifier)
        except StratocacheError as error:
            remaking.error = error
        except Exception as bug:
            log.exception("fetching %s again failed", entry.identifier)
            remaking.error = Internal("internal", f"Fetching {entry.identifier}: {bug!r}.")
        except trio.Cancelled:
            remaking.error = OriginFailed("origin-failed", "The daemon is stopping; try again.")
            raise
        finally:
            del self._remakings[entry.identifier]
            remaking.ended.set()

    async def _take_back(self, identifier: str) -> None:
        """Remove what was made for an image that was deleted meanwhile."""
        entry = await trio.to_thread.run_sync(self._entry_of, identifier, limiter=self._limiter)
        if entry is None:
            with suppress(NotFound):
                await trio.to_thread.run_sync(self._images.remove, identifier)

    async def _entry(self, identifier: str) -> Entry:
        entry = await trio.to_thread.run_sync(self._entry_of, identifier, limiter=self._limiter)
        if entry is None or entry.catalogue == LOCAL_CATALOGUE or not entry.locations:
            raise NotFound(
                "origin-none", f"{identifier} was made on this host; no origin has its bytes."
            )
        return entry
