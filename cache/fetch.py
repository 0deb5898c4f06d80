"""Fetching: from an entry that has been judged to a published image, or to one clear error.

The stages, what is on disk in each, and what a crash leaves are described in FETCH.md.
"""

import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Collection
from contextlib import closing, suppress
from urllib.parse import urlsplit

import httpx
import trio

from stratocache.cache.assembly import Assembly, no_progress
from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Entry
from stratocache.cache.errors import (
    NoSpace,
    NotFound,
    NotVerified,
    OriginFailed,
    Refused,
    StratocacheError,
)
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.origin import Backoff, HttpOrigin, OriginBusy, Progress, open_file
from stratocache.cache.peer_image import PeerImage, offered_manifest
from stratocache.cache.peers import Peers
from stratocache.cache.promises import FetchedImage, judge, source_limit
from stratocache.cache.room import CacheSpace, RoomMaker
from stratocache.cache.stage import Stage
from stratocache.cache.traffic import Traffic

log = logging.getLogger(__name__)

_FAILURES_NAMED = 10
_WAIT_MAX_S = 3.0
"""For one location, while there are others: a guest may wait for a repair."""


class _CacheLimit:
    """The most that all chunks together may have."""

    def __init__(self, chunks: ChunkStore, max_bytes: int) -> None:
        self._chunks = chunks
        self._max_bytes = max_bytes

    def require(self, size_bytes: int) -> None:
        """Raise `NoSpace` when so many bytes more are too many."""
        if not self._max_bytes:
            return
        used_bytes = self._chunks.statistics().size_bytes
        if used_bytes + size_bytes > self._max_bytes:
            raise NoSpace(
                "no-space",
                f"The cache has {used_bytes} bytes and may have {self._max_bytes}; {size_bytes} "
                "more do not fit: remove images or raise cache.max_bytes.",
            )


