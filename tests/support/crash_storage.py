"""A storage that forgets: what was not synced may be lost, sector by sector, when the host dies."""

import errno
import os
from pathlib import Path
from random import Random

from stratocache.fs.storage import Buffer

SECTOR_BYTES = 512


class ProcessDied(BaseException):
    """The process ended in the middle of a call."""


class CrashFile:
    """A file in memory: `current` is what reads see, `durable` what the medium has."""

    def __init__(self, name: str, content: bytes, storage: "CrashStorage") -> None:
        self._name = name
        self._storage = storage
        self.current = bytearray(content)
        self.durable = bytearray(content)
        self._unsynced: list[tuple[int, bytes]] = []

    def size(self) -> int:
        """Return the length in bytes."""
        return len(self.current)

    def pread(self, size: int, offset: int) -> bytes:
        """Return what was written last."""
        self._storage.called(self._name, "pread")
        return bytes(self.current[offset : offset + size])

    def pread_cached(self, size: int, offset: int) -> bytes | None:
        """Return what was written last, or None when the storage is cold."""
        if self._storage.cold:
            return None
        return bytes(self.current[offset : offset + size])

    def pwrite(self, buffer: Buffer, offset: int) -> None:
        """Write; nothing of it is durable yet. A process that dies has written the first half."""
        content = bytes(buffer)
        try:
            self._storage.called(self._name, "pwrite")
        except ProcessDied:
            self._put(offset, content[: len(content) // 2])
            raise
        self._put(offset, content)

    def _put(self, offset: int, content: bytes) -> None:
        self.current[offset : offset + len(content)] = content
        self._unsynced.append((offset, content))

    def fdatasync(self) -> None:
        """Make all durable; after a failure the kernel forgets that it was not."""
        try:
            self._storage.called(self._name, "fdatasync")
        except OSError:
            self._unsynced.clear()
            raise
        for offset, content in self._unsynced:
            self.durable[offset : offset + len(content)] = content
        self._unsynced.clear()

    def close(self) -> None:
        """Do nothing; the file stays."""

    def host_dies(self, random: Random, kept_part: float) -> None:
        """Keep about that part of the sectors that were not synced, any of them."""
        for offset, content in self._unsynced:
            end = offset + len(content)
            start = offset
            while start < end:
                stop = min(end, start - start % SECTOR_BYTES + SECTOR_BYTES)
                if random.random() < kept_part:
                    self.durable[start:stop] = content[start - offset : stop - offset]
                start = stop
        self._unsynced.clear()
        self.current = bytearray(self.durable)


class CrashStorage:
    """Implements `stratocache.fs.storage.Storage` in memory, with faults.

    `faults` maps (file name, call) to the errno that the next such call raises, or to `DIE`.
    """

    DIE = -1

    def __init__(self) -> None:
        self.faults: dict[tuple[str, str], int] = {}
        self.calls: list[tuple[str, str]] = []
        self.cold = False
        self._files: dict[Path, CrashFile] = {}
        self._live: dict[Path, bytearray] = {}

    def called(self, name: str, call: str) -> None:
        """Record a call, and raise the fault that waits for it."""
        self.calls.append((name, call))
        number = self.faults.pop((name, call), None)
        if number == self.DIE:
            raise ProcessDied
        if number is not None:
            raise OSError(number, os.strerror(number))

    def create_file(self, path: Path, size_bytes: int, head: bytes, *, reserve: bool) -> None:
        """Make a durable file."""
        self._files[path] = CrashFile(path.name, head.ljust(size_bytes, b"\0"), self)

    def sync_directory(self, directory: Path) -> None:
        """Do nothing: names are durable here."""

    def open_file(self, path: Path, *, exclusive: bool) -> CrashFile:
        """Return the file."""
        if path not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return self._files[path]

    def map_live(self, path: Path, size_bytes: int) -> bytearray | None:
        """Return the live file of that size."""
        live = self._live.get(path)
        return live if live is not None and len(live) == size_bytes else None

    def create_live(self, path: Path, content: bytes) -> bytearray:
        """Make a live file."""
        self._live[path] = bytearray(content)
        return self._live[path]

    def host_dies(self, random: Random, kept_part: float = 0.0) -> None:
        """Lose the live files, and what was not synced but for some part of it."""
        self._live.clear()
        for file in self._files.values():
            file.host_dies(random, kept_part)
