"""Chunks on demand: brings single chunks of images to the store, each verified, each once.

`ChunkFetcher.fetch` is for whoever needs a chunk now: a guest's read, a repair. `bring` is for the
background. However many ask for a chunk, one request is made for it (a *flight*). DEMAND.md has the
order of things, the limits, and what happens when an origin fails.
"""

import logging
import os
from collections.abc import Callable, Sequence

import httpx
import trio

from stratocache.cache.bringing import Bringing
from stratocache.cache.chunk_origins import Wanted
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import NotVerified, OriginFailed, StratocacheError
from stratocache.cache.fetchable import EntryOf, FetchableImage, FetchableImages
from stratocache.cache.flights import Flight, Flights
from stratocache.cache.images import ImageStore
from stratocache.cache.origin import Backoff
from stratocache.cache.origin_access import OriginAccess
from stratocache.cache.origin_health import OriginHealth
from stratocache.cache.patience import Patience, Quiet
from stratocache.cache.peers import Peers
from stratocache.cache.room import CacheSpace
from stratocache.cache.space import Space
from stratocache.cache.streaming import Place, Run, Streams
from stratocache.cache.traffic import READER, Traffic

log = logging.getLogger(__name__)

_TRIES = 4
"""How often one that rests is asked all the same while somebody waits for what only it has."""


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
        self.peers = peers
        self._nursery = nursery
        backoff = backoff or Backoff()
        self._health = OriginHealth(backoff) if peers is None else peers.health
        # A server that says nothing for a third of a guest's patience is given up for another one.
        quiet_s = min(settings.read_timeout_s, self.timeout_s / 3)
        connect_s = min(settings.connect_timeout_s, self.timeout_s / 3)
        timeout = httpx.Timeout(quiet_s, connect=connect_s, pool=None)
        self._flights = Flights()
        self._quiet = Quiet(patience or Patience(settings.quiet_s, 3 * settings.quiet_s))
        # Apart from trio's own: threads that wait for chunks must not keep chunks from landing.
        limiter = trio.CapacityLimiter(2 * (os.cpu_count() or 1) + 2)
        self._images = FetchableImages(images, entry_of, client, timeout, limiter)
        space = Space(configuration.state_dir, configuration.space.reserve_bytes)
        self._access = OriginAccess(
            images.chunks, space, self._flights, self._health, peers, self.traffic,
            settings.origin_parallel, limiter,
        )  # fmt: skip
        self._bringing = Bringing(self._images, self._access, self._flights, room)
        self._streams = Streams(
            configuration, images, client, nursery, room, self, self.traffic, backoff, quiet_s
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
        image = await self._images.find(image_id)
        if image is None:
            raise NotVerified(
                "chunk-missing",
                f"Chunk {index} of {image_id} is not in the store and no image has an origin for it.",
            )
        if patient and not self._access.is_streamed(image):
            ahead = image.ahead.wanted(index)
            if ahead:
                self._nursery.start_soon(self._bringing.bring_ahead, image, ahead)
        await self._demand(image, index, patient=patient)

    def waited(self, name: str, wait_s: float) -> None:
        """Count what the running task waited for a chunk, under `READER` too."""
        self.traffic.waited(name, READER.get(), wait_s)

    async def _demand(self, image: FetchableImage, index: int, *, patient: bool) -> None:
        with self._quiet.asking(), trio.move_on_after(self.timeout_s):
            while True:
                key = image.key(index)
                flight = self._flights.get(key)
                if flight is None:
                    flight = Flight(reader=READER.get(), patient=patient, demand=True)
                    self._flights.begin(key, flight)
                    self._nursery.start_soon(self._fly, flight, image, index, key)
                await flight.landed.wait()
                if flight.arrived:
                    return
                if flight.error is not None and flight.patient >= patient:
                    raise flight.error
        raise OriginFailed(
            "chunk-unreachable",
            f"Chunk {index} of {image.entry.identifier} did not come within {self.timeout_s:g} s; "
            "check the origins.",
        )

    async def _fly(self, flight: Flight, image: FetchableImage, index: int, key: bytes) -> None:
        """Bring one chunk, from whichever origin gives it first."""
        try:
            flight.arrived = await self._images.has(image.manifest.digest(index))
            if not flight.arrived:
                await self._obtain(flight, image, image.wanted(index))
        except (StratocacheError, OSError) as error:
            flight.error = error
        except Exception as error:
            log.exception("fetching chunk %d of %s failed", index, image.entry.identifier)
            flight.error = error
        finally:
            self._flights.land(key, flight)

    async def _obtain(self, flight: Flight, image: FetchableImage, wanted: Wanted) -> None:
        deadline = trio.current_time() + self.timeout_s
        peers_until = trio.current_time() + (self.peers.timeout_s if self.peers else 0)
        done: set[str] = set()
        reason = "it has no origin that serves single chunks"
        while not flight.arrived:
            now = trio.current_time()
            origins = self._access.origins(image, wanted.digest)
            left = [origin for origin in origins if origin.location not in done]
            if flight.patient and self._access.is_streamed(image):
                left = [origin for origin in left if self._access.rests_until(origin) <= now]
            if not left:
                break
            origin = min(left, key=lambda one: self._access.turn(one, peers_until))
            if flight.patient and self._access.rests_until(origin) > now:
                # somebody waits: an origin that should rest for longer is better than none
                again = min(self._access.rests_until(origin), now + self.timeout_s / _TRIES)
                if again >= deadline:
                    break
                await trio.sleep_until(again)
            async with self._access.for_readers(origin):
                failure = await self._access.read(origin, image, [wanted], {wanted.digest: flight})
            if failure is not None:
                reason = f"{origin.location}: {failure}"
                if failure.kind == "absent" or not flight.patient:
                    done.add(origin.location)
        if not flight.arrived and flight.patient and self._access.is_streamed(image):
            reason = await self._await_stream(flight, image, deadline) or reason
        if not flight.arrived:
            raise OriginFailed(
                "chunk-unreachable",
                f"Chunk {wanted.index} of {image.entry.identifier} cannot be fetched ({reason}).",
            )

    async def _await_stream(self, flight: Flight, image: FetchableImage, deadline: float) -> str:
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
        image = await self._images.find(image_id)
        if image is None:
            return []
        return await self._bringing.bring(image, indexes)

    async def probe(self, image_id: str, index: int) -> bool:
        """Tell whether an image comes in single chunks, bringing one if that is not known yet.

        Raises as `bring` does. False: what it has is a stream, or nothing.
        """
        image = await self._images.find(image_id)
        if image is None:
            return False
        if self._access.serves_chunks(image):
            return True
        return bool(await self.bring(image_id, [index])) or not self._access.is_streamed(image)

    async def is_streamed(self, image_id: str) -> bool:
        """Tell whether all of an image's origins have been asked for single chunks in vain."""
        image = await self._images.find(image_id)
        return image is not None and self._access.is_streamed(image)

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
        image = await self._images.find(image_id)
        if image is None or image.gone or image.entry.format != "raw":
            return None
        return self._streams.join(image.entry, image.manifest)

    def is_awaited(self, place: Place) -> bool:
        """Tell whether somebody waits for a chunk, or fetches it; any thread may ask."""
        return self._flights.is_awaited(place)

    def passed(self, place: Place, new_bytes: int) -> None:
        """Let those go on who wait for a chunk that a stream has brought."""
        demand = False
        for key, flight in self._flights.of(place):
            demand |= flight.demand
            flight.arrived = True
            self.traffic.asked(flight.reader, new_bytes)
            self._flights.land(key, flight)
        if new_bytes:
            self.traffic.arrived(place.image_id, new_bytes, demand=demand)

    def expect_reads(self) -> None:
        """Leave the link to a guest that is about to boot."""
        self._quiet.expect_reads()

    async def quiet(self) -> None:
        """Return when guests leave the link to the background; see `Patience`."""
        await self._quiet.wait()

    async def missing(self, image_id: str) -> list[int]:
        """Return the chunks of an image that are not in the store, in order."""
        image = await self._images.find(image_id)
        return (
            []
            if image is None
            else await self._images.missing(image, range(image.manifest.chunk_count))
        )

    async def forget(self, image_id: str) -> None:
        """Let go of an image that is about to go: no chunk arrives on its behalf after this."""
        image = self._images.drop(image_id)
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
