"""Images without an index, while their source flows by: digests become known chunk by chunk.

What a chunk was when it was first served is on record before anybody reads it, so that a source
that is read again, after a restart too, must bring the same. Whether that is what the endorser
promised is only known at the end, when the digest of the whole is compared.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from stratocache.cache.chunk_gate import OpeningGate
from stratocache.cache.chunks import CHUNK_BYTES, DIGEST_BYTES, ChunkStore, zero_digest
from stratocache.cache.errors import NotVerified
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.manifest import Manifest, fsync_directory
from stratocache.cache.traffic import ReadCounts

UNKNOWN_DIGEST = bytes(DIGEST_BYTES)
"""In place of a digest: of a chunk that has not flowed past yet."""


class GrowingManifest:
    """The digests of an image of `size_bytes`, as far as they are known; `record` is their file.

    `learn` and `close` run in threads, one at a time; all else may be called from any thread.
    """

    def __init__(self, size_bytes: int, record: Path) -> None:
        """Open the record, or make an empty one; raises `OSError`."""
        self.size_bytes = size_bytes
        self.chunk_count = -(-size_bytes // CHUNK_BYTES)
        self._record = record
        self.digests = bytearray(read_record(record, size_bytes))
        if not any(self.digests):
            record.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            record.write_bytes(self.digests)
        self._descriptor = os.open(record, os.O_RDWR | os.O_CLOEXEC)
        os.fsync(self._descriptor)
        fsync_directory(record.parent)

    def digest(self, index: int) -> bytes:
        """Return the digest of a chunk, `UNKNOWN_DIGEST` when it has not flowed past yet."""
        if not 0 <= index < self.chunk_count:
            raise IndexError(index)
        return bytes(self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])

    def knows(self, index: int) -> bool:
        """Tell whether a chunk has flowed past."""
        return self.digest(index) != UNKNOWN_DIGEST

    def chunk_bytes(self, index: int) -> int:
        """Return the size of a chunk; only the last may be shorter than `CHUNK_BYTES`."""
        return min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)

    def is_zero(self, index: int) -> bool:
        """Tell whether a chunk is known to be all zero bytes, which no store holds."""
        return self.digest(index) == zero_digest(self.chunk_bytes(index))

    def learn(self, index: int, digest: bytes) -> None:
        """Note, durably, what a chunk is from now on; raises `OSError`."""
        os.pwrite(self._descriptor, digest, index * DIGEST_BYTES)
        os.fdatasync(self._descriptor)
        self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = digest

    def manifest(self) -> Manifest:
        """Return a manifest of what is known; unknown digests are `UNKNOWN_DIGEST` there too."""
        return Manifest(self.size_bytes, bytes(self.digests))

    def stored(self) -> Iterator[bytes]:
        """Yield the digests that the store has, or is about to have."""
        for index in range(self.chunk_count):
            if self.knows(index) and not self.is_zero(index):
                yield self.digest(index)

    def reader(
        self, chunks: ChunkStore, gate: OpeningGate, name: str, counts: ReadCounts
    ) -> ImageReader:
        """Return a reader that waits for what has not flowed past yet."""
        return _GrowingReader(self, chunks, gate, name, counts)

    def close(self) -> None:
        """Close the record."""
        os.close(self._descriptor)


def read_record(record: Path, size_bytes: int) -> bytes:
    """Return the digests that a record has, unknown ones for all when it is none of that image."""
    record_bytes = DIGEST_BYTES * -(-size_bytes // CHUNK_BYTES)
    try:
        with record.open("rb") as file:
            content = file.read(record_bytes + 1)
    except FileNotFoundError:
        content = b""
    return content if len(content) == record_bytes else bytes(record_bytes)


class _GrowingReader(ImageReader):
    """Reads an image of which not all digests are known; see `ImageReader`."""

    def __init__(
        self, growing: GrowingManifest, chunks: ChunkStore, gate: OpeningGate, name: str,
        counts: ReadCounts,
    ) -> None:  # fmt: skip
        super().__init__(growing.manifest(), chunks, gate, name, counts)
        self._growing = growing

    @property
    def manifest(self) -> Manifest:
        """What is known now; a copy."""
        return self._growing.manifest()

    def chunk(self, index: int) -> bytes | None:
        """Return the digest of a chunk, None for zeros, `UNKNOWN_DIGEST` before it is known."""
        return None if self._growing.is_zero(index) else self._growing.digest(index)

    def open_chunk(self, index: int) -> int | None:  # type: ignore[override]
        """Return a descriptor of a chunk, None for zeros; blocks until it has flowed past."""
        self._wait_blocking(range(index, index + 1))
        return super().open_chunk(index)

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Return bytes of the image once they have flowed past; raises what the supplier raises."""
        await self._wait(self._chunks_of(offset, size))
        return await super().read(offset, size)

    def read_blocking(self, offset: int, size: int) -> bytes:
        """Do what `read` does, from any thread."""
        self._wait_blocking(self._chunks_of(offset, size))
        return super().read_blocking(offset, size)

    def _chunks_of(self, offset: int, size: int) -> range:
        end = min(offset + size, self.size_bytes)
        return range(offset // CHUNK_BYTES, -(-end // CHUNK_BYTES))

    def _wait_blocking(self, indexes: range) -> None:
        if not all(map(self._growing.knows, indexes)):
            self._gate.wait_for(self._wait, indexes)

    async def _wait(self, indexes: range) -> None:
        for index in indexes:
            while not self._growing.knows(index):
                await self._gate.supply(UNKNOWN_DIGEST, self.name, index)
                if not self._growing.knows(index):
                    raise NotVerified(
                        "chunk-missing", f"Chunk {index} of {self.name} has not come; try again."
                    )
