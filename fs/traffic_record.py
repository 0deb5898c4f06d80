"""What fetching cost, in the state database, where the API and people read it.

Counters are kept in memory and added to their rows now and then: a crash loses a few seconds of
them, never a byte of anything else.
"""

import logging
import sqlite3
from dataclasses import dataclass

import trio

from stratocache.cache.traffic import Traffic
from stratocache.fs.state import Database, now

log = logging.getLogger(__name__)

_INTERVAL_S = 2.0
_RATE_WEIGHT = 0.3
"""Of the newest interval in the moving mean of the rate."""


@dataclass
class _Pace:
    """How an image fills."""

    done_bytes: int = 0
    noted_bytes: int = 0
    noted_at: float = 0.0
    rate_bytes_s: float = 0.0
    changed: bool = False


class TrafficRecord:
    """Adds what `traffic` counts to the state database; belongs to one trio loop."""

    def __init__(self, db: Database, traffic: Traffic) -> None:
        self._db = db
        self._traffic = traffic
        self._paces: dict[str, _Pace] = {}
        self._written_images: dict[str, tuple[int, float]] = {}
        self._written_disks: dict[str, tuple[int, float]] = {}

    def begin(self, connection: sqlite3.Connection, image_id: str, dedup_bytes: int) -> None:
        """Open the account of an image that lands, within the caller's transaction."""
        connection.execute(
            "INSERT INTO image_traffic (image_id, dedup_bytes, updated_at) VALUES (?1, ?2, ?3) "
            "ON CONFLICT (image_id) DO UPDATE SET dedup_bytes = ?2, updated_at = ?3",
            (image_id, dedup_bytes, now()),
        )

    def progress(self, image_id: str, done_bytes: int) -> None:
        """Take note of how much of an image is here."""
        pace = self._paces.get(image_id)
        if pace is None:
            pace = self._paces[image_id] = _Pace(noted_bytes=done_bytes)
            pace.noted_at = trio.current_time()
        pace.done_bytes = done_bytes
        pace.changed = True

    async def run(self) -> None:
        """Write now and then, as long as it is not cancelled, and once more then."""
        try:
            while True:
                await trio.sleep(_INTERVAL_S)
                await self.write()
        finally:
            with trio.CancelScope(shield=True):
                await self.write()

    async def write(self) -> None:
        """Add what is new to the rows."""
        images, disks, paces = self._news()
        if not (images or disks or paces):
            return
        try:
            await trio.to_thread.run_sync(self._store, images, disks, paces)
        except sqlite3.Error:
            log.exception("what fetching cost could not be recorded")

    def _news(
        self,
    ) -> tuple[
        list[tuple[str, int, float]], list[tuple[str, int, float]], list[tuple[str, int, float]]
    ]:
        images = _differences(
            {name: (item.remote_bytes, item.wait_s) for name, item in self._traffic.images.items()},
            self._written_images,
        )
        disks = _differences(
            {
                name: (item.remote_bytes, item.wait_s)
                for name, item in self._traffic.readers.items()
            },
            self._written_disks,
        )
        paces = []
        for image_id, pace in self._paces.items():
            if pace.changed:
                _measure(pace)
                paces.append((image_id, pace.done_bytes, pace.rate_bytes_s))
        return images, disks, paces

    def _store(
        self,
        images: list[tuple[str, int, float]],
        disks: list[tuple[str, int, float]],
        paces: list[tuple[str, int, float]],
    ) -> None:
        with self._db.transaction() as connection:
            for name, remote_bytes, wait_s in images:
                connection.execute(
                    "INSERT INTO image_traffic (image_id, remote_bytes, remote_wait_s, updated_at) "
                    "SELECT ?1, ?2, ?3, ?4 WHERE EXISTS (SELECT 1 FROM images WHERE id = ?1) "
                    "ON CONFLICT (image_id) DO UPDATE SET remote_bytes = remote_bytes + ?2, "
                    "remote_wait_s = remote_wait_s + ?3, updated_at = ?4",
                    (name, remote_bytes, wait_s, now()),
                )
            for name, remote_bytes, wait_s in disks:
                connection.execute(
                    "INSERT INTO disk_traffic (disk_number, remote_bytes, remote_wait_s, updated_at) "
                    "SELECT ?1, ?2, ?3, ?4 WHERE EXISTS (SELECT 1 FROM disks WHERE number = ?1) "
                    "ON CONFLICT (disk_number) DO UPDATE SET remote_bytes = remote_bytes + ?2, "
                    "remote_wait_s = remote_wait_s + ?3, updated_at = ?4",
                    (int(name), remote_bytes, wait_s, now()),
                )
            for name, local_bytes, rate_bytes_s in paces:
                connection.execute(
                    "UPDATE image_traffic SET local_bytes = ?, rate_bytes_s = ?, updated_at = ? "
                    "WHERE image_id = ?",
                    (local_bytes, rate_bytes_s, now(), name),
                )
            connection.execute(
                "DELETE FROM image_traffic WHERE image_id NOT IN (SELECT id FROM images)"
            )
            connection.execute(
                "DELETE FROM disk_traffic WHERE disk_number NOT IN (SELECT number FROM disks)"
            )


def _differences(
    counted: dict[str, tuple[int, float]], written: dict[str, tuple[int, float]]
) -> list[tuple[str, int, float]]:
    """Return by how much counters have grown, and take note of that."""
    found = []
    for name, (count, seconds) in counted.items():
        old_count, old_seconds = written.get(name, (0, 0.0))
        if (count, seconds) != (old_count, old_seconds):
            found.append((name, count - old_count, seconds - old_seconds))
            written[name] = (count, seconds)
    return found


def _measure(pace: _Pace) -> None:
    at = trio.current_time()
    elapsed_s = at - pace.noted_at
    if elapsed_s > 0:
        rate = (pace.done_bytes - pace.noted_bytes) / elapsed_s
        weight = _RATE_WEIGHT if pace.rate_bytes_s else 1.0
        pace.rate_bytes_s += weight * (rate - pace.rate_bytes_s)
    pace.noted_at, pace.noted_bytes, pace.changed = at, pace.done_bytes, False
