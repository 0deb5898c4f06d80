"""Completion: brings the rest of an image whose chunks are proven one by one, then proves the whole.

First the boot set, in the order in which a boot read it; then everything else, in order, whenever
no guest waits. What only comes as a stream comes in its order. See DEMAND.md.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence

import trio

from stratocache.cache.assembly import no_progress
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotVerified, OriginFailed, StratocacheError
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.images import ImageStore
from stratocache.cache.ingestion import ingest
from stratocache.cache.origin import Backoff
from stratocache.cache.promises import FetchedImage, algorithms_of, broken_digest
from stratocache.cache.streaming import CHUNK_MISMATCH

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]

_RUN_CHUNKS = 4


class Completion:
    """Completes images through one `ChunkFetcher`; one call per image at a time."""

    def __init__(
        self,
        fetcher: ChunkFetcher,
        images: ImageStore,
        *,
        attempts: int,
        backoff: Backoff | None = None,
    ) -> None:
        self._fetcher = fetcher
        self._images = images
        self._attempts = attempts
        self._backoff = backoff or Backoff()
        self._limiter = trio.CapacityLimiter(2 * (os.cpu_count() or 1) + 2)

    async def complete(
        self, entry: Entry, boot_set: Sequence[int], progress: Progress
    ) -> FetchedImage:
        """Bring all chunks of a published image and compare the whole with its entry.

        What is in the store already is not fetched, so it can be begun again at any time.
        `progress` gets the bytes of the image that are here, and its size. Raises `NotVerified`
        (`image-rejected`) when the whole is not what was promised, `OriginFailed`
        (`origin-failed`) when no origin gives anything for `fetch.attempts` times, `NoSpace`.
        """
        reader = await self._images.open_reader(entry.identifier)
        await self._fill(reader, boot_set, progress)
        await trio.to_thread.run_sync(self._publish, entry.identifier)
        found = await self._prove(reader, entry)
        await trio.to_thread.run_sync(self._images.chunks.sync)
        return found

    def _publish(self, identifier: str) -> None:
        """Give an image that has grown to its end its manifest."""
        growing = self._images.growing(identifier)
        if growing is not None:
            self._images.publish(identifier, growing.manifest())

    async def _fill(self, reader: ImageReader, boot_set: Sequence[int], progress: Progress) -> None:
        failures = 0
        while missing := await self._fetcher.missing(reader.name):
            state = _Pass(reader, missing, progress)
            first = set(missing)
            failure = None
            if await self._fetcher.probe(reader.name, missing[0]):
                await self._bring(state, _runs([i for i in boot_set if i in first]), patient=False)
                await self._bring(state, _runs(sorted(state.missing)), patient=True)
            else:
                failure = await self._fetcher.stream(reader.name, state.note_one)
            if not state.missing:
                continue  # the next look says so
            failures = 0 if len(state.missing) < len(missing) else failures + 1
            if failures >= self._attempts and self._is_another(reader.name, failure):
                raise NotVerified(
                    "image-rejected",
                    f"What origins serve as image {reader.name} is not what they served at first "
                    "and nothing proved: it was another image.",
                )
            if failures >= self._attempts:
                raise OriginFailed(
                    "origin-failed",
                    f"{len(state.missing)} chunks of image {reader.name} cannot be fetched now; "
                    "the log names what its origins answer.",
                )
            await trio.sleep(self._backoff.pause_s(failures + 1, 0))
        progress(reader.size_bytes, reader.size_bytes)

    def _is_another(self, identifier: str, failure: StratocacheError | None) -> bool:
        """Tell whether an image that grows cannot be what was served of it."""
        mismatch = failure is not None and failure.code == CHUNK_MISMATCH
        return mismatch and self._images.growing(identifier) is not None

    async def _bring(self, state: "_Pass", runs: Iterator[list[int]], *, patient: bool) -> None:
        """Bring runs of chunks, several at a time; the first failure is raised bare."""
        failures: list[Exception] = []

        async def work(nursery: trio.Nursery) -> None:
            for run in runs:
                if patient:
                    await self._fetcher.quiet()
                wanted = [index for index in run if index in state.missing]
                try:
                    if wanted:
                        state.note(await self._fetcher.bring(state.reader.name, wanted))
                except Exception as error:  # noqa: BLE001 -- raised below, outside the nursery
                    failures.append(error)
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(self._fetcher.background_parallel):
                nursery.start_soon(work, nursery)
        if failures:
            raise failures[0]

    async def _prove(self, reader: ImageReader, entry: Entry) -> FetchedImage:
        """Read the whole image and compare its digests with the promised ones.

        An entry of qcow2 promises none of the image, but of its file, which was never here as a
        whole: what proves it is the index.
        """
        promised = entry.digests if entry.format == "raw" else {}
        size_bytes, digests = await ingest(
            _chunks_of(reader), (), algorithms_of(promised), limiter=self._limiter,
            progress=no_progress,
        )  # fmt: skip
        broken = broken_digest(promised, digests)
        if broken is not None:
            algorithm, digest = broken
            raise NotVerified(
                "image-rejected",
                f"Every chunk of image {entry.identifier} is as its index says, but the "
                f"{algorithm} of the whole is {digests[algorithm]} and the entry promises "
                f"{digest}: its endorser contradicts himself.",
            )
        return FetchedImage(entry.identifier, size_bytes, digests["sha256"])


class _Pass:
    """One attempt to bring all that is missing."""

    def __init__(self, reader: ImageReader, missing: Sequence[int], progress: Progress) -> None:
        self.reader = reader
        self._manifest = reader.manifest
        self.missing = set(missing)
        self._progress = progress
        self._missing_bytes = sum(map(self._manifest.chunk_bytes, missing))
        self.note([])

    def note_one(self, index: int) -> None:
        """Take note of a chunk that is here now."""
        self.note([index])

    def note(self, indexes: Sequence[int]) -> None:
        """Take note of chunks that are here now."""
        for index in self.missing.intersection(indexes):
            self._missing_bytes -= self._manifest.chunk_bytes(index)
        self.missing.difference_update(indexes)
        size_bytes = self.reader.size_bytes
        self._progress(size_bytes - self._missing_bytes, size_bytes)


def _runs(indexes: Sequence[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for index in indexes:
        if run and (index != run[-1] + 1 or len(run) >= _RUN_CHUNKS):
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _chunks_of(reader: ImageReader) -> Iterator[bytes]:
    for offset in range(0, reader.size_bytes, CHUNK_BYTES):
        yield reader.read_blocking(offset, CHUNK_BYTES)
