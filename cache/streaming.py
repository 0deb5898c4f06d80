"""Streams: each image's source is read by one task at a time, and every chunk that passes is stored,
whoever waits for it, after it was compared with its digest in the image's index, or, without one,
with what it was when it first came.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import httpx
import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Entry
from stratocache.cache.errors import Internal, NoSpace, NotVerified, StratocacheError
from stratocache.cache.growing import GrowingManifest
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.origin import Backoff, HttpOrigin
from stratocache.cache.room import CacheSpace
from stratocache.cache.space import Space
from stratocache.cache.stage import Stage
from stratocache.cache.stream import Stream
from stratocache.cache.traffic import Traffic

log = logging.getLogger(__name__)

CHUNK_MISMATCH = "chunk-mismatch"
"""Code of the error for a stream of another image."""
_PIECE_BYTES = 128 * 1024
"""Written and read at a time: less than a whole fetch does, as guests wait for it."""


class Awaiting(Protocol):
    """Who knows which chunks somebody waits for; belongs to the trio loop."""

    def is_awaited(self, place: "Place") -> bool:
        """Tell whether somebody waits for a chunk; any thread may ask."""

    def passed(self, place: "Place", new_bytes: int) -> None:
        """Take note that a chunk is in the store, `new_bytes` of it since now."""


@dataclass(frozen=True, slots=True)
class Place:
    """One chunk of an image, and what it is."""

    image_id: str
    index: int
    digest: bytes


@dataclass
class Run:
    """One reading of an image's source."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    begun: trio.Event = field(default_factory=trio.Event)
    """A first chunk has passed and was right, or it has ended."""
    ended: trio.Event = field(default_factory=trio.Event)
    passed: int = 0
    """Chunks that have been compared with the index, zeros counted."""
    new_bytes: int = 0
    """Of chunks that were not in the store before."""
    error: StratocacheError | None = None
    notes: list[Callable[[int], None]] = field(default_factory=list)
    """Are told the index of each chunk that is in the store."""


