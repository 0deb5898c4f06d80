"""Bringing chunks that nobody waits for yet: adjacent ones by few requests, what is on its way already
by none."""

import logging
from collections.abc import Iterator, Sequence

import trio

from stratocache.cache.chunk_origins import ChunkOrigin
from stratocache.cache.errors import StratocacheError
from stratocache.cache.fetchable import FetchableImage, FetchableImages
from stratocache.cache.flights import Flight, Flights
from stratocache.cache.origin_access import OriginAccess
from stratocache.cache.room import CacheSpace

log = logging.getLogger(__name__)


class Bringing:
    """Brings chunks in the background, after `room` was made for them. Belongs to one trio loop."""

    def __init__(
        self, images: FetchableImages, access: OriginAccess, flights: Flights, room: CacheSpace
    ) -> None:
        self._images = images
        self._access = access
        self._flights = flights
        self._room = room
        self._room_limiter = trio.CapacityLimiter(1)

    async def bring(self, image: FetchableImage, indexes: Sequence[int]) -> list[int]:
        """Bring adjacent chunks; return those that are in the store now. See `ChunkFetcher.bring`."""
        missing = await self._images.missing(image, indexes)
        if missing:
            await trio.to_thread.run_sync(
                self._room.obtain_blocking, sum(map(image.manifest.chunk_bytes, missing)),
                limiter=self._room_limiter,
            )  # fmt: skip
        origins = self._access.origins(image, image.manifest.digest(missing[0])) if missing else []
        for origin in origins:
            if not missing:
                break
            for run in _runs(missing, origin.run_max):
                if self._access.rests_until(origin) <= trio.current_time():
                    async with self._access.for_background(origin):
                        await self._bring_run(origin, image, run)
            missing = await self._images.missing(image, missing)
        left = set(missing)
        return [index for index in indexes if index not in left]

    async def bring_ahead(self, image: FetchableImage, indexes: range) -> None:
        """Bring what a reader is about to want; when that fails it asks for itself."""
        try:
            await self.bring(image, indexes)
        except (StratocacheError, OSError) as error:
            log.info("nothing is read ahead of %s: %s", image.entry.identifier, error)

    async def _bring_run(self, origin: ChunkOrigin, image: FetchableImage, run: list[int]) -> None:
        mine: dict[bytes, Flight] = {}
        others: list[Flight] = []
        for index in run:
            digest = image.manifest.digest(index)
            flight = self._flights.get(digest)
            if flight is None:
                mine[digest] = Flight()
                self._flights.begin(digest, mine[digest])
            elif digest not in mine:
                others.append(flight)
        try:
            # what came meanwhile is not asked for again
            still = await self._images.missing(
                image, [i for i in run if image.manifest.digest(i) in mine]
            )
            for part in _runs(_distinct(image, still), origin.run_max):
                wanted = [image.wanted(index) for index in part]
                if await self._access.read(origin, image, wanted, mine) is not None:
                    break
        finally:
            for digest, flight in mine.items():
                self._flights.land(digest, flight)
        for flight in others:
            await flight.landed.wait()


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


def _distinct(image: FetchableImage, indexes: Sequence[int]) -> list[int]:
    """Leave out all but the first of chunks that are the same."""
    first: dict[bytes, int] = {}
    for index in indexes:
        first.setdefault(image.manifest.digest(index), index)
    return sorted(first.values())
