"""The base of an overlay disk: bytes that never change, with zeros behind their end."""

from typing import Protocol, runtime_checkable

from stratocache.cache.chunks import CHUNK_BYTES


class BlockSource(Protocol):
    """Bytes that never change: the base of an overlay."""

    @property
    def size_bytes(self) -> int:
        """The length; a disk may be larger, and reads zeros behind it."""

    def read_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        """Return exactly `size` bytes if that never blocks, else None."""

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Return exactly `size` bytes."""

    def read_blocking(self, offset: int, size: int) -> bytes | bytearray:
        """Return exactly `size` bytes, from any thread."""


@runtime_checkable
class Chunked(Protocol):
    """What a base may offer besides: chunks of `CHUNK_BYTES`, known to be zeros, or as files."""

    def chunk(self, index: int) -> bytes | None:
        """Return the digest of a chunk, or None when it is all zeros."""

    def open_chunk(self, index: int) -> int | None:
        """Return a descriptor of a verified chunk, None for zeros; blocks."""


class Base:
    """The base of a disk, with zeros behind its end; None is a base of no bytes."""

    frozen: None = None
    """No layer: see `stratocache.fs.stack.FrozenLayer`."""

    def __init__(self, source: BlockSource | None) -> None:
        self._source = source
        self.size_bytes = 0 if source is None else source.size_bytes
        offered: object = source
        self._chunked = offered if isinstance(offered, Chunked) else None

    def read_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        """Return exactly `size` bytes, or None if that would wait."""
        if offset >= self.size_bytes or self._source is None:
            return bytes(size)
        if offset + size <= self.size_bytes:
            return self._source.read_nowait(offset, size)
        piece = self._source.read_nowait(offset, self.size_bytes - offset)
        return None if piece is None else piece.ljust(size, b"\0")

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Return exactly `size` bytes; raises what the source raises."""
        piece = self.read_nowait(offset, size)
        if piece is None:
            assert self._source is not None  # zeros never wait
            wanted = min(size, self.size_bytes - offset)
            piece = (await self._source.read(offset, wanted)).ljust(size, b"\0")
        return piece

    def read_blocking(self, offset: int, size: int) -> bytes | bytearray:
        """Return exactly `size` bytes, from any thread."""
        if offset >= self.size_bytes or self._source is None:
            return bytes(size)
        wanted = min(size, self.size_bytes - offset)
        return self._source.read_blocking(offset, wanted).ljust(size, b"\0")

    def is_zero(self, offset: int, size: int) -> bool:
        """Tell whether a range is known, without reading it, to be zeros."""
        end = min(offset + size, self.size_bytes)
        if offset >= end:
            return True
        if self._chunked is None:
            return False
        chunks = range(offset // CHUNK_BYTES, (end - 1) // CHUNK_BYTES + 1)
        return all(self._chunked.chunk(index) is None for index in chunks)

    def open_chunk(self, index: int, size: int) -> int | None:
        """Return the descriptor of a verified chunk of at least `size` bytes, if there is one.

        Blocks.
        """
        if self._chunked is None or index * CHUNK_BYTES + size > self.size_bytes:
            return None
        return self._chunked.open_chunk(index)
