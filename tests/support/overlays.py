"""An overlay disk on any storage, to be opened as often as a test likes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import trio

from stratocache.fs import base, filling, overlay, stack, transitions
from stratocache.fs.bitmap import BLOCK_BYTES
from stratocache.fs.layers import DiskFiles
from stratocache.fs.overlay import Overlay
from stratocache.fs.storage import FILES, Storage

SMALL_CHUNK_BYTES = 8 * BLOCK_BYTES


@contextmanager
def small_chunks() -> Iterator[None]:
    """Let the engine's chunks have 8 blocks, so that a small disk has many."""
    with (
        patch.object(base, "CHUNK_BYTES", SMALL_CHUNK_BYTES),
        patch.object(stack, "CHUNK_BYTES", SMALL_CHUNK_BYTES),
        patch.object(stack, "_BLOCKS_PER_CHUNK", SMALL_CHUNK_BYTES // BLOCK_BYTES),
        patch.object(overlay, "CHUNK_BYTES", SMALL_CHUNK_BYTES),
        patch.object(filling, "CHUNK_BYTES", SMALL_CHUNK_BYTES),
    ):
        yield


class ImageFile:
    """A base in memory; `cold` makes every read wait, until `gate` opens if there is one."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size_bytes = len(content)
        self.cold = False
        self.gate: trio.Event | None = None
        self.asked: list[tuple[int, int]] = []

    def read_nowait(self, offset: int, size: int) -> bytes | None:
        """Return bytes, or None when cold."""
        self.asked.append((offset, size))
        return None if self.cold else self.read_blocking(offset, size)

    async def read(self, offset: int, size: int) -> bytes:
        """Return bytes once the gate is open."""
        if self.gate is not None:
            await self.gate.wait()
        await trio.lowlevel.checkpoint()
        return self.read_blocking(offset, size)

    def read_blocking(self, offset: int, size: int) -> bytes:
        """Return bytes."""
        assert size > 0
        assert offset + size <= self.size_bytes
        return self.content[offset : offset + size]


class ChunkedImageFile(ImageFile):
    """The same in chunks, which are known to be zeros or can be opened."""

    CHUNK_BYTES = SMALL_CHUNK_BYTES

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._open: dict[int, int] = {}

    def _piece(self, index: int) -> bytes:
        if not 0 <= index * self.CHUNK_BYTES < self.size_bytes:
            raise IndexError(index)
        return self.content[index * self.CHUNK_BYTES : (index + 1) * self.CHUNK_BYTES]

    def chunk(self, index: int) -> bytes | None:
        """Return something for a chunk that is not all zeros."""
        return b"digest" if any(self._piece(index)) else None

    def open_chunk(self, index: int) -> int | None:
        """Return the descriptor of a chunk's own file."""
        if self.chunk(index) is None:
            return None
        if index not in self._open:
            self._open[index] = os.memfd_create("chunk")
            os.pwrite(self._open[index], self._piece(index), 0)
        return self._open[index]

    def close(self) -> None:
        """Close the files of chunks."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class OverlayBench:
    """One overlay disk over one image, to be opened as often as a test likes."""

    def __init__(self, root: Path, size_bytes: int, base: bytes, storage: Storage) -> None:
        self.files = DiskFiles(root / "disk", root / "live" / "disk", storage)
        self.directory = self.files.directory
        self.live = self.files.live("1")
        self.base = ImageFile(base)
        self.storage = storage
        if storage is FILES:
            self.directory.mkdir()
            self.live.parent.mkdir()
        transitions.create(self.files, size_bytes, "image")
        self.overlay = self.open()

    def open(
        self, *, write_wait_s: float = 0.0, on_full: Callable[[], None] = lambda: None
    ) -> Overlay:
        """Open the disk."""
        return Overlay(
            self.files, lambda name: self.base, write_wait_s=write_wait_s, on_full=on_full
        )

    def reopen(self) -> None:
        """Let the process die, and another one open the disk."""
        self.overlay.close()
        self.overlay = self.open()

    @property
    def pristine(self) -> bytearray:
        """What the disk reads before anybody has written."""
        size_bytes = self.overlay.size_bytes
        return bytearray(self.base.content[:size_bytes].ljust(size_bytes, b"\0"))

    def read_all(self) -> bytes:
        """Return the whole disk."""
        return bytes(trio.run(self.overlay.read, 0, self.overlay.size_bytes))
