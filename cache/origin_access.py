"""Asking origins and peers for chunks: whom, how many at a time, and what is kept of the answer."""

import hashlib
from collections.abc import Mapping, Sequence

import trio

from stratocache.cache.chunk_origins import (
    ChunkOrigin,
    RangeOrigin,
    Unavailable,
    Wanted,
    host_of,
)
from stratocache.cache.chunks import ChunkStore
from stratocache.cache.fetchable import FetchableImage
from stratocache.cache.flights import Flight, Flights
from stratocache.cache.growing import GrowingManifest
from stratocache.cache.origin_health import OriginHealth
from stratocache.cache.peers import Peers
from stratocache.cache.space import Space
from stratocache.cache.traffic import Traffic


class _Host:
    """Limits for one server: guests' requests never queue behind those of the background."""

    def __init__(self, parallel: int) -> None:
        self.background = trio.CapacityLimiter(parallel // 2)
        self.demand = trio.CapacityLimiter(parallel - parallel // 2)


class OriginAccess:
    """The way to all origins of all images, at most `parallel` requests to each server at a time.

    Chunks are verified and stored in threads of `limiter`. Belongs to one trio loop.
    """

    def __init__(
        self, chunks: ChunkStore, space: Space, flights: Flights, health: OriginHealth,
        peers: Peers | None, traffic: Traffic, parallel: int, limiter: trio.CapacityLimiter,
    ) -> None:  # fmt: skip
        self._chunks = chunks
        self._space = space
        self._flights = flights
        self._health = health
        self._peers = peers
        self._traffic = traffic
        self._parallel = parallel
        self._limiter = limiter
        self._hosts: dict[str, _Host] = {}

    def origins(self, image: FetchableImage, digest: bytes) -> Sequence[ChunkOrigin]:
        """Return whom to ask for a chunk, in this order as far as they do not rest."""
        if self._peers is None or isinstance(image.manifest, GrowingManifest):
            return image.origins
        first = self._peers.origins(image.entry.identifier, digest)
        last = self._peers.last_resort(image.entry.identifier, digest)
        return [*first, *image.origins, *last]

    def turn(self, origin: ChunkOrigin, peers_until: float) -> tuple[float, bool]:
        """Return what orders origins now: nobody queues for a peer, or asks one for long."""
        now = trio.current_time()
        busy = self.for_readers(origin).available_tokens < 1
        late = origin.of_peer and (busy or now >= peers_until)
        return max(now, self.rests_until(origin)), late

    def rests_until(self, origin: ChunkOrigin) -> float:
        """Return when an origin that has failed is asked again."""
        return self._health.rests_until(origin.location)

    def for_readers(self, origin: ChunkOrigin) -> trio.CapacityLimiter:
        """Return what limits requests that guests wait for."""
        return self._host(origin).demand

    def for_background(self, origin: ChunkOrigin) -> trio.CapacityLimiter:
        """Return what limits requests that nobody waits for."""
        return self._host(origin).background

    def _host(self, origin: ChunkOrigin) -> _Host:
        return self._hosts.setdefault(host_of(origin.location), _Host(self._parallel))

    def serves_chunks(self, image: FetchableImage) -> bool:
        """Tell whether an origin of an image is known to serve single chunks."""
        return any(self._health.serves(origin.location) for origin in image.origins)

    def is_streamed(self, image: FetchableImage) -> bool:
        """Tell whether all of an image's origins have been asked for single chunks in vain."""
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

    async def read(
        self,
        origin: ChunkOrigin,
        image: FetchableImage,
        wanted: list[Wanted],
        flights: Mapping[bytes, Flight],
    ) -> Unavailable | None:
        """Read adjacent chunks from an origin, each for its flight; return why it did not give all."""
        identifier = image.entry.identifier

        async def deliver(item: Wanted, data: bytes) -> None:
            if image.gone:
                raise Unavailable("the image is being deleted", "absent")
            await trio.to_thread.run_sync(self._store, item, data, limiter=self._limiter)
            flight = flights[item.digest]
            flight.arrived = True
            self._traffic.arrived(identifier, item.size_bytes, demand=flight.demand)
            self._traffic.asked(flight.reader, item.size_bytes)
            self._flights.land(item.digest, flight)

        def moved(count: int) -> None:
            self._traffic.moved(identifier, count, by_peer=origin.of_peer)

        image.reads += 1
        try:
            await origin.read(wanted, deliver, moved)
        except Unavailable as error:
            if not image.gone:  # that is no fault of the origin
                self._traffic.requested(error.kind)
                if not (origin.of_peer and error.kind == "absent"):
                    self._health.failed(origin.location, error)
            return error
        finally:
            image.reads -= 1
            if not image.reads:
                image.idle.set()
                image.idle = trio.Event()
        self._traffic.requested("ok")
        self._health.succeeded(origin.location)
        return None

    def _store(self, item: Wanted, data: bytes) -> None:
        """Verify and keep a chunk; runs in a thread."""
        if len(data) != item.size_bytes or hashlib.sha256(data).digest() != item.digest:
            raise Unavailable(f"it serves a wrong chunk {item.index}", "wrong")
        self._space.require(len(data))
        self._chunks.put(item.digest, data)
