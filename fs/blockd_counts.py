"""What `blockd` counts for /metrics: I/O of overlays, passes of the reconciler, work on chunks."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from stratocache.cache.chunks import ChunkStore
from stratocache.fs.counts import WRITE_INTERVAL_S, Counts
from stratocache.fs.disk_io import DISK_COUNTERS, DiskIo
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

_ATTACHED = "SELECT number FROM disks WHERE uuid IN (SELECT disk_uuid FROM attachments)"


class BlockdCounts:
    """Keeps the counts of this process; belongs to one trio loop. Opening reads a small file."""

    def __init__(self, directory: Path, db: Database, chunks: ChunkStore, io: DiskIo) -> None:
        with suppress(OSError):  # then nothing is written, and everything else goes on
            directory.mkdir(mode=0o700, exist_ok=True)
        self._counts = Counts(directory, "blockd")
        self._db = db
        self._chunks = chunks
        self._io = io

    @contextmanager
    def reconciling(self) -> Iterator[None]:
        """Count the block as one pass of the reconciler, by its duration."""
        started = trio.current_time()
        yield
        self._counts.observe(trio.current_time() - started, "reconcile_duration")

    async def run(self) -> None:
        """Write now and then, as long as it is not cancelled, and once more then."""
        try:
            while True:
                await trio.sleep(WRITE_INTERVAL_S)
                await self._write()
        finally:
            with trio.CancelScope(shield=True):
                await self._write()

    async def _write(self) -> None:
        self._counts.take_in(self._io.drain())
        try:
            await trio.to_thread.run_sync(self._add_up)
        except sqlite3.Error:
            log.exception("what blockd counts is written later")

    def _add_up(self) -> None:
        """Bring the file up to date; disks that nobody has attached go, so that it stays small."""
        seen = self._chunks.statistics()
        self._counts.follow(seen.verified, "chunk_verifications")
        self._counts.follow(seen.quarantined, "chunks_quarantined")
        self._counts.follow(seen.inspected_bytes, "scrub_read_bytes")
        attached = {str(row["number"]) for row in self._db.rows(_ATTACHED)}
        self._counts.keep_labels(DISK_COUNTERS, attached)
        self._counts.write()
