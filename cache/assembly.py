"""Assembly: from the bytes of a source to a published image, all of it proven on the way."""

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import BinaryIO

import trio

from stratocache.cache import conversion
from stratocache.cache.decompression import decompressed
from stratocache.cache.draft import Draft, NamedChunk
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotVerified
from stratocache.cache.images import ImageStore
from stratocache.cache.ingestion import Batch, Step, chunks_of, chunks_of_sparse_file, ingest
from stratocache.cache.manifest import Manifest
from stratocache.cache.promises import (
    FetchedImage,
    algorithms_of,
    broken_digest,
    overlong,
    wrong_size,
)
from stratocache.cache.room import CacheSpace
from stratocache.cache.space import full_disk_is_no_space
from stratocache.cache.stage import Stage

Progress = Callable[[int], None]
"""Called with the bytes of the source that have been taken."""


class Assembly:
    """Makes images. `space` is asked for what is on the stage; for chunks each call names one."""

    def __init__(self, images: ImageStore, space: CacheSpace, image_bytes_max: int) -> None:
        self._images = images
        self._space = space
        self._image_bytes_max = image_bytes_max
        # Apart from trio's own limiter: hashing must not take the threads that guests' reads need.
        self._limiter = trio.CapacityLimiter(2 * (os.cpu_count() or 1) + 2)

    async def make(
        self, source: BinaryIO, entry: Entry, stage: Stage, progress: Progress, *,
        space: CacheSpace, there: Manifest | None,
    ) -> FetchedImage:  # fmt: skip
        """Verify the source, cut the image into chunks, publish it, remove the stage.

        One that is `there` already must be the same. Raises what `Fetcher.fetch` says.
        """
        async with self._drafted(entry, there) as draft:
            make = self._from_raw if entry.format == "raw" else self._from_qcow2
            sha256 = await make(source, entry, stage, self._stored(draft, space), progress)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(stage.remove)
        return FetchedImage(entry.identifier, draft.size_bytes, sha256)

    async def make_of_chunks(
        self, chunks: Iterator[bytes], entry: Entry, progress: Progress, *,
        space: CacheSpace, there: Manifest | None,
    ) -> FetchedImage:  # fmt: skip
        """Prove and publish an image whose raw bytes come chunk by chunk; as `make` otherwise."""
        async with self._drafted(entry, there) as draft:
            sink = self._stored(draft, space)
            digests = await self._proven(chunks, entry, sink, progress)
        return FetchedImage(entry.identifier, entry.size_bytes, digests["sha256"])

    @asynccontextmanager
    async def _drafted(self, entry: Entry, there: Manifest | None) -> AsyncIterator[Draft]:
        """Yield a draft, which is published when the block ends well and abandoned when not."""
        draft = self._images.begin()
        try:
            yield draft
            manifest = draft.manifest()
            if there is not None and there != manifest:
                raise _other_image(entry)
            await trio.to_thread.run_sync(self._images.publish, entry.identifier, manifest)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._images.abandon, draft)
            raise
        self._images.finish(draft)

    async def _from_raw(
        self,
        source: BinaryIO,
        entry: Entry,
        _stage: Stage,
        sink: Sequence[Step],
        progress: Progress,
    ) -> str:
        digests = await self._verified(source, entry, sink, progress)
        return digests["sha256"]

    async def _from_qcow2(
        self, source: BinaryIO, entry: Entry, stage: Stage, sink: Sequence[Step], progress: Progress
    ) -> str:
        # Always a copy: what was hashed must be what is converted.
        with (
            full_disk_is_no_space(stage.directory),
            await trio.to_thread.run_sync(stage.container.open, "wb") as container,
        ):

            def copy(batch: Batch) -> None:
                self._space.obtain_blocking(sum(map(len, batch)))
                container.writelines(batch)

            await self._verified(source, entry, [copy], progress)
        size_bytes = await conversion.inspect(
            stage.container, image_bytes_max=self._image_bytes_max
        )
        await conversion.convert(
            stage.container, stage.image, size_bytes=size_bytes, space=self._space
        )
        _, digests = await ingest(
            chunks_of_sparse_file(stage.image), sink, ["sha256"], limiter=self._limiter,
            progress=no_progress,
        )  # fmt: skip
        return digests["sha256"]

    async def _verified(
        self, source: BinaryIO, entry: Entry, sink: Sequence[Step], progress: Progress
    ) -> dict[str, str]:
        """Give the decompressed source to `sink`; return its digests once all are as promised."""
        chunks = chunks_of(
            decompressed(source, entry.compression), entry.size_bytes, overlong=overlong(entry)
        )
        return await self._proven(chunks, entry, sink, progress)

    async def _proven(
        self, chunks: Iterator[bytes], entry: Entry, sink: Sequence[Step], progress: Progress
    ) -> dict[str, str]:
        """Give all chunks to `sink`; return their digests once all are as promised."""
        size_bytes, digests = await ingest(
            chunks, sink, algorithms_of(entry.digests), limiter=self._limiter, progress=progress
        )
        if size_bytes != entry.size_bytes:
            raise wrong_size(f"{size_bytes}", entry)
        broken = broken_digest(entry.digests, digests)
        if broken is not None:
            algorithm, promised = broken
            raise NotVerified(
                "digest-mismatch",
                f"The {algorithm} of what was fetched is {digests[algorithm]}, the entry "
                f"promises {promised}; the location serves another file.",
            )
        return digests

    def _stored(self, draft: Draft, space: CacheSpace) -> list[Step]:
        """Return the steps that store chunks; room is asked for when it is used, not before."""

        def store(named: list[NamedChunk]) -> None:
            space.obtain_blocking(sum(len(chunk) for _, chunk in named))
            draft.store(named)

        return [draft.record, store]


def no_progress(_: int) -> None:
    """Count nothing: the source has been counted already."""


def _other_image(entry: Entry) -> NotVerified:
    return NotVerified(
        "image-differs",
        f"What was fetched again as {entry.identifier} is another image than the one that is here.",
    )
