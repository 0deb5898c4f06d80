"""What fetching cost and what the cache saved, in the state database, where the API and people read
it.

Counters are kept in memory and added to their rows now and then: a crash loses a few seconds of
them, never a byte of anything else. What was fetched is written soon; hits alone, which come with
every read, every `_HITS_INTERVAL_S`.
"""

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields, replace

import trio

from stratocache.cache.traffic import ReadCounts, Traffic
from stratocache.fs.pace import Pace
from stratocache.fs.state import Database, now
from stratocache.fs.tallies import add_tally

log = logging.getLogger(__name__)

_INTERVAL_S = 2.0
_HITS_INTERVAL_S = 5.0
HISTORY_INTERVAL_S = 10
"""Length of the periods whose sums are kept …"""
HISTORY_MAX = 60
"""… the latest so many of them, of those in which anything came."""


@dataclass(frozen=True)
class _Row:
    """What is added to an image's or a disk's row."""

    remote_bytes: float = 0
    remote_wait_s: float = 0
    hits: float = 0
    hit_bytes: float = 0
    misses: float = 0
    miss_bytes: float = 0
    peer_bytes: float = 0

    def __sub__(self, other: "_Row") -> "_Row":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return _Row(*(mine - theirs for mine, theirs in pairs))


_NAMES = tuple(field.name for field in fields(_Row))


@dataclass(frozen=True)
class _News:
    """What has grown since the last time."""

    images: dict[str, _Row]
    disks: dict[str, _Row]
    totals: dict[tuple[str, str], float]
    paces: list[tuple[int, float, str]]
    """Bytes that are here, rate, image."""


