"""Reading an image's bytes from its chunks, past a descriptor of each that is verified."""

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import trio

from stratocache.cache.chunk_gate import OPENINGS_MAX, OpeningGate
from stratocache.cache.chunks import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    ChunkDescriptor,
    ChunkStore,
    zero_digest,
)
from stratocache.cache.errors import NotVerified, StratocacheError
from stratocache.cache.manifest import Manifest
from stratocache.cache.traffic import ReadCounts

_READ_AHEAD_CHUNKS = 8
_ZERO_CHUNK = bytes(CHUNK_BYTES)


class ImageReader:
    """Reads one published image. Shared by all who read it; made by `ImageStore.reader`.

    `read_nowait` never blocks but on the page cache and belongs to the event loop's thread; `read`
    is its asynchronous completion. Data races: none, an image never changes. A file that changes
    beneath us does: what was read from it is dropped, and the chunk is hashed again.
    """

    trace: Callable[[int, int], None] | None = None
    """Is told of every read by the event loop: offset and size."""

    def __init__(
        self, manifest: Manifest, chunks: ChunkStore, gate: OpeningGate, name: str,
        counts: ReadCounts,
    ) -> None:  # fmt: skip
        self.counts = counts
        self._manifest = manifest
        self.name = name
        self.size_bytes = manifest.size_bytes
        self._digests = manifest.digests
        self._chunks = chunks
        self._gate = gate
        self._zero = zero_digest(CHUNK_BYTES)
        last = manifest.chunk_count - 1
        self._zero_last = last if last >= 0 and manifest.is_zero(last) else -1
        self._begun = self._asked = -2
        """The chunk whose beginning was read last, and the last that the kernel was asked for."""

    @property
    def manifest(self) -> Manifest:
        """What the image's chunks are."""
        return self._manifest

    def chunk(self, index: int) -> bytes | None:
        """Return the digest of a chunk, or None when it is all zeros and thus not stored."""
        digest = self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        if len(digest) != DIGEST_BYTES:
            raise IndexError(index)
        if digest == self._zero or index == self._zero_last:
            return None
        return digest

    def chunk_path(self, index: int) -> Path | None:
        """Return the file of a chunk, for a reflink; None for zeros. Open it with `open_chunk`
        first: that is what verifies it."""
        digest = self.chunk(index)
        return None if digest is None else self._chunks.path(digest)

    def open_chunk(self, index: int) -> ChunkDescriptor | None:
        """Return a descriptor of a verified chunk, None for zeros; blocks, while it is mended too.
        Raises `NotVerified` (`chunk-missing`, `chunk-corrupt`) and what mending raises."""
        digest = self.chunk(index)
        if digest is None:
            return None
        return self._gate.open_blocking(digest, self.name, index)

    def read_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        """Return bytes of the image, short at its end, or None when a chunk is not open yet."""
        size = min(size, self.size_bytes - offset)
        if size <= 0:
            return b""
        if self.trace is not None:
            self.trace(offset, size)
        index, start = divmod(offset, CHUNK_BYTES)
        if start + size > CHUNK_BYTES:
            return self._read_pieces_nowait(offset, size)
        if start == 0:
            self._read_ahead(index)
        digest = self.chunk(index)
        if digest is None:
            return _ZERO_CHUNK if size == CHUNK_BYTES else bytes(size)
        descriptor = self._chunks.opened(digest)
        if descriptor is None:
            return None
        data = self._pread(digest, descriptor, size, start)
        if data is not None:
            self.counts.hits += 1
            self.counts.hit_bytes += size
        return data

    def _pread(
        self, digest: bytes, descriptor: ChunkDescriptor, size: int, start: int
    ) -> bytes | None:
        """Return bytes of a chunk, None when its file is no longer what was hashed."""
        data = os.pread(descriptor, size, start)
        if len(data) == size and descriptor.is_intact():
            return data
        self._chunks.distrust(digest)
        return None

    def _read_ahead(self, index: int) -> None:
        """Ask the kernel for the chunks behind one that is begun in order, for each once: its own
        read-ahead ends with each file."""
        in_order = self._begun <= index <= self._begun + 1
        self._begun = index
        if not in_order:
            self._asked = index
            return
        last = min(index + _READ_AHEAD_CHUNKS, self.manifest.chunk_count - 1)
        for ahead in range(max(index, self._asked) + 1, last + 1):
            digest = self.chunk(ahead)
            descriptor = None if digest is None else self._chunks.opened(digest)
            if descriptor is not None:
                os.posix_fadvise(descriptor, 0, CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
        self._asked = last

    def _read_pieces_nowait(self, offset: int, size: int) -> bytearray | None:
        # One buffer that preadv fills, rather than pieces that a join copies again.
        data = bytearray(size)
        view = memoryview(data)
        hits = hit_bytes = 0
        for piece_offset, piece_size in _pieces(offset, size):
            index, start = divmod(piece_offset, CHUNK_BYTES)
            if start == 0:
                self._read_ahead(index)
            digest = self.chunk(index)
            if digest is not None:
                descriptor = self._chunks.opened(digest)
                if descriptor is None:
                    return None
                piece = view[piece_offset - offset :][:piece_size]
                if (
                    os.preadv(descriptor, [piece], start) != piece_size
                    or not descriptor.is_intact()
                ):
                    self._chunks.distrust(digest)
                    return None
                hits += 1
                hit_bytes += piece_size
        self.counts.hits += hits
        self.counts.hit_bytes += hit_bytes
        return data

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Return bytes of the image, short at its end; chunks are opened and verified in a thread.

        A chunk that many ask for is opened once; one that is damaged or not here comes meanwhile,
        once. Raises `NotVerified` (`chunk-missing`, `chunk-corrupt`) and what the `Supplier` raises.
        """
        data = self.read_nowait(offset, size)
        if data is not None:
            await trio.lowlevel.checkpoint()
            return data
        size = min(size, self.size_bytes - offset)
        last = -(-(offset + size) // CHUNK_BYTES)
        fetched = await self._open_all(range(offset // CHUNK_BYTES, last))
        pieces = []
        for piece_offset, piece_size in _pieces(offset, size):
            pieces.append(await self._read_piece(piece_offset, piece_size))
            self._count(piece_offset // CHUNK_BYTES, piece_size, fetched)
        return b"".join(pieces)

    def _count(self, index: int, size_bytes: int, fetched: Collection[int]) -> None:
        """Count a read of one chunk; those that were `fetched` for it are misses."""
        if index in fetched:
            self.counts.misses += 1
            self.counts.miss_bytes += size_bytes
        elif self.chunk(index) is not None:
            self.counts.hits += 1
            self.counts.hit_bytes += size_bytes

    async def _open_all(self, indexes: range) -> set[int]:
        """Open chunks side by side; the first failure is raised bare, not in a group.

        Returns those that had to be fetched.
        """
        failures: list[Exception] = []
        fetched: set[int] = set()

        async def open_one(index: int, digest: bytes) -> None:
            try:
                await self._gate.open(digest, self.name, index, fetched)
            except (StratocacheError, OSError) as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for index in indexes:
                digest = self.chunk(index)
                if digest is not None:
                    nursery.start_soon(open_one, index, digest)
        if failures:
            raise failures[0]
        return fetched

    async def _read_piece(self, offset: int, size: int) -> bytes:
        index, start = divmod(offset, CHUNK_BYTES)
        digest = self.chunk(index)
        if digest is None:
            return bytes(size)
        for _ in range(OPENINGS_MAX):
            descriptor = await self._gate.open(digest, self.name, index)
            data = await trio.to_thread.run_sync(self._pread, digest, descriptor, size, start)
            if data is not None:
                return data
        raise _unsteady(digest)

    def read_blocking(self, offset: int, size: int) -> bytes:
        """Return bytes of the image, short at its end, from any thread; opens what is not open.

        Raises as `read` does.
        """
        pieces = []
        for piece_offset, piece_size in _pieces(offset, min(size, self.size_bytes - offset)):
            pieces.append(self._read_piece_blocking(piece_offset, piece_size))
        return b"".join(pieces)

    def _read_piece_blocking(self, offset: int, size: int) -> bytes:
        index, start = divmod(offset, CHUNK_BYTES)
        digest = self.chunk(index)
        if digest is None:
            return bytes(size)
        for _ in range(OPENINGS_MAX):
            descriptor = self._gate.open_blocking(digest, self.name, index)
            data = self._pread(digest, descriptor, size, start)
            if data is not None:
                return data
        raise _unsteady(digest)


def _pieces(offset: int, size: int) -> Iterator[tuple[int, int]]:
    end = offset + size
    while offset < end:
        piece = min(end - offset, CHUNK_BYTES - offset % CHUNK_BYTES)
        yield offset, piece
        offset += piece


def _unsteady(digest: bytes) -> NotVerified:
    return NotVerified(
        "chunk-corrupt",
        f"The file of chunk {digest.hex()} changes again and again; see what writes to it.",
    )
