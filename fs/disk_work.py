"""Long work on the files of disks, which whoever must change them can interrupt."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio


@dataclass
class _Work:
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class DiskWork:
    """At most one piece of long work on each disk; belongs to one trio loop."""

    def __init__(self) -> None:
        self._works: dict[str, _Work] = {}

    async def run(self, uuid: str, work: Callable[[], Awaitable[None]]) -> bool:
        """Do some work when no other is being done on the disk; return False if interrupted."""
        while (other := self._works.get(uuid)) is not None:
            await other.ended.wait()
        mine = self._works[uuid] = _Work()
        try:
            with mine.scope:
                await work()
        finally:
            del self._works[uuid]
            mine.ended.set()
        return not mine.scope.cancelled_caught

    async def interrupt(self, uuid: str) -> None:
        """Stop the work on a disk, and return when it has stopped."""
        work = self._works.get(uuid)
        if work is not None:
            work.scope.cancel()
            await work.ended.wait()
