"""Ingestion: bytes read once, and given at the same time to every digest and to one sink.

Batches of chunks flow from a reader to every digest and along the sink's steps, each of which works
in a thread of its own (hashlib and file writes release the GIL) and has one batch waiting. None
waits for another to end its batch: two processors idled for a fifth of the time when all did, as
storing took longer than any digest.
"""

import hashlib
import os
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import trio

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.decompression import ByteStream
from stratocache.cache.errors import NotVerified, StratocacheError

Batch = list[bytes]
Step = Callable[[Any], Any]

_BATCH_CHUNKS = 8
_BATCHES_WAITING = 1
_ZERO_CHUNK = bytes(CHUNK_BYTES)


def chunks_of(stream: ByteStream, size_bytes: int, *, overlong: NotVerified) -> Iterator[bytes]:
    """Yield a stream's bytes in chunks; `overlong` is raised once it exceeds `size_bytes`."""
    total = 0
    while chunk := _read_chunk(stream):
        total += len(chunk)
        if total > size_bytes:
            raise overlong
        yield chunk


def chunks_of_sparse_file(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes in chunks without reading its holes (lseek(2), SEEK_DATA)."""
    with path.open("rb", buffering=0) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        data_start = -1
        for offset in range(0, size_bytes, CHUNK_BYTES):
            wanted = min(CHUNK_BYTES, size_bytes - offset)
            if data_start < offset:
                data_start = _next_data(file.fileno(), offset, size_bytes)
            if data_start >= offset + wanted:
                yield _ZERO_CHUNK if wanted == CHUNK_BYTES else bytes(wanted)
            else:
                file.seek(offset)
                yield _read_chunk(file)


async def ingest(
    chunks: Iterator[bytes],
    sink: Sequence[Step],
    algorithms: Collection[str],
    *,
    limiter: trio.CapacityLimiter,
    progress: Callable[[int], None],
) -> tuple[int, dict[str, str]]:
    """Give all chunks to `sink` and hash them; return the size and the digests in hexadecimal.

    `sink` is a chain: its first step is given batches, each later one what the one before returned.
    Raises what the reader and the steps raise. Cancelling waits for the batches in hand.
    """
    hashers = {algorithm: hashlib.new(algorithm) for algorithm in sorted(algorithms)}
    total = 0

    async def read() -> None:
        nonlocal total
        while batch := await trio.to_thread.run_sync(_next_batch, chunks, limiter=limiter):
            for inlet in inlets:
                await inlet.send(batch)
            total += sum(map(len, batch))
            progress(total)
        for inlet in inlets:
            inlet.close()

    failures: list[Exception] = []
    async with trio.open_nursery() as nursery:
        pipeline = _Pipeline(nursery, limiter, failures)
        inlets = [pipeline.chain([_hashing(hasher.update)]) for hasher in hashers.values()]
        if sink:
            inlets.append(pipeline.chain(sink))
        pipeline.start(read)
    if failures:
        raise failures[0]
    return total, {algorithm: hasher.hexdigest() for algorithm, hasher in hashers.items()}


class _Pipeline:
    """Steps that work side by side, each in a thread; the first that fails ends all of them."""

    def __init__(
        self, nursery: trio.Nursery, limiter: trio.CapacityLimiter, failures: list[Exception]
    ) -> None:
        self._nursery = nursery
        self._limiter = limiter
        self._failures = failures

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task; a failure is kept bare, where the nursery would raise a group."""

        async def run() -> None:
            try:
                await task()
            except (StratocacheError, OSError) as error:
                self._failures.append(error)
                self._nursery.cancel_scope.cancel()

        self._nursery.start_soon(run)

    def chain(self, steps: Sequence[Step]) -> trio.MemorySendChannel[Any]:
        """Start steps of which each gives on what it returns; return where the first one takes from."""
        following: trio.MemorySendChannel[Any] | None = None
        for step in reversed(steps):
            inlet, waiting = trio.open_memory_channel[Any](_BATCHES_WAITING)
            self.start(partial(self._work, step, waiting, following))
            following = inlet
        return inlet

    async def _work(
        self,
        step: Step,
        waiting: trio.MemoryReceiveChannel[Any],
        following: trio.MemorySendChannel[Any] | None,
    ) -> None:
        async for item in waiting:
            made = await trio.to_thread.run_sync(step, item, limiter=self._limiter)
            if following is not None:
                await following.send(made)
        if following is not None:
            following.close()


def _hashing(update: Callable[[bytes], None]) -> Step:
    def hash_batch(batch: Batch) -> None:
        for chunk in batch:
            update(chunk)

    return hash_batch


def _next_batch(chunks: Iterator[bytes]) -> Batch:
    return list(islice(chunks, _BATCH_CHUNKS))


def _read_chunk(stream: ByteStream) -> bytes:
    """Read a whole chunk; shorter only at the end."""
    data = stream.read(CHUNK_BYTES)
    if len(data) == CHUNK_BYTES or not data:
        return data
    pieces = [data]
    missing = CHUNK_BYTES - len(data)
    while missing and (data := stream.read(missing)):
        pieces.append(data)
        missing -= len(data)
    return b"".join(pieces)


def _next_data(descriptor: int, offset: int, size_bytes: int) -> int:
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:  # ENXIO: only a hole is left
        return size_bytes
