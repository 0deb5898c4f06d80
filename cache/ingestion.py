"""Ingestion: bytes read once, and given at the same time to every digest and to one sink.

Batches of chunks flow from a reader through all consumers; while one batch is consumed, each
consumer in a thread of its own (hashlib and file writes release the GIL), the next is read.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path

import trio

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.decompression import ByteStream
from stratocache.cache.errors import NotVerified, StratocacheError

Batch = list[bytes]
Consumer = Callable[[Batch], None]

_BATCH_CHUNKS = 16
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
    sink: Consumer,
    algorithms: Collection[str],
    *,
    limiter: trio.CapacityLimiter,
    progress: Callable[[int], None],
) -> tuple[int, dict[str, str]]:
    """Give all chunks to `sink` and hash them; return the size and the digests in hexadecimal.

    Raises what the reader and the sink raise. Cancelling waits for the batch in hand.
    """
    hashers = {algorithm: hashlib.new(algorithm) for algorithm in sorted(algorithms)}
    consumers = [_hashing(hasher.update) for hasher in hashers.values()] + [sink]
    total = 0
    batch = await trio.to_thread.run_sync(_next_batch, chunks, limiter=limiter)
    while batch:
        following: Batch = []

        def read_following(_: Batch, into: Batch = following) -> None:
            into += _next_batch(chunks)

        await _all(batch, [read_following, *consumers], limiter)
        total += sum(map(len, batch))
        progress(total)
        batch = following
    return total, {algorithm: hasher.hexdigest() for algorithm, hasher in hashers.items()}


async def _all(batch: Batch, consumers: list[Consumer], limiter: trio.CapacityLimiter) -> None:
    """Run consumers of one batch side by side; raise the first failure bare, not in a group."""
    failures: list[Exception] = []

    async def run(consumer: Consumer) -> None:
        try:
            await trio.to_thread.run_sync(consumer, batch, limiter=limiter)
        except (StratocacheError, OSError) as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for consumer in consumers:
            nursery.start_soon(run, consumer)
    if failures:
        raise failures[0]


def _hashing(update: Callable[[bytes], None]) -> Consumer:
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
