"""Space that can be made: what does not fit asks for cold images to go before it fails."""

from typing import Protocol

import trio

from stratocache.cache.errors import NoSpace
from stratocache.cache.space import Space


class RoomMaker(Protocol):
    """What makes room in the cache when there is none; belongs to the trio loop."""

    async def make_room(self, size_bytes: int) -> None:
        """Return when so many bytes fit; raise `NoSpace` naming what holds the space."""


class CacheSpace(Space):
    """Space on a file system where somebody may make room."""

    room: RoomMaker | None = None

    async def obtain(self, size_bytes: int) -> None:
        """Return when `size_bytes` fit, after room was made if need be; raises as `require`."""
        try:
            self.require(size_bytes)
        except NoSpace:
            if self.room is None:
                raise
            await self.room.make_room(size_bytes)

    def obtain_blocking(self, size_bytes: int) -> None:
        """Do what `obtain` does, from a thread of trio's."""
        try:
            self.require(size_bytes)
        except NoSpace:
            if self.room is None:
                raise
            trio.from_thread.run(self.room.make_room, size_bytes)
