"""When guests leave the link to the background: not while they wait for chunks, nor soon after."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio


@dataclass(frozen=True)
class Patience:
    """How long the background leaves the link to guests."""

    quiet_s: float
    """Without a request of theirs, before it goes on: a boot computes between its reads."""
    expect_s: float
    """After a launch: that guest's first read is still to come."""
    longest_s: float = 300
    """At a time, whatever guests do."""


class Quiet:
    """Knows who waits for chunks, and waits until nobody does. Belongs to one trio loop."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._asking = 0
        self._quiet_at = 0.0

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Count somebody who waits for a chunk during the block."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
            self._quiet_at = max(self._quiet_at, trio.current_time() + self._patience.quiet_s)

    def expect_reads(self) -> None:
        """Leave the link to a guest that is about to boot."""
        self._quiet_at = max(self._quiet_at, trio.current_time() + self._patience.expect_s)

    async def wait(self) -> None:
        """Return when guests leave the link to the background; see `Patience`."""
        with trio.move_on_after(self._patience.longest_s):
            while True:
                if self._asking == 0 and trio.current_time() >= self._quiet_at:
                    return
                pause_s = self._quiet_at - trio.current_time()
                await trio.sleep(self._patience.quiet_s if self._asking else pause_s)