class Streams:
    """Keeps one run per image; runs are tasks of `nursery`. Belongs to one trio loop."""

    def __init__(
        self,
        configuration: Configuration,
        images: ImageStore,
        client: httpx.AsyncClient,
        nursery: trio.Nursery,
        room: CacheSpace,
        awaiting: Awaiting,
        traffic: Traffic,
        backoff: Backoff,
        read_timeout_s: float,
    ) -> None:
        self._chunks = images.chunks
        self._stages = configuration.state_dir / "stage"
        self._nursery = nursery
        self._room = room
        self._awaiting = awaiting
        self._traffic = traffic
        self._backoff = backoff
        self._space = Space(configuration.state_dir, configuration.space.reserve_bytes)
        self._downloads = CacheSpace(configuration.state_dir, configuration.space.reserve_bytes)
        settings = configuration.fetch.model_copy(update={"read_timeout_s": read_timeout_s})
        self._http = HttpOrigin(
            client, settings, self._downloads, backoff, piece_bytes=_PIECE_BYTES
        )
        self._runs: dict[str, Run] = {}
        self._failures: dict[str, int] = {}

    def join(self, entry: Entry, manifest: Manifest | GrowingManifest) -> Run:
        """Return the run of an image that is under way, else start one.

        After runs that failed it begins by a pause.
        """
        run = self._runs.get(entry.identifier)
        if run is None:
            run = self._runs[entry.identifier] = Run()
            self._nursery.start_soon(self._run, entry, manifest, run)
        return run

    async def stop(self, image_id: str) -> None:
        """End the run of an image; what has been downloaded stays in its stage."""
        self._failures.pop(image_id, None)
        run = self._runs.get(image_id)
        if run is not None:
            run.scope.cancel()
            await run.ended.wait()

    async def discard(self, image_id: str) -> None:
        """Remove what has been downloaded of an image that is not streamed any more."""
        await trio.to_thread.run_sync(self._stage(image_id).remove)

    def _stage(self, image_id: str) -> Stage:
        return Stage(self._stages / image_id)

    async def _run(self, entry: Entry, manifest: Manifest | GrowingManifest, run: Run) -> None:
        identifier = entry.identifier
        try:
            with run.scope:
                failures = self._failures.get(identifier, 0)
                if failures:
                    await trio.sleep(self._backoff.pause_s(failures, 0))
                await self._stream(entry, manifest, run)
        except StratocacheError as error:
            run.error = error
        except Exception as error:
            log.exception("the stream of %s failed", identifier)
            run.error = Internal("internal", f"Streaming {identifier} failed: {error!r}.")
        finally:
            gained = run.error is None or run.new_bytes > 0
            self._failures[identifier] = 0 if gained else self._failures.get(identifier, 0) + 1
            del self._runs[identifier]
            run.begun.set()
            run.ended.set()

    async def _stream(self, entry: Entry, manifest: Manifest | GrowingManifest, run: Run) -> None:
        self._downloads.room = self._room.room
        keeper = _Keeper(self, entry, manifest, run)
        stage = self._stage(entry.identifier)
        moved = self._traffic.moved
        await Stream(
            entry, stage, self._http, keeper.keep, lambda count: moved(entry.identifier, count)
        ).run()
        if keeper.refusal is not None:
            raise keeper.refusal  # the stage stays, so the next run costs no download
        await trio.to_thread.run_sync(stage.drop)

    def store(self, place: "Place", data: bytes, *, full: bool) -> bool:
        """Store a chunk; tell whether it was new. Runs in a thread.

        For one that somebody waits for the reserve alone is left, others ask for room; when there
        is none already (`full`) they ask in vain, so `NoSpace` is raised at once.
        """
        if place.digest in self._chunks:
            return False
        if self._awaiting.is_awaited(place):
            self._space.require(len(data))
        elif full:
            raise NoSpace("no-space", "The cache is full.")
        else:
            self._room.obtain_blocking(len(data))
        return self._chunks.put(place.digest, data)

    def note(self, place: "Place", new_bytes: int) -> None:
        """Tell the one who knows who waits."""
        self._awaiting.passed(place, new_bytes)


class _Keeper:
    """Verifies and stores the chunks of one run."""

    def __init__(
        self, streams: Streams, entry: Entry, manifest: Manifest | GrowingManifest, run: Run
    ) -> None:
        self._streams = streams
        self._identifier = entry.identifier
        self._manifest = manifest
        self._run = run
        self.refusal: NoSpace | None = None
        """Why chunks that nobody waits for were let go by."""

    def keep(self, index: int, data: bytes) -> None:
        """Take one chunk; raises `NotVerified` (`chunk-mismatch`) and `OSError`. Runs in a thread."""
        place = Place(self._identifier, index, self._judge(index, data))
        new = False
        if not self._manifest.is_zero(index):
            try:
                new = self._streams.store(place, data, full=self.refusal is not None)
            except NoSpace as error:
                # the stream goes on: what a guest waits for may be further on
                self.refusal = self.refusal or error
                return
        trio.from_thread.run_sync(self._note, place, len(data) if new else 0)

    def _judge(self, index: int, data: bytes) -> bytes:
        """Return the digest of a chunk that is what it must be."""
        manifest = self._manifest
        if index >= manifest.chunk_count or len(data) != manifest.chunk_bytes(index):
            raise _mismatch(index)
        digest = hashlib.sha256(data).digest()
        if isinstance(manifest, GrowingManifest) and not manifest.knows(index):
            manifest.learn(index, digest)  # before it is stored: removal looks at what is known
        if digest != manifest.digest(index):
            raise _mismatch(index)
        return digest

    def _note(self, place: Place, new_bytes: int) -> None:
        self._run.passed += 1
        self._run.new_bytes += new_bytes
        self._run.begun.set()
        self._streams.note(place, new_bytes)
        for note in self._run.notes:
            note(place.index)


def _mismatch(index: int) -> NotVerified:
    return NotVerified(
        CHUNK_MISMATCH, f"Chunk {index} of the stream is not what it must be; it was dropped."
    )
