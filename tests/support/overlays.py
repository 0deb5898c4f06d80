"""An overlay disk on any storage, to be opened as often as a test likes."""

from pathlib import Path

import trio

from stratocache.fs.overlay import Overlay
from stratocache.fs.storage import FILES, Storage


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
        assert size > 0
        assert offset + size <= self.size_bytes
        return None if self.cold else self.content[offset : offset + size]

    async def read(self, offset: int, size: int) -> bytes:
        """Return bytes once the gate is open."""
        if self.gate is not None:
            await self.gate.wait()
        await trio.lowlevel.checkpoint()
        return self.content[offset : offset + size]


class OverlayBench:
    """One overlay disk, to be opened as often as a test likes."""

    def __init__(self, root: Path, size_bytes: int, base: bytes, storage: Storage) -> None:
        self.directory = root / "disk"
        self.live = root / "live.bitmap"
        self.size_bytes = size_bytes
        self.base = ImageFile(base)
        self.storage = storage
        if storage is FILES:
            self.directory.mkdir()
        Overlay.create(self.directory, size_bytes, storage)
        self.overlay = self.open()

    def open(self) -> Overlay:
        """Open the disk."""
        return Overlay(self.directory, self.live, self.size_bytes, self.base, self.storage)

    def reopen(self) -> None:
        """Let the process die, and another one open the disk."""
        self.overlay.close()
        self.overlay = self.open()

    @property
    def pristine(self) -> bytearray:
        """What the disk reads before anybody has written."""
        return bytearray(self.base.content[: self.size_bytes].ljust(self.size_bytes, b"\0"))

    def read_all(self) -> bytes:
        """Return the whole disk."""
        return bytes(trio.run(self.overlay.read, 0, self.size_bytes))
