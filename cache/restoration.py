"""Bringing back single chunks and whole manifests of images from where they came from.

A chunk of an uncompressed raw image is read alone, by a range; of anything else the whole source is
fetched again, for all of its chunks that are missing. Whatever comes is compared with its digest
before it is stored.
"""

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import trio

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.entry import LOCAL_CATALOGUE, Entry
from stratocache.cache.errors import (
    Internal,
    NotFound,
    OriginFailed,
    StratocacheError,
)
from stratocache.cache.fetch import Fetcher
from stratocache.cache.images import ImageStore
from stratocache.cache.origin import HttpOrigin, read_file_range

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
        http: HttpOrigin,
        entry_of: Callable[[str], Entry | None],
        nursery: trio.Nursery,
    ) -> None:
        self._images = images
        self._fetcher = fetcher
        self._http = http
        self._entry_of = entry_of
        self._nursery = nursery
        self._remakings: dict[str, _Remaking] = {}
        # Apart from trio's own: whoever waits for a repair may hold one of those threads.
        self._limiter = trio.CapacityLimiter(2)

    async def restore(self, identifier: str, index: int) -> None:
        """Store one chunk of an image again; see `Origins`."""
        entry = await self._entry(identifier)
        if entry.format == "raw" and entry.compression == "none":
            # what a reader has was whole; the file may rot at any moment
            manifest = self._images.remembered_manifest(identifier)
            if manifest is None:
                manifest = await trio.to_thread.run_sync(
                    self._images.manifest, identifier, limiter=self._limiter
                )
            digest, size_bytes = manifest.digest(index), manifest.chunk_bytes(index)
            start = index * CHUNK_BYTES
            for location in entry.locations:
                if await self._restore_from(location, digest, start, size_bytes):
                    return
        await self.remake(identifier)

    async def _restore_from(
        self, location: str, digest: bytes, start: int, size_bytes: int
    ) -> bool:
        try:
            if urlsplit(location).scheme == "file":
                data = await trio.to_thread.run_sync(
                    read_file_range, location, start, size_bytes, limiter=self._limiter
                )
            else:
                data = await self._http.read_range(location, start, size_bytes)
        except StratocacheError as error:
            log.info("bytes %d+%d of %s: %s", start, size_bytes, location, error)
            return False
        if hashlib.sha256(data).digest() != digest:
            log.warning("bytes %d+%d of %s are not what they were", start, size_bytes, location)
            return False
        await trio.to_thread.run_sync(self._images.chunks.put, digest, data, limiter=self._limiter)
        return True

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
