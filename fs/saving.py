"""Saving: what a disk was at a snapshot becomes an image of this host's cache.

The image's chunks are the snapshot's, so that only what has changed since its base takes space; the
content is read once for its digests. Nobody has signed the image: it can be used on this host, and
its metadata is returned, ready to be signed and published.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import trio

from stratocache.cache import publication
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.entry import LOCAL_CATALOGUE, Endorser, Entry
from stratocache.cache.errors import Cancelled, Conflict
from stratocache.cache.identifier import encode
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.images import ImageStore
from stratocache.cache.ingestion import Step, chunks_of_sparse_file, ingest
from stratocache.cache.manifest import Manifest
from stratocache.cache.publication import Description, Measurement
from stratocache.fs import inventory
from stratocache.fs.acquisition import Report
from stratocache.fs.disks import DiskStore
from stratocache.fs.operation_ends import finish
from stratocache.fs.records import COMPLETE, Image, Operation, SaveRequest, Snapshot
from stratocache.fs.state import Database, now, record_event

log = logging.getLogger(__name__)

_POLL_S = 0.1
_ALGORITHMS = ("sha1", "sha256", "sha512")


@dataclass(frozen=True, slots=True)
class _Saved:
    manifest: Manifest
    measurement: Measurement

    @property
    def identifier(self) -> str:
        return encode(self.measurement.digests["sha1"])


class Saving:
    """Performs the operations of kind `save`."""

    def __init__(self, db: Database, images: ImageStore, disks: DiskStore) -> None:
        self._db = db
        self._images = images
        self._disks = disks
        # Apart from trio's own: hashing must not take the threads that guests' reads need.
        self._limiter = trio.CapacityLimiter(len(_ALGORITHMS) + 2)

    async def perform(self, operation: Operation, report: Report) -> None:
        """Save a disk; the result has the image's id and its unsigned metadata.

        Raises `Cancelled`, `Conflict` (`image-busy`, `image-differs`), `NoSpace`, `InvalidInput`
        (`metadata-invalid`) and what reading the snapshot raises.
        """
        request = SaveRequest(**operation.request)
        snapshot = await self._available(request.snapshot or "")
        if snapshot.form == "file":
            await self._save_file(operation, snapshot, request, report)
            return
        reader = await self._images.open_reader(snapshot.id)
        measurement = await self._measure(
            _chunks_of_reader(reader), (), snapshot.size_bytes, report
        )
        await self._publish(operation, request, _Saved(reader.manifest, measurement))

    async def _available(self, snapshot_id: str) -> Snapshot:
        while True:
            snapshot = inventory.find_snapshot(self._db, snapshot_id)
            if snapshot is None or snapshot.state == "deleting":
                raise Cancelled("snapshot-deleted", f"Snapshot {snapshot_id} has been deleted.")
            if snapshot.state == "available":
                return snapshot
            await trio.sleep(_POLL_S)

    async def _save_file(
        self, operation: Operation, snapshot: Snapshot, request: SaveRequest, report: Report
    ) -> None:
        path = self._disks.raw_snapshot_path(snapshot.disk_uuid, snapshot.id)
        draft = self._images.begin()
        try:
            measurement = await self._measure(
                chunks_of_sparse_file(path),
                [draft.record, draft.store],
                snapshot.size_bytes,
                report,
            )
            await self._publish(operation, request, _Saved(draft.manifest(), measurement))
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._images.abandon, draft)
            raise
        self._images.finish(draft)

    async def _measure(
        self, chunks: Iterator[bytes], sink: Sequence[Step], total_bytes: int, report: Report
    ) -> Measurement:
        size_bytes, digests = await ingest(
            chunks, sink, _ALGORITHMS, limiter=self._limiter,
            progress=lambda done_bytes: report(done_bytes, total_bytes),
        )  # fmt: skip
        return Measurement(size_bytes, digests)

    async def _publish(self, operation: Operation, request: SaveRequest, saved: _Saved) -> None:
        metadata = publication.build_metadata(
            saved.measurement, _description(request), created=publication.now()
        )
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(
                self._record, operation, request, saved, metadata.decode()
            )

    def _record(
        self, operation: Operation, request: SaveRequest, saved: _Saved, metadata: str
    ) -> None:
        identifier, sha256 = saved.identifier, saved.measurement.digests["sha256"]
        # in one transaction: no fetch of the same image can begin or end meanwhile
        with self._db.transaction() as connection:
            there = inventory.find_image(self._db, identifier)
            if there is None:
                self._images.publish(identifier, saved.manifest)
                entry = _entry(saved, request, operation.owner)
                connection.execute(
                    "INSERT INTO images (id, state, size_bytes, sha256, entry, created_at, "
                    "verified_at) VALUES (?, 'verified', ?, ?, ?, ?, ?)",
                    (identifier, saved.manifest.size_bytes, sha256, entry.model_dump_json(), now(),
                     now()),
                )  # fmt: skip
                record_event(
                    connection, "image.saved", identifier,
                    f"Disk {operation.subject} was saved as image {identifier}.",
                )  # fmt: skip
            else:
                _require_same(there, sha256)
            result = {"image": identifier, "sha256": sha256, "metadata": metadata}
            finish(connection, "save", operation.subject, result, operation.id)


def _require_same(image: Image, sha256: str) -> None:
    if image.state not in COMPLETE:
        raise Conflict("image-busy", f"Image {image.id} is {image.state}; try again.")
    if image.sha256 != sha256:
        raise Conflict(
            "image-differs",
            f"The cache has an image {image.id} of other content; the identifiers of the two "
            "collide, so one of them is forged.",
        )


def _entry(saved: _Saved, request: SaveRequest, owner: str) -> Entry:
    return Entry(
        catalogue=LOCAL_CATALOGUE,
        identifier=saved.identifier,
        size_bytes=saved.measurement.size_bytes,
        digests=saved.measurement.digests,
        locations=(),
        endorser=Endorser(email=owner, subject="", issuer=""),
        endorsed_at=publication.now(),
        trust="unsigned",
        kind=request.kind,
        title=request.title,
        description=request.comment,
        os=request.os,
        os_version=request.os_version,
        os_arch=request.os_arch,
        version=request.version,
    )


def _description(request: SaveRequest) -> Description:
    return Description(
        kind=request.kind,
        author=request.author,
        publisher=request.publisher,
        os=request.os,
        os_version=request.os_version,
        os_arch=request.os_arch,
        version=request.version,
        title=request.title,
        comment=request.comment,
        valid_days=request.valid_days,
    )


def _chunks_of_reader(reader: ImageReader) -> Iterator[bytes]:
    for offset in range(0, reader.size_bytes, CHUNK_BYTES):
        yield reader.read_blocking(offset, CHUNK_BYTES)
