"""Chunks on demand: brings single chunks of images to the store, each verified, each once.

`ChunkFetcher.fetch` is for whoever needs a chunk now: a guest's read, a repair. `bring` is for the
background. However many ask for a chunk, one request is made for it (a *flight*). DEMAND.md has the
order of things, the limits, and what happens when an origin fails.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import trio

from stratocache.cache.chunk_origins import (
    CastrOrigin,
    ChunkOrigin,
    RangeOrigin,
    Unavailable,
    Wanted,
    host_of,
    store_url,
)
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotVerified, OriginFailed, StratocacheError
from stratocache.cache.growing import UNKNOWN_DIGEST, GrowingManifest
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.origin import Backoff
from stratocache.cache.origin_health import OriginHealth
from stratocache.cache.peers import Peers
from stratocache.cache.qcow2_origin import Qcow2Origin
from stratocache.cache.read_ahead import ReadAhead
from stratocache.cache.room import CacheSpace
from stratocache.cache.space import Space
from stratocache.cache.streaming import Place, Run, Streams
from stratocache.cache.traffic import READER, Traffic

log = logging.getLogger(__name__)

_TRIES = 4
"""How often one that rests is asked all the same while somebody waits for what only it has."""


@dataclass(frozen=True)
class Patience:
    """How long the background leaves the link to guests."""

    quiet_s: float
    """Without a request of theirs, before it goes on: a boot computes between its reads."""
    expect_s: float
    """After a launch: that guest's first read is still to come."""
    longest_s: float = 300
    """At a time, whatever guests do."""


EntryOf = Callable[[str], Entry | None]
"""Returns the entry of an image that may be read, None for another name; called in threads."""


@dataclass
class _Image:
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
        return digest if digest != UNKNOWN_DIGEST else _place_key(self.entry.identifier, index)

    def wanted(self, index: int) -> Wanted:
        return Wanted(index, self.manifest.digest(index), self.manifest.chunk_bytes(index))


@dataclass
class _Flight:
    """One chunk on its way."""

    landed: trio.Event = field(default_factory=trio.Event)
    arrived: bool = False
    reader: str = ""
    """Who asked first."""
    patient: bool = True
    """Whether origins are asked again and again while there is time."""
    demand: bool = False
    """Whether somebody waited for it from the beginning."""
    error: Exception | None = None
    """Why it did not arrive; None also when others may well try again."""