class Fetcher:
    """Fetches images. The caller makes sure that one identifier is fetched once at a time."""

    def __init__(
        self, configuration: Configuration, images: ImageStore, chunks: ChunkStore,
        client: httpx.AsyncClient, *, traffic: Traffic | None = None,
        backoff: Backoff | None = None, peers: Peers | None = None,
    ) -> None:  # fmt: skip
        self._traffic = traffic or Traffic()
        self._peers = peers
        self._attempts = configuration.fetch.attempts
        self._stages = configuration.state_dir / "stage"
        self._stages.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._image_bytes_max = configuration.fetch.max_image_bytes
        self._images = images
        self._remade: set[str] = set()
        self._chunks = chunks
        self._space = CacheSpace(self._stages, configuration.space.reserve_bytes)
        self.chunk_space = CacheSpace(
            self._stages,
            configuration.space.reserve_bytes,
            limit=_CacheLimit(chunks, configuration.cache.max_bytes).require,
        )
        self.http = HttpOrigin(
            client, configuration.fetch, self._space, backoff or Backoff(), self._traffic
        )
        self._assembly = Assembly(images, self._space, configuration.fetch.max_image_bytes)

    async def fetch(
        self, entry: Entry, progress: Progress, *, there: Manifest | None = None
    ) -> FetchedImage:
        """Download, verify and publish an entry's image; peers are asked first, then every
        location is tried in order. An image that is `there` already must be the same.

        `progress(done, total)` counts the bytes of the source: of the download, or of the local
        file as it is read. On failure nothing is left; when cancelled the stage stays, so that a
        stopped process continues at its next start, until `discard`.

        Raises `Refused` (`digest-too-weak`, `location-refused`), `NotFound`
        (`location-not-found`), `OriginFailed` (`origin-failed`), `NoSpace` (`no-space`) and
        `NotVerified` (`size-mismatch`, `digest-mismatch`, `decompression-bomb`,
        `source-truncated`, `source-corrupt`, `image-format`, `image-backing-file`,
        `image-too-large`).
        """
        self._images.manifest_path(entry.identifier)
        judge(entry, self._image_bytes_max)
        found = await self._fetch_from_peers(entry, progress, there)
        if found is not None:
            return found
        stage = self._stage(entry.identifier)
        failures: list[tuple[str, StratocacheError]] = []
        locations = deque(self._ordered(entry, stage))
        # who wants to be left alone for long is asked again after all others have failed
        wait_max_s = _WAIT_MAX_S if len(locations) > 1 else math.inf
        busy: list[str] = []
        while locations:
            location = locations.popleft()
            try:
                return await self._fetch_from(location, entry, stage, progress, there, wait_max_s)
            except (NotFound, Refused, OriginFailed, NotVerified) as error:
                log.warning("image %s from %s: %s", entry.identifier, location, error)
                if isinstance(error, OriginBusy):
                    busy.append(location)
                else:
                    failures.append((location, error))
                await trio.to_thread.run_sync(stage.remove)
            except Exception:
                await trio.to_thread.run_sync(stage.remove)
                raise
            if not locations:
                locations, busy, wait_max_s = deque(busy), [], math.inf
        raise combined(entry, failures)

    async def remake(self, entry: Entry) -> None:
        """Fetch an image that is here again: chunks that are missing are stored, and its manifest
        is published if it is damaged. For one identifier at a time, as `fetch`. The cache's limit
        does not hold it up: it was within that, and while a manifest is damaged nothing can go.

        Raises as `fetch` does, and `NotVerified` (`image-differs`) when it is another image now.
        """
        there: Manifest | None = None
        with suppress(NotFound, NotVerified):
            there = await trio.to_thread.run_sync(self._images.manifest, entry.identifier)
        self._remade.add(entry.identifier)
        try:
            await self.fetch(entry, _no_report, there=there)
        finally:
            self._remade.discard(entry.identifier)

    def _space_for(self, entry: Entry) -> CacheSpace:
        return self._space if entry.identifier in self._remade else self.chunk_space

    def discard(self, identifier: str) -> None:
        """Remove what a cancelled fetch left. Blocks."""
        self._stage(identifier).remove()

    def sweep(self, keep: Collection[str], published: Collection[str] = ()) -> None:
        """Remove what a crash left: stages of identifiers not in `keep`, chunks of no image.

        While a manifest of `published` is missing no chunk goes: it may need them.

        Blocks; for the start of the process. Raises `NoSpace`.
        """
        for directory in self._stages.iterdir():
            if directory.name not in keep:
                log.info("removing the leftovers of fetching %s", directory.name)
                if directory.is_dir() and not directory.is_symlink():
                    shutil.rmtree(directory)
                else:
                    directory.unlink()
        removed = self._images.sweep(published)
        if removed:
            log.info("removed %d chunks that no image uses", removed)
        self._chunks.reconcile()

    def _stage(self, identifier: str) -> Stage:
        self._images.manifest_path(identifier)  # refuses what is no file name
        return Stage(self._stages / identifier)

    def _ordered(self, entry: Entry, stage: Stage) -> list[str]:
        """Return the locations, the one that a stage can continue first."""
        source = stage.load()
        known = source.location if source else None
        return sorted(entry.locations, key=lambda location: location != known)

    async def _fetch_from_peers(
        self, entry: Entry, progress: Progress, there: Manifest | None
    ) -> FetchedImage | None:
        """Make an image of what peers have; None when they do not give what was promised.

        Only what the entry's digests prove may come from them: the container of a qcow2 image is
        what these are of, and no peer has that.
        """
        if self._peers is None or entry.format != "raw":
            return None
        offer = await offered_manifest(self._peers, entry, there)
        if offer is None:
            return None
        source = PeerImage(
            self._peers, self._chunks, entry, offer.content, self._attempts,
            lambda count: self._traffic.moved(entry.identifier, count, by_peer=True),
        )  # fmt: skip
        try:
            async with source.chunks() as chunks:
                found = await self._assembly.make_of_chunks(
                    chunks, entry, lambda done: progress(done, entry.size_bytes),
                    space=self._space_for(entry), there=there,
                )  # fmt: skip
        except NotVerified as error:
            self._peers.blame(offer.peer, f"its manifest of {entry.identifier}: {error.message}")
        except OriginFailed as error:
            log.warning("image %s from peers: %s", entry.identifier, error)
        else:
            await trio.to_thread.run_sync(self._stage(entry.identifier).remove)
            return found
        return None

    async def _fetch_from(
        self, location: str, entry: Entry, stage: Stage, progress: Progress, there: Manifest | None,
        wait_max_s: float,
    ) -> FetchedImage:  # fmt: skip
        log.info("image %s is fetched from %s", entry.identifier, location)
        if urlsplit(location).scheme == "file":
            with closing(await trio.to_thread.run_sync(open_file, location)) as file:
                total = os.fstat(file.fileno()).st_size
                source_limit(entry).judge(total, total=True)
                await trio.to_thread.run_sync(stage.create)

                def read_progress(_: int) -> None:
                    progress(file.tell(), total)

                made = await self._assembly.make(
                    file, entry, stage, read_progress, space=self._space_for(entry), there=there
                )
                self._traffic.moved(entry.identifier, total)
                return made
        continued = await self.http.download(
            location, stage, source_limit(entry), progress, wait_max_s=wait_max_s
        )
        try:
            return await self._make_from_stage(entry, stage, there)
        except NotVerified as error:
            if not continued:
                raise
            # The parts may be of two files, or hurt by a power cut; the whole may still be right.
            log.warning("%s was continued and is not verified (%s); again", location, error)
        await trio.to_thread.run_sync(stage.remove)
        limit = source_limit(entry)
        await self.http.download(location, stage, limit, progress, wait_max_s=wait_max_s)
        return await self._make_from_stage(entry, stage, there)

    async def _make_from_stage(
        self, entry: Entry, stage: Stage, there: Manifest | None
    ) -> FetchedImage:
        with stage.source.open("rb", buffering=0) as file:
            return await self._assembly.make(
                file, entry, stage, no_progress, space=self._space_for(entry), there=there
            )

    def set_room(self, room: RoomMaker) -> None:
        """From now on let somebody make room for what does not fit."""
        self._space.room = self.chunk_space.room = room


def combined(entry: Entry, failures: list[tuple[str, StratocacheError]]) -> StratocacheError:
    """Return one error that names every location; the gravest kind gives class and code."""
    if not failures:
        return NotFound("location-not-found", f"Image {entry.identifier} has no location.")
    errors = [error for _, error in failures]
    named = [f"{location[:200]}: {error.message}" for location, error in failures[:_FAILURES_NAMED]]
    if len(failures) > _FAILURES_NAMED:
        named.append(f"and {len(failures) - _FAILURES_NAMED} more locations.")
    message = f"Image {entry.identifier} cannot be fetched. " + " ".join(named)
    for error in errors:
        if isinstance(error, NotVerified):
            return NotVerified(error.code, message)
    for category in (NotFound, Refused):
        if all(isinstance(error, category) for error in errors):
            return category(errors[0].code, message)
    return OriginFailed("origin-failed", message)


def _no_report(_done: int, _total: int | None) -> None:
    """Count nothing: nobody asked."""
