"""What a write does on a full file system: wait, for the guest would rather wait than fail."""

import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

log = logging.getLogger(__name__)

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_RETRY_S = 1.0


class SpaceWait:
    """The waiting of one disk for space.

    `on_full` is called, and the log says so, when a disk begins to wait, not for each write.
    """

    def __init__(self, directory: Path, limit_s: float, on_full: Callable[[], None]) -> None:
        self._directory = directory
        self._limit_s = limit_s
        self._on_full = on_full
        self._waiting = 0

    async def when_there_is(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Do what may need space, once a second until there is some or the limit is over.

        Raises what `attempt` raises; `OSError` ENOSPC or EDQUOT only after the limit.
        """
        deadline = trio.current_time() + self._limit_s
        waiting = False
        try:
            while True:
                try:
                    await attempt()
                    return
                except OSError as error:
                    if error.errno not in FULL or trio.current_time() >= deadline:
                        raise
                if not waiting:
                    waiting = True
                    self._begin()
                await trio.sleep(min(_RETRY_S, max(0.0, deadline - trio.current_time())))
        finally:
            self._waiting -= waiting

    def _begin(self) -> None:
        self._waiting += 1
        if self._waiting == 1:
            log.error(
                "%s waits for space: the file system is full; free some within %g s",
                self._directory,
                self._limit_s,
            )
            self._on_full()
