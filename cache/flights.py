"""Chunks on their way: however many wait for one, it is asked for once.

A flight goes by its chunk's digest, or by the chunk's place while the digest is not known yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from stratocache.cache.streaming import Place


@dataclass
class Flight:
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


class Flights:
    """The flights of all images. Belongs to one trio loop, but for `is_awaited`."""

    def __init__(self) -> None:
        self._flights: dict[bytes, Flight] = {}

    def get(self, key: bytes) -> Flight | None:
        """Return the flight of a chunk, if it is on its way."""
        return self._flights.get(key)

    def begin(self, key: bytes, flight: Flight) -> None:
        """Let others find a flight from now on; there must be none."""
        assert key not in self._flights
        self._flights[key] = flight

    def land(self, key: bytes, flight: Flight) -> None:
        """Let those go on who wait for a flight; one that has landed stays so."""
        if self._flights.get(key) is flight:
            del self._flights[key]
        flight.landed.set()

    def of(self, place: Place) -> Iterator[tuple[bytes, Flight]]:
        """Yield the flights of a chunk that came by itself, with their keys."""
        for key in _keys(place):
            flight = self._flights.get(key)
            if flight is not None:
                yield key, flight

    def is_awaited(self, place: Place) -> bool:
        """Tell whether a chunk is on its way; any thread may ask."""
        return any(key in self._flights for key in _keys(place))


def place_key(image_id: str, index: int) -> bytes:
    """Return what a flight goes by while the digest of its chunk is not known."""
    return f"{image_id}/{index}".encode()


def _keys(place: Place) -> tuple[bytes, bytes]:
    return place.digest, place_key(place.image_id, place.index)