class _Host:
    """Limits for one server: guests' requests never queue behind those of the background."""

    def __init__(self, parallel: int) -> None:
        self.background = trio.CapacityLimiter(parallel // 2)
        self.demand = trio.CapacityLimiter(parallel - parallel // 2)


class ChunkFetcher:
    """Fetches chunks of all images of one cache. Belongs to one trio loop; flights run in `nursery`.

    `room` is asked for room before anything is fetched in the background; what a guest waits for
    leaves the reserve alone and nothing else.
    """

    def __init__(
        self,
        configuration: Configuration,
        images: ImageStore,
        client: httpx.AsyncClient,
        nursery: trio.Nursery,
        entry_of: EntryOf,
        room: CacheSpace,
        *,
        traffic: Traffic | None = None,
        backoff: Backoff | None = None,
        patience: Patience | None = None,
        peers: Peers | None = None,
    ) -> None:
        settings = configuration.fetch
        self.timeout_s = settings.demand_timeout_s
        self.background_parallel = settings.origin_parallel // 2
        self.traffic = traffic or Traffic()
        self._parallel = settings.origin_parallel
        self._images = images
        self._client = client
        self._nursery = nursery
        self._entry_of = entry_of
        self.peers = peers
        self._backoff = backoff or Backoff()
        self._health = OriginHealth(self._backoff) if peers is None else peers.health
        self._space = Space(configuration.state_dir, configuration.space.reserve_bytes)
        # A server that says nothing for a third of a guest's patience is given up for another one.
        quiet_s = min(settings.read_timeout_s, self.timeout_s / 3)
        connect_s = min(settings.connect_timeout_s, self.timeout_s / 3)
        self._timeout = httpx.Timeout(quiet_s, connect=connect_s, pool=None)
        self._known: dict[str, _Image] = {}
        self._flights: dict[bytes, _Flight] = {}
        self._hosts: dict[str, _Host] = {}
        self._patience = patience or Patience(settings.quiet_s, 3 * settings.quiet_s)
        self._asking = 0
        self._quiet_at = 0.0
        self._room = room
        self._room_limiter = trio.CapacityLimiter(1)
        # Apart from trio's own: threads that wait for chunks must not keep chunks from landing.
        self._limiter = trio.CapacityLimiter(2 * (os.cpu_count() or 1) + 2)
        self._streams = Streams(
            configuration, images, client, nursery, room, self, self.traffic, self._backoff, quiet_s
        )

    # Now.

    async def fetch(self, image_id: str, index: int, *, patient: bool = True) -> None:
        """Return when chunk `index` of an image is in the store, fetching it when it is not.

        For guests' reads and for repairs: it goes before everything else. A chunk that is there but
        damaged must have been moved away. Unless `patient` each origin is asked once: for who knows
        another way. Raises `OriginFailed` (`chunk-unreachable`) when no origin gave it within
        `fetch.demand_timeout_s`, `NotVerified` (`chunk-missing`) when there is none to ask,
        `NoSpace`, and what reading the manifest raises.
        """
        image = await self._image(image_id)
        if image is None:
            raise NotVerified(
                "chunk-missing",
                f"Chunk {index} of {image_id} is not in the store and no image has an origin for it.",
            )
        if patient and not self._is_streamed(image):
            ahead = image.ahead.wanted(index)
            if ahead:
                self._nursery.start_soon(self._bring_ahead, image, ahead)
        await self._demand(image, index, patient=patient)

    def waited(self, name: str, wait_s: float) -> None:
        """Count what the running task waited for a chunk, under `READER` too."""
        self.traffic.waited(name, READER.get(), wait_s)

    async def _demand(self, image: _Image, index: int, *, patient: bool) -> None:
        self._asking += 1
        try:
            with trio.move_on_after(self.timeout_s):
                while True:
                    key = image.key(index)
                    flight = self._flights.get(key)
                    if flight is None:
                        flight = _Flight(reader=READER.get(), patient=patient, demand=True)
                        self._flights[key] = flight
                        self._nursery.start_soon(self._fly, flight, image, index, key)
                    await flight.landed.wait()
                    if flight.arrived:
                        return
                    if flight.error is not None and flight.patient >= patient:
                        raise flight.error
        finally:
            self._asking -= 1
            self._quiet_at = max(self._quiet_at, trio.current_time() + self._patience.quiet_s)
        raise OriginFailed(
            "chunk-unreachable",
            f"Chunk {index} of {image.entry.identifier} did not come within {self.timeout_s:g} s; "
            "check the origins.",
        )

    async def _fly(self, flight: _Flight, image: _Image, index: int, key: bytes) -> None:
        """Bring one chunk, from whichever origin gives it first."""
        try:
            flight.arrived = await self._is_there(image.manifest.digest(index))
            if not flight.arrived:
                await self._obtain(flight, image, image.wanted(index))
        except (StratocacheError, OSError) as error:
            flight.error = error
        except Exception as error:
            log.exception("fetching chunk %d of %s failed", index, image.entry.identifier)
            flight.error = error
        finally:
            self._land(key, flight)

    async def _obtain(self, flight: _Flight, image: _Image, wanted: Wanted) -> None:
        deadline = trio.current_time() + self.timeout_s
        peers_until = trio.current_time() + (self.peers.timeout_s if self.peers else 0)
        done: set[str] = set()
        reason = "it has no origin that serves single chunks"
        while not flight.arrived:
            now = trio.current_time()
            origins = self._asked(image, wanted.digest)
            left = [origin for origin in origins if origin.location not in done]
            if flight.patient and self._is_streamed(image):
                left = [origin for origin in left if self._rests_until(origin) <= now]
            if not left:
                break
            origin = min(left, key=lambda one: self._turn(one, now, peers_until))
            if flight.patient and self._rests_until(origin) > now:
                # somebody waits: an origin that should rest for longer is better than none
                again = min(self._rests_until(origin), now + self.timeout_s / _TRIES)
                if again >= deadline:
                    break
                await trio.sleep_until(again)
            async with self._host(origin).demand:
                failure = await self._read(origin, image, [wanted], {wanted.digest: flight})
            if failure is not None:
                reason = f"{origin.location}: {failure}"
                if failure.kind == "absent" or not flight.patient:
                    done.add(origin.location)
        if not flight.arrived and flight.patient and self._is_streamed(image):
            reason = await self._await_stream(flight, image, deadline) or reason
        if not flight.arrived:
            raise OriginFailed(
                "chunk-unreachable",
                f"Chunk {wanted.index} of {image.entry.identifier} cannot be fetched ({reason}).",
            )

    def _turn(self, origin: ChunkOrigin, now: float, peers_until: float) -> tuple[float, bool]:
        """Return what orders origins: nobody queues for a peer, or asks one for long."""
        busy = self._host(origin).demand.available_tokens < 1
        return max(now, self._rests_until(origin)), origin.of_peer and (busy or now >= peers_until)

    def _asked(self, image: _Image, digest: bytes) -> list[ChunkOrigin]:
        """Return whom to ask for a chunk, in this order as far as they do not rest."""
        if self.peers is None or isinstance(image.manifest, GrowingManifest):
            return image.origins
        first = self.peers.origins(image.entry.identifier, digest)
        last = self.peers.last_resort(image.entry.identifier, digest)
        return [*first, *image.origins, *last]

    async def _await_stream(self, flight: _Flight, image: _Image, deadline: float) -> str:
        """Return when the stream has brought a chunk, or no longer may; say why it failed."""
        reason = "the stream has not come so far"
        with trio.move_on_at(deadline):
            while not flight.arrived and not image.gone:
                run = self._streams.join(image.entry, image.manifest)
                await run.ended.wait()
                if run.error is not None:
                    reason = run.error.message
        return reason

    # In the background.

    async def bring(self, image_id: str, indexes: Sequence[int]) -> list[int]:
        """Bring adjacent chunks with few requests; return those that are in the store now.

        Every origin that is not resting is tried once. Those that are on their way already are waited for.
        Raises `NoSpace`, and what reading the manifest raises.
        """
        image = await self._image(image_id)
        if image is None:
            return []
        missing = await self._missing(image, indexes)
        if missing:
            await trio.to_thread.run_sync(
                self._room.obtain_blocking, sum(map(image.manifest.chunk_bytes, missing)),
                limiter=self._room_limiter,
            )  # fmt: skip
        origins = self._asked(image, image.manifest.digest(missing[0])) if missing else []
        for origin in origins:
            if not missing:
                break
            for run in _runs(missing, origin.run_max):
                if self._rests_until(origin) <= trio.current_time():
                    async with self._host(origin).background:
                        await self._bring_run(origin, image, run)
            missing = await self._missing(image, missing)
        left = set(missing)
        return [index for index in indexes if index not in left]

    async def _bring_ahead(self, image: _Image, indexes: range) -> None:
        """Bring what a reader is about to want; when that fails it asks for itself."""
        try:
            await self.bring(image.entry.identifier, indexes)
        except (StratocacheError, OSError) as error:
            log.info("nothing is read ahead of %s: %s", image.entry.identifier, error)

    async def _bring_run(self, origin: ChunkOrigin, image: _Image, run: list[int]) -> None:
        mine: dict[bytes, _Flight] = {}
        others: list[_Flight] = []
        for index in run:
            digest = image.manifest.digest(index)
            flight = self._flights.get(digest)
            if flight is None:
                self._flights[digest] = mine[digest] = _Flight()
            elif digest not in mine:
                others.append(flight)
        try:
            # what came meanwhile is not asked for again
            still = await self._missing(image, [i for i in run if image.manifest.digest(i) in mine])
            for part in _runs(_distinct(image, still), origin.run_max):
                wanted = [image.wanted(index) for index in part]
                if await self._read(origin, image, wanted, mine) is not None:
                    break
        finally:
            for digest, flight in mine.items():
                if self._flights.get(digest) is flight:
                    self._land(digest, flight)
        for flight in others:
            await flight.landed.wait()

    async def probe(self, image_id: str, index: int) -> bool:
        """Tell whether an image comes in single chunks, bringing one if that is not known yet.

        Raises as `bring` does. False: what it has is a stream, or nothing.
        """
        image = await self._image(image_id)
        if image is None:
            return False
        if any(self._health.serves(origin.location) for origin in image.origins):
            return True
        return bool(await self.bring(image_id, [index])) or not self._is_streamed(image)

    async def is_streamed(self, image_id: str) -> bool:
        """Tell whether all of an image's origins have been asked for single chunks in vain."""
        image = await self._image(image_id)
        return image is not None and self._is_streamed(image)

    async def start_stream(self, image_id: str) -> str | None:
        """Begin to read an image's source; return when a first chunk of it is proven, or why not."""
        run = await self._join(image_id)
        if run is None:
            return "it has no source that can be read as a stream"
        await run.begun.wait()
        if run.passed:
            return None
        return run.error.message if run.error is not None else "its stream was stopped"

    async def stream(
        self, image_id: str, passed: Callable[[int], None]
    ) -> NotVerified | OriginFailed | None:
        """Read an image's source to its end, telling the index of each chunk that is here then.

        It goes on when the caller is cancelled. Returns what another time may mend, raises all else.
        """
        run = await self._join(image_id)
        if run is None:
            return None
        run.notes.append(passed)
        try:
            await run.ended.wait()
        finally:
            run.notes.remove(passed)
        if run.error is None or isinstance(run.error, (NotVerified, OriginFailed)):
            return run.error
        raise run.error

    async def _join(self, image_id: str) -> Run | None:
        image = await self._image(image_id)
        if image is None or image.gone or image.entry.format != "raw":
            return None
        return self._streams.join(image.entry, image.manifest)

    def _is_streamed(self, image: _Image) -> bool:
        return image.entry.format == "raw" and all(map(self._is_in_vain, image.origins))

    def _is_in_vain(self, origin: ChunkOrigin) -> bool:
        """Tell whether an origin does not serve single chunks, as far as is known."""
        health, location = self._health, origin.location
        # a raw file is asked for ranges again after an accident, a store may never come
        if isinstance(origin, RangeOrigin):
            in_vain = health.gave_the_whole(location)
        else:
            in_vain = health.was_asked_in_vain(location)
        return in_vain and not health.serves(location)

    def is_awaited(self, place: Place) -> bool:
        """Tell whether somebody waits for a chunk, or fetches it; any thread may ask."""
        return any(key in self._flights for key in _keys(place))

    def passed(self, place: Place, new_bytes: int) -> None:
        """Let those go on who wait for a chunk that a stream has brought."""
        demand = False
        for key in _keys(place):
            flight = self._flights.get(key)
            if flight is not None:
                demand |= flight.demand
                flight.arrived = True
                self.traffic.asked(flight.reader, new_bytes)
                self._land(key, flight)
        if new_bytes:
            self.traffic.arrived(place.image_id, new_bytes, demand=demand)

    def expect_reads(self) -> None:
        """Leave the link to a guest that is about to boot."""
        self._quiet_at = max(self._quiet_at, trio.current_time() + self._patience.expect_s)

    async def quiet(self) -> None:
        """Return when guests leave the link to the background; see `Patience`."""
        with trio.move_on_after(self._patience.longest_s):
            while True:
                if self._asking == 0 and trio.current_time() >= self._quiet_at:
                    return
                pause_s = self._quiet_at - trio.current_time()
                await trio.sleep(self._patience.quiet_s if self._asking else pause_s)

    async def missing(self, image_id: str) -> list[int]:
        """Return the chunks of an image that are not in the store, in order."""
        image = await self._image(image_id)
        return (
            [] if image is None else await self._missing(image, range(image.manifest.chunk_count))
        )

    async def forget(self, image_id: str) -> None:
        """Let go of an image that is about to go: no chunk arrives on its behalf after this."""
        image = self._known.pop(image_id, None)
        if image is not None:
            image.gone = True
            await self._streams.stop(image_id)
            while image.reads:
                await image.idle.wait()

    async def halt(self, image_id: str) -> None:
        """End the stream of an image that somebody is about to fetch whole."""
        await self._streams.stop(image_id)

    async def discard(self, image_id: str) -> None:
        """Remove what streams have left of an image that was forgotten."""
        await self._streams.discard(image_id)

    # Both.

    async def _read(
        self,
        origin: ChunkOrigin,
        image: _Image,
        wanted: list[Wanted],
        flights: dict[bytes, _Flight],
    ) -> Unavailable | None:
        """Read adjacent chunks from an origin; return why it did not give all of them."""
        identifier = image.entry.identifier

        async def deliver(item: Wanted, data: bytes) -> None:
            if image.gone:
                raise Unavailable("the image is being deleted", "absent")
            await trio.to_thread.run_sync(self._store, item, data, limiter=self._limiter)
            flight = flights[item.digest]
            flight.arrived = True
            self.traffic.arrived(identifier, item.size_bytes, demand=flight.demand)
            self.traffic.asked(flight.reader, item.size_bytes)
            self._land(item.digest, flight)

        def moved(count: int) -> None:
            self.traffic.moved(identifier, count, by_peer=origin.of_peer)

        image.reads += 1
        try:
            await origin.read(wanted, deliver, moved)
        except Unavailable as error:
            if not image.gone:  # that is no fault of the origin
                self.traffic.requested(error.kind)
                if not (origin.of_peer and error.kind == "absent"):
                    self._health.failed(origin.location, error)
            return error
        finally:
            image.reads -= 1
            if not image.reads:
                image.idle.set()
                image.idle = trio.Event()
        self.traffic.requested("ok")
        self._health.succeeded(origin.location)
        return None

    def _store(self, item: Wanted, data: bytes) -> None:
        """Verify and keep a chunk; runs in a thread."""
        if len(data) != item.size_bytes or hashlib.sha256(data).digest() != item.digest:
            raise Unavailable(f"it serves a wrong chunk {item.index}", "wrong")
        self._space.require(len(data))
        self._images.chunks.put(item.digest, data)

    def _land(self, digest: bytes, flight: _Flight) -> None:
        if self._flights.get(digest) is flight:
            del self._flights[digest]
        flight.landed.set()

    def _host(self, origin: ChunkOrigin) -> _Host:
        return self._hosts.setdefault(host_of(origin.location), _Host(self._parallel))

    def _rests_until(self, origin: ChunkOrigin) -> float:
        return self._health.rests_until(origin.location)

    async def _image(self, image_id: str) -> _Image | None:
        known = self._known.get(image_id)
        if known is None:
            known = await trio.to_thread.run_sync(self._load, image_id)
            if known is not None:
                known = self._known.setdefault(image_id, known)
        return known

    def _load(self, image_id: str) -> _Image | None:
        entry = self._entry_of(image_id)
        if entry is None:
            return None
        # shared with the image's readers: a manifest is large
        growing = self._images.growing(image_id)
        if isinstance(growing, GrowingManifest):
            # nothing proves a chunk that comes by itself
            return _Image(entry, growing, [], ReadAhead(growing.chunk_count))
        manifest = self._images.reader(image_id).manifest
        origins = self._origins(entry, manifest.size_bytes)
        return _Image(entry, manifest, origins, ReadAhead(manifest.chunk_count))

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

    async def _missing(self, image: _Image, indexes: Sequence[int]) -> list[int]:
        def look() -> list[int]:
            chunks, manifest = self._images.chunks, image.manifest
            return [
                index
                for index in indexes
                if not manifest.is_zero(index) and manifest.digest(index) not in chunks
            ]

        return await trio.to_thread.run_sync(look, limiter=self._limiter)

    async def _is_there(self, digest: bytes) -> bool:
        return await trio.to_thread.run_sync(
            self._images.chunks.__contains__, digest, limiter=self._limiter
        )


def _place_key(image_id: str, index: int) -> bytes:
    return f"{image_id}/{index}".encode()


def _keys(place: Place) -> tuple[bytes, bytes]:
    return place.digest, _place_key(place.image_id, place.index)


def _runs(indexes: Sequence[int], run_max: int) -> Iterator[list[int]]:
    """Cut a rising sequence into runs of adjacent numbers, each of at most `run_max`."""
    run: list[int] = []
    for index in indexes:
        if run and (index != run[-1] + 1 or len(run) >= run_max):
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _distinct(image: _Image, indexes: Sequence[int]) -> list[int]:
    """Leave out all but the first of chunks that are the same."""
    first: dict[bytes, int] = {}
    for index in indexes:
        first.setdefault(image.manifest.digest(index), index)
    return sorted(first.values())
