"""The operation that verifies one image: every chunk as the medium has it, then the whole digest.

What is damaged or missing is fetched again on the way, so an image that was verified needs no
origin any more.
"""

import hashlib
from functools import partial

import trio

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotFound, NotVerified, StratocacheError
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.images import ImageStore
from stratocache.cache.repair import Repairer
from stratocache.fs import inventory
from stratocache.fs.acquisition import Report
from stratocache.fs.image_lookup import rejected
from stratocache.fs.operation_ends import finish
from stratocache.fs.operation_intents import add_operation
from stratocache.fs.provisional import ProvisionalImages
from stratocache.fs.records import COMPLETE, Caller, Operation
from stratocache.fs.rights import require_operator
from stratocache.fs.state import Database

VERIFY = "verify-image"


def request_verification(db: Database, caller: Caller, image_id: str) -> Operation:
    """Ask for an image to be verified; raises `NotFound` (`image-unknown`), `Refused`.

    Asked again while that is under way it answers with the operation that does it.
    """
    require_operator(caller)
    with db.transaction() as connection:
        inventory.image(db, image_id)
        under_way = inventory.open_operations(db, image_id, VERIFY)
        if under_way:
            return under_way[0]
        return add_operation(connection, caller, VERIFY, image_id, {})


class Verification:
    """Performs the operations of kind `verify-image`."""

    def __init__(
        self, db: Database, images: ImageStore, repairer: Repairer, provisional: ProvisionalImages
    ) -> None:
        self._db = db
        self._images = images
        self._repairer = repairer
        self._provisional = provisional
        # Apart from trio's own: hashing must not take the threads that guests' reads need.
        self._limiter = trio.CapacityLimiter(1)

    async def perform(self, operation: Operation, report: Report) -> None:
        """Verify an image, once it is complete; the result counts chunks, damaged and repaired ones.

        Raises `NotVerified` (`image-damaged`, `image-differs`, `image-rejected`), `NotFound`, and why
        an image cannot be completed.
        """
        image = inventory.image(self._db, operation.subject)
        if image.state == "provisional":
            await self._provisional.wait(image.id, report)
            image = inventory.image(self._db, image.id)
        if image.state == "rejected":
            raise rejected(image)
        if image.state not in COMPLETE:
            raise NotFound("image-unknown", f"Image {image.id} is {image.state}; try again.")
        self._repairer.forgive()
        reader = await self._images.open_reader(image.id)
        digest = hashlib.sha256()
        repaired, lost = 0, []
        for index in range(reader.manifest.chunk_count):
            fixed = await self._verify(reader, index)
            if fixed is None:
                lost.append(index)
            else:
                repaired += fixed
                await trio.to_thread.run_sync(
                    partial(self._hash, digest, reader, index), limiter=self._limiter
                )
            report(min((index + 1) * CHUNK_BYTES, reader.size_bytes), reader.size_bytes)
        if lost:
            raise NotVerified(
                "image-damaged",
                f"{len(lost)} chunks of image {image.id} are damaged or missing and no origin has "
                f"them, the first at byte {lost[0] * CHUNK_BYTES}; see `stratocache cache status`.",
            )
        if image.sha256 and digest.hexdigest() != image.sha256:
            raise NotVerified(
                "image-differs",
                f"The chunks of image {image.id} are whole but not what was proven; delete it and "
                "fetch it again.",
            )
        await trio.to_thread.run_sync(self._end, operation, reader, repaired)

    async def _verify(self, reader: ImageReader, index: int) -> int | None:
        """Return how many repairs a chunk took, None when it is lost."""
        stored = reader.chunk(index)
        if stored is None:
            return 0
        try:
            await trio.to_thread.run_sync(
                self._images.chunks.inspect, stored, limiter=self._limiter
            )
            return 0
        except NotVerified:
            pass
        try:
            await self._repairer.supply(reader.name, index, stored)
        except StratocacheError:
            return None
        return 1

    def _hash(self, digest: "hashlib._Hash", reader: ImageReader, index: int) -> None:
        digest.update(reader.read_blocking(index * CHUNK_BYTES, CHUNK_BYTES))

    def _end(self, operation: Operation, reader: ImageReader, repaired: int) -> None:
        result = {"chunks": reader.manifest.chunk_count, "repaired": repaired}
        with self._db.transaction() as connection:
            finish(connection, VERIFY, operation.subject, result, operation.id)
