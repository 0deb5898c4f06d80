"""The file calls that the overlay engine makes, behind one small seam.

`Storage` names every call that can fail, or whose effect a crash can lose, so that a test can put
a recorder or a fault between the engine and its files. `FileStorage` is the real one.
"""

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from stratocache.cache.errors import Conflict

Buffer = bytes | bytearray | memoryview
LiveMap = mmap.mmap | bytearray
"""A file of tmpfs in memory: a store to it outlives the process, not the host."""

_FILE_MODE = 0o600


class BlockFile(Protocol):
    """One open file with positioned I/O; every method but `pread_cached` may block."""

    def size(self) -> int:
        """Return the length in bytes."""

    def pread(self, size: int, offset: int) -> bytes:
        """Return exactly `size` bytes; raise `OSError` EIO when the file ends before."""

    def pread_cached(self, size: int, offset: int) -> bytes | bytearray | None:
        """Return exactly `size` bytes when no medium is needed for them, else None."""

    def pwrite(self, buffer: Buffer, offset: int) -> None:
        """Write all of the buffer."""

    def fdatasync(self) -> None:
        """Make durable whatever was written before the call."""

    def close(self) -> None:
        """Close the file; nothing is synced."""


class Storage(Protocol):
    """Where an overlay keeps its files."""

    def create_file(self, path: Path, size_bytes: int, head: bytes, *, reserve: bool) -> None:
        """Make a durable file of zeros that begins with `head`; `reserve` allocates its blocks."""

    def sync_directory(self, directory: Path) -> None:
        """Make durable which names the directory has."""

    def open_file(self, path: Path, *, exclusive: bool) -> BlockFile:
        """Open a file for reading and writing; `exclusive` raises `Conflict` when it is open."""

    def map_live(self, path: Path, size_bytes: int) -> LiveMap | None:
        """Map a live file, or return None when there is none of exactly that size."""

    def create_live(self, path: Path, content: bytes) -> LiveMap:
        """Make a live file, replacing one that is there, in one step, and map it."""


class OpenFile:
    """A `BlockFile` of the operating system."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._nowait = True

    def size(self) -> int:
        """Return the length in bytes (fstat(2))."""
        return os.fstat(self._descriptor).st_size

    def pread(self, size: int, offset: int) -> bytes:
        """Return exactly `size` bytes (pread(2))."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, "the file ends too early")
            data += more
        return data

    def pread_cached(self, size: int, offset: int) -> bytes | bytearray | None:
        """Return `size` bytes of the page cache, or None (preadv2(2), RWF_NOWAIT)."""
        if not self._nowait:
            return self.pread(size, offset)
        data = bytearray(size)
        try:
            got = os.preadv(self._descriptor, (data,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            # tmpfs and others that have no RWF_NOWAIT: plain reads
            self._nowait = False
            return self.pread(size, offset)
        return data if got == size else None

    def pwrite(self, buffer: Buffer, offset: int) -> None:
        """Write all of the buffer (pwrite(2))."""
        written = os.pwrite(self._descriptor, buffer, offset)
        while written < len(buffer):
            rest = memoryview(buffer)[written:]
            written += os.pwrite(self._descriptor, rest, offset + written)

    def fdatasync(self) -> None:
        """Make written data durable (fdatasync(2))."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


class FileStorage:
    """The `Storage` of the operating system."""

    def create_file(self, path: Path, size_bytes: int, head: bytes, *, reserve: bool) -> None:
        """Make a durable file; raises `FileExistsError` when it is there."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
        try:
            if reserve:
                os.posix_fallocate(descriptor, 0, size_bytes)
            os.ftruncate(descriptor, size_bytes)
            if head:
                os.pwrite(descriptor, head, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_directory(self, directory: Path) -> None:
        """Make durable which names the directory has (fsync(2) of the directory)."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def open_file(self, path: Path, *, exclusive: bool) -> OpenFile:
        """Open a file; raises `Conflict` with code `disk-in-use` when it is held (flock(2))."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if exclusive:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Conflict(
                "disk-in-use", f"{path} is open in another process; stop that one first."
            ) from None
        return OpenFile(descriptor)

    def map_live(self, path: Path, size_bytes: int) -> mmap.mmap | None:
        """Map a live file that is there and has the size."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(descriptor).st_size != size_bytes:
                return None
            return mmap.mmap(descriptor, size_bytes)
        finally:
            os.close(descriptor)

    def create_live(self, path: Path, content: bytes) -> mmap.mmap:
        """Write a new live file beside the old, rename it, map it."""
        incoming = path.with_name(path.name + ".new")
        with suppress(FileNotFoundError):
            incoming.unlink()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(incoming, flags, _FILE_MODE)
        try:
            # a hole in a full tmpfs would be SIGBUS on a later store; ENOSPC belongs here
            os.posix_fallocate(descriptor, 0, len(content))
            OpenFile(descriptor).pwrite(content, 0)
            mapped = mmap.mmap(descriptor, len(content))
        finally:
            os.close(descriptor)
        incoming.rename(path)
        return mapped


FILES = FileStorage()
