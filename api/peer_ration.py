"""How much peers get: so many bytes a second and requests at a time, so that guests come first."""

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from stratocache.cache.errors import Unreachable
from stratocache.fs.peer_record import PeerService, add_service
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

_WAIT_MAX_S = 0.5
"""Who would wait longer for its bytes is told to ask elsewhere: its own time-out is near."""
_WRITE_INTERVAL_S = 2.0


class PeerRation:
    """The ration of all peers together. Methods block and may run in any thread."""

    def __init__(self, bytes_per_s: int, parallel: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._turns = threading.BoundedSemaphore(parallel)
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._counts: Counter[str] = Counter()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Be one of few for the time of a block; raises `Unreachable` (`peer-busy`)."""
        if not self._turns.acquire(blocking=False):
            raise self._busy()
        try:
            yield
        finally:
            self._turns.release()

    def send(self, size_bytes: int, *, manifest: bool) -> None:
        """Wait until so many bytes may be sent, and count them; raises `Unreachable`."""
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._free_at)
            wait_s = begin - now
            if wait_s <= _WAIT_MAX_S:
                self._free_at = begin + size_bytes / self._bytes_per_s
        if wait_s > _WAIT_MAX_S:
            raise self._busy()
        time.sleep(wait_s)
        with self._lock:
            self._counts.update(
                {"manifests" if manifest else "chunks": 1, "sent_bytes": size_bytes}
            )

    def missed(self) -> None:
        """Count a request for what is not shared."""
        self._count("absent")

    def refused(self) -> None:
        """Count a request without a token that we know."""
        self._count("refused")

    def _busy(self) -> Unreachable:
        self._count("busy")
        return Unreachable("peer-busy", "This host serves as many peers as it may; ask another.")

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def take_counts(self) -> PeerService | None:
        """Return what was counted since the last call, None when that is nothing."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return PeerService(**counts) if counts else None


def keep_record(db: Database, ration: PeerRation) -> None:
    """Write what was counted into the state database, now and then, for ever."""
    while True:
        time.sleep(_WRITE_INTERVAL_S)
        news = ration.take_counts()
        if news is not None:
            try:
                add_service(db, news)
            except sqlite3.Error:
                log.exception("what peers were given could not be recorded")
