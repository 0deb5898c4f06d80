"""Absorbing: a frozen layer becomes a manifest of the chunk store, while the disk is in use.

A snapshot without reflinks is taken in two steps. *Freezing* (`stratocache.fs.disk_changes`) puts
an empty layer on top, in milliseconds. *Absorbing*, here and in the background, stores the chunks
that the frozen layer touches, publishes the manifest under the snapshot's id, and makes it the
base of the disk; then the frozen layer is gone. However many snapshots a disk has, it has one
layer and one base. What is interrupted begins again; until the last step the disk is as before.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import trio

from stratocache.cache.chunks import CHUNK_BYTES, DIGEST_BYTES, zero_digest
from stratocache.cache.draft import Draft
from stratocache.cache.errors import StratocacheError
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.fs import inventory, records
from stratocache.fs.blocks import Blocks
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.manifests import Manifests
from stratocache.fs.records import Disk, Snapshot
from stratocache.fs.stack import FrozenLayer
from stratocache.fs.state import Database, record_event

log = logging.getLogger(__name__)

_RETRY_S = 5.0
_BATCH_CHUNKS = 16
_ABSORBING = """
    SELECT snapshots.* FROM snapshots JOIN disks ON disks.uuid = disk_uuid
    WHERE snapshots.state = 'absorbing' AND disks.state = 'available'
"""


class Snapshots:
    """Keeps one task in `nursery` for each snapshot that is to be absorbed."""

    def __init__(
        self,
        db: Database,
        images: ImageStore,
        disks: DiskStore,
        blocks: Blocks,
        work: DiskWork,
        nursery: trio.Nursery,
        wake: Callable[[], None],
    ) -> None:
        self._db = db
        self._images = images
        self._disks = disks
        self._blocks = blocks
        self._work = work
        self._manifests = Manifests(db, images, disks)
        self._nursery = nursery
        self._wake = wake
        self._running: set[str] = set()
        # Apart from trio's own: absorbing must not take the threads that guests' reads need.
        self._limiter = trio.CapacityLimiter(1)

    def look(self) -> None:
        """Start absorbing what is to be absorbed."""
        for row in self._db.rows(_ABSORBING):
            snapshot = records.snapshot_from(row)
            if snapshot.id not in self._running:
                self._running.add(snapshot.id)
                self._nursery.start_soon(self._run, snapshot)

    async def _run(self, snapshot: Snapshot) -> None:
        failure: Exception | None = None
        try:
            await self._work.run(snapshot.disk_uuid, partial(self._absorb, snapshot))
        except (StratocacheError, OSError) as error:
            failure = error
        except Exception as bug:
            log.exception("absorbing snapshot %s failed", snapshot.id)
            failure = bug
        if failure is not None:
            await trio.to_thread.run_sync(self._record_wait, snapshot, failure)
            await trio.sleep(_RETRY_S)
        self._running.discard(snapshot.id)
        self._wake()

    async def _absorb(self, snapshot: Snapshot) -> None:
        disk = inventory.find_disk(self._db, snapshot.disk_uuid)
        if disk is None or disk.state != "available":
            return
        overlay = await self._blocks.open_overlay(disk.number)
        if overlay.frozen is not None:
            await self._publish(snapshot, disk, overlay.frozen)
            reader = await self._images.open_reader(snapshot.id)
            await overlay.rebase(reader, snapshot.id)
        # else a process that died had come as far as this
        await trio.to_thread.run_sync(self._record, snapshot, disk)

    async def _publish(self, snapshot: Snapshot, disk: Disk, frozen: FrozenLayer) -> None:
        draft = self._images.begin()
        try:
            digests = await self._store(draft, disk, frozen)
            manifest = Manifest(frozen.size_bytes, digests)
            await trio.to_thread.run_sync(self._images.publish, snapshot.id, manifest)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._images.abandon, draft)
            raise
        self._images.finish(draft)

    async def _store(self, draft: Draft, disk: Disk, frozen: FrozenLayer) -> bytes:
        """Store the chunks that are not the base's; return the digests of all."""
        digests = await trio.to_thread.run_sync(
            self._base_digests, disk.base_manifest, frozen.size_bytes
        )
        remaining = frozen.chunks()
        stored: list[int] = []
        while batch := await trio.to_thread.run_sync(
            _store_batch, draft, frozen, remaining, limiter=self._limiter
        ):
            stored += batch
        changed = draft.manifest()
        for place, index in enumerate(stored):
            start = index * DIGEST_BYTES
            digests[start : start + DIGEST_BYTES] = changed.digest(place)
        return bytes(digests)

    def _base_digests(self, base: str | None, size_bytes: int) -> bytearray:
        """Return the digests that a snapshot has where its layer is empty."""
        digests = bytearray() if base is None else bytearray(self._images.manifest(base).digests)
        count = -(-size_bytes // CHUNK_BYTES)
        del digests[count * DIGEST_BYTES :]
        digests += zero_digest(CHUNK_BYTES) * (count - len(digests) // DIGEST_BYTES)
        last_bytes = size_bytes - (count - 1) * CHUNK_BYTES
        if digests[-DIGEST_BYTES:] == zero_digest(CHUNK_BYTES):
            digests[-DIGEST_BYTES:] = zero_digest(last_bytes)
        return digests

    def _record(self, snapshot: Snapshot, disk: Disk) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE snapshots SET state = 'available' WHERE id = ? AND state = 'absorbing'",
                (snapshot.id,),
            )
            connection.execute(
                "UPDATE disks SET base_manifest = ? WHERE uuid = ?", (snapshot.id, disk.uuid)
            )
            record_event(
                connection, "snapshot.available", snapshot.id,
                f"Snapshot {snapshot.id} of disk {disk.uuid} can be cloned and rolled back to.",
            )  # fmt: skip
        self._manifests.collect(disk.base_manifest)

    def _record_wait(self, snapshot: Snapshot, failure: Exception) -> None:
        log.error("absorbing snapshot %s waits: %s", snapshot.id, failure)
        known = self._db.row(
            "SELECT 1 FROM events WHERE kind = 'snapshot.waits' AND subject = ? LIMIT 1",
            snapshot.id,
        )
        if known is None:
            with self._db.transaction() as connection:
                record_event(
                    connection, "snapshot.waits", snapshot.id,
                    f"Snapshot {snapshot.id} is not absorbed yet and is tried again: {failure}",
                )  # fmt: skip


def _store_batch(draft: Draft, frozen: FrozenLayer, remaining: Iterator[int]) -> list[int]:
    """Add the next chunks of a frozen layer to the draft; return their indexes, none at the end."""
    indexes = list(islice(remaining, _BATCH_CHUNKS))
    draft.add([frozen.read_chunk(index) for index in indexes])
    return indexes
