"""The account of space, measured no more often than it is worth: with many disks it takes long."""

import logging
import threading
import time
from dataclasses import replace

from stratocache.cache.configuration import Configuration
from stratocache.fs import space_plan
from stratocache.fs.space_plan import SpaceAccount
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

_PAUSE = 20
"""Measuring takes at most one part in so many of the time of one process."""
_PAUSE_S_MIN = 1.0


class SpaceMeter:
    """The latest account of one appliance; any thread may ask."""

    def __init__(self, configuration: Configuration, db: Database) -> None:
        self._configuration = configuration
        self._db = db
        self._lock = threading.Lock()
        self._latest: SpaceAccount | None = None
        self._good_until_s = 0.0

    def account(self) -> SpaceAccount:
        """Return an account that is as new as it may be; measures when it is time."""
        with self._lock:
            if self._latest is None or time.monotonic() >= self._good_until_s:
                self._measure()
            assert self._latest is not None
            return self._latest

    def recent(self) -> SpaceAccount:
        """Return at once, unless nobody has asked before: an account may be as old as measuring the
        next one takes, the free space in it is of now."""
        latest = self._latest
        if latest is None:
            return self.account()
        if time.monotonic() >= self._good_until_s and self._lock.acquire(blocking=False):
            threading.Thread(target=self._refresh, name="space", daemon=True).start()
        total_bytes, free_bytes = space_plan.file_system(self._configuration.state_dir)
        available_bytes = space_plan.available(self._configuration, free_bytes)
        return replace(
            latest,
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            available_bytes=available_bytes,
            promise_limit_bytes=space_plan.promise_limit(self._configuration, available_bytes),
        )

    def _refresh(self) -> None:
        """Measure, with the lock that somebody took for this thread."""
        try:
            self._measure()
        except Exception:
            log.exception("the space could not be measured")
        finally:
            self._lock.release()

    def _measure(self) -> None:
        started_s = time.monotonic()
        self._latest = space_plan.account(self._configuration, self._db)
        ended_s = time.monotonic()
        self._good_until_s = ended_s + max(_PAUSE_S_MIN, _PAUSE * (ended_s - started_s))