class TrafficRecord:
    """Adds what is counted to the state database; belongs to one trio loop.

    `reads` are those of `ImageStore`; `clock` gives seconds since the epoch.
    """

    def __init__(
        self,
        db: Database,
        traffic: Traffic,
        reads: Mapping[str, ReadCounts],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._db = db
        self._traffic = traffic
        self._reads = reads
        self._paces: dict[str, Pace] = {}
        self._written_images: dict[str, _Row] = {}
        self._written_disks: dict[str, _Row] = {}
        self._written_totals: dict[tuple[str, str], float] = {}
        self._hits_due_s = 0.0

    def begin(self, connection: sqlite3.Connection, image_id: str, dedup_bytes: int) -> None:
        """Open the account of an image that lands, within the caller's transaction."""
        connection.execute(
            "INSERT INTO image_traffic (image_id, dedup_bytes, updated_at) VALUES (?1, ?2, ?3) "
            "ON CONFLICT (image_id) DO UPDATE SET dedup_bytes = ?2, updated_at = ?3",
            (image_id, dedup_bytes, now()),
        )
        add_tally(connection, "dedup_saved_bytes", dedup_bytes)

    def progress(self, image_id: str, done_bytes: int, total_bytes: int | None) -> None:
        """Take note of how much of an image is here, and of how much there will be."""
        pace = self._paces.get(image_id)
        if pace is None:
            pace = self._paces[image_id] = Pace(trio.current_time(), done_bytes)
        pace.done_bytes, pace.total_bytes = done_bytes, total_bytes

    async def run(self) -> None:
        """Write now and then, as long as it is not cancelled, and once more then."""
        before: tuple[float, float] | None = None
        try:
            while True:
                await trio.sleep(_INTERVAL_S)
                cost = self._traffic.cost()
                if cost != before or self._paces or trio.current_time() >= self._hits_due_s:
                    before = cost
                    await self.write()
        finally:
            with trio.CancelScope(shield=True):
                await self.write()

    async def write(self) -> None:
        """Add what is new to the rows."""
        self._hits_due_s = trio.current_time() + _HITS_INTERVAL_S
        news = self._news()
        if not (news.images or news.disks or news.totals or news.paces):
            return
        try:
            await trio.to_thread.run_sync(self._store, news)
        except sqlite3.Error:
            log.exception("what fetching cost could not be recorded")

    def _news(self) -> _News:
        images = {name: self._image_row(name) for name in {*self._traffic.images, *self._reads}}
        disks = {
            name: _Row(item.remote_bytes, item.wait_s)
            for name, item in self._traffic.readers.items()
        }
        totals: dict[tuple[str, str], float] = {
            (name, ""): sum(getattr(row, name) for row in images.values()) for name in _NAMES
        }
        totals |= {("chunks", key): count for key, count in self._traffic.chunks.items()}
        totals |= {("requests", key): count for key, count in self._traffic.requests.items()}
        grown = {
            key: value - self._written_totals.get(key, 0)
            for key, value in totals.items()
            if value != self._written_totals.get(key, 0)
        }
        self._written_totals.update(totals)
        return _News(
            _grown(images, self._written_images),
            _grown(disks, self._written_disks),
            grown,
            self._measured(),
        )

    def _image_row(self, name: str) -> _Row:
        moved, read = self._traffic.images.get(name), self._reads.get(name)
        cost = (moved.remote_bytes, moved.wait_s) if moved is not None else (0, 0.0)
        luck = (read.hits, read.hit_bytes, read.misses, read.miss_bytes) if read is not None else ()
        row = _Row(*cost, *luck)
        return row if moved is None else replace(row, peer_bytes=moved.peer_bytes)

    def _measured(self) -> list[tuple[int, float, str]]:
        """Return how much of images is here and the rates, of those that change; end the others."""
        found = []
        for name, pace in list(self._paces.items()):
            before = pace.rate_bytes_s
            rate_bytes_s = pace.measure(trio.current_time())
            if pace.ended:
                del self._paces[name]
                rate_bytes_s = 0.0
            if rate_bytes_s or before or pace.ended or pace.fresh:
                found.append((pace.done_bytes, rate_bytes_s, name))
                pace.fresh = False
        return found

    def _store(self, news: _News) -> None:
        with self._db.transaction() as connection:
            for name, row in news.images.items():
                self._add(connection, "image_traffic", name, row)
            for name, row in news.disks.items():
                self._add(connection, "disk_traffic", name, row)
                _add_boot(connection, int(name), row)
            for (name, label), value in news.totals.items():
                add_tally(connection, name, value, label)
            connection.executemany(
                "UPDATE image_traffic SET local_bytes = ?, rate_bytes_s = ? WHERE image_id = ?",
                news.paces,
            )
            connection.execute(
                "DELETE FROM image_traffic WHERE image_id NOT IN (SELECT id FROM images)"
            )
            connection.execute(
                "DELETE FROM disk_traffic WHERE disk_number NOT IN (SELECT number FROM disks)"
            )

    def _add(self, connection: sqlite3.Connection, table: str, name: str, row: _Row) -> None:
        """Add to a row, and to its history; what is no row's any more is nobody's."""
        key, owners = _KEYS[table]
        columns = _NAMES if table == "image_traffic" else _NAMES[:2]
        sums = ", ".join(f"{column} = {column} + excluded.{column}" for column in columns)
        connection.execute(
            f"INSERT INTO {table} ({key}, {', '.join(columns)}, updated_at) "  # nosec B608 # no value in it
            f"SELECT value, {', '.join('?' * len(columns))}, ? FROM ({owners}) WHERE value = ? "
            f"ON CONFLICT ({key}) DO UPDATE SET {sums}, updated_at = excluded.updated_at",
            (*(getattr(row, column) for column in columns), now(), name),
        )
        if row.remote_bytes or row.remote_wait_s:
            found = connection.execute(f"SELECT history FROM {table} WHERE {key} = ?", (name,))  # nosec B608 # no value in it
            for (text,) in found.fetchall():
                connection.execute(
                    f"UPDATE {table} SET history = ? WHERE {key} = ?",  # nosec B608 # no value in it
                    (_extended(text, row, self._clock()), name),
                )


_KEYS = {
    "image_traffic": ("image_id", "SELECT id AS value FROM images"),
    "disk_traffic": ("disk_number", "SELECT number AS value FROM disks"),
}


def _add_boot(connection: sqlite3.Connection, number: int, row: _Row) -> None:
    """Add to what the latest boot of a disk cost; a new attachment begins anew."""
    connection.execute(
        "UPDATE disk_traffic SET boot_epoch = disks.epoch, "
        "boot_remote_bytes = iif(boot_epoch = disks.epoch, boot_remote_bytes, 0) + ?, "
        "boot_remote_wait_s = iif(boot_epoch = disks.epoch, boot_remote_wait_s, 0) + ? "
        "FROM disks WHERE disks.number = disk_number AND disk_number = ?",
        (row.remote_bytes, row.remote_wait_s, number),
    )


def _extended(text: str, row: _Row, at_s: float) -> str:
    """Return a history with what has just come."""
    history: list[list[float]] = json.loads(text)
    period = int(at_s) // HISTORY_INTERVAL_S * HISTORY_INTERVAL_S
    if not history or history[-1][0] != period:
        history.append([period, 0, 0])
    history[-1][1] += row.remote_bytes
    history[-1][2] = round(history[-1][2] + row.remote_wait_s, 3)
    return json.dumps(history[-HISTORY_MAX:], separators=(",", ":"))


def _grown(counted: dict[str, _Row], written: dict[str, _Row]) -> dict[str, _Row]:
    """Return by how much rows have grown, and take note of that."""
    found = {}
    for name, row in counted.items():
        growth = row - written.get(name, _Row())
        if growth != _Row():
            found[name] = growth
            written[name] = row
    return found
