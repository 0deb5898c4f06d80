"""The file calls that the overlay engine makes, behind one small seam.

`Storage` names every call that can fail, or whose effect a crash can lose, so that a test can put
a recorder or a fault between the engine and its files. `FileStorage` is the real one.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from stratocache.cache.errors import Conflict
from stratocache.fs import reflink

Buffer = bytes | bytearray | memoryview
LiveMap = mmap.mmap | bytearray
"""A file of tmpfs in memory: a store to it outlives the process, not the host."""

_FILE_MODE = 0o600
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PUNCH_HOLE = 0x02 | 0x01
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE (fallocate(2))."""
_ZEROS = bytes(1024**2)
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


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

    def zero(self, offset: int, size: int) -> None:
        """Make a range within the file read as zeros, without space for it if that can be."""

    def extend(self, size_bytes: int, *, reserve: bool) -> None:
        """Make the file longer, by zeros, durably; `reserve` allocates them."""

    def cut(self, size_bytes: int) -> None:
        """Make the file no longer than that, durably."""

    def share(self, source: int, source_offset: int, size: int, offset: int) -> None:
        """Share whole blocks of another file (a descriptor); raises `OSError` if it cannot."""

    def data_after(self, offset: int) -> int | None:
        """Return where bytes that may not be zero begin, at `offset` or behind it; None at none."""

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

    def boot_id(self) -> bytes:
        """Return 16 bytes that name this boot of the host."""

    def map_live(self, path: Path) -> LiveMap | None:
        """Map a live file, or return None when there is none that has a byte."""

    def create_live(self, path: Path, content: bytes) -> LiveMap:
        """Make a live file, replacing one that is there, in one step, and map it."""

    def read_small(self, path: Path, size_max: int) -> bytes | None:
        """Return a file, no more of it than `size_max` + 1 bytes; None when there is none."""

    def replace_small(self, path: Path, content: bytes) -> None:
        """Make a file have that content, in one step, durably with its name."""

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file, over one that is there."""

    def remove(self, path: Path) -> None:
        """Remove a name; no such name is no error."""

    def names(self, directory: Path) -> list[str]:
        """Return the names that a directory has."""


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

    def zero(self, offset: int, size: int) -> None:
        """Punch a hole (fallocate(2)), or write zeros where the file system has no holes."""
        if _LIBC.fallocate(self._descriptor, _PUNCH_HOLE, offset, size) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
        for start in range(0, size, len(_ZEROS)):
            self.pwrite(memoryview(_ZEROS)[: size - start], offset + start)

    def extend(self, size_bytes: int, *, reserve: bool) -> None:
        """Make the file longer and sync it; one that is as long stays as it is."""
        before = self.size()
        if size_bytes > before:
            if reserve:
                os.posix_fallocate(self._descriptor, before, size_bytes - before)
            else:
                os.ftruncate(self._descriptor, size_bytes)
        os.fsync(self._descriptor)

    def cut(self, size_bytes: int) -> None:
        """Cut the file off (ftruncate(2)); one that is shorter stays as it is."""
        if self.size() > size_bytes:
            os.ftruncate(self._descriptor, size_bytes)
            os.fsync(self._descriptor)

    def share(self, source: int, source_offset: int, size: int, offset: int) -> None:
        """Share extents (ioctl_ficlonerange(2))."""
        reflink.clone_range(source, source_offset, size, self._descriptor, offset)

    def data_after(self, offset: int) -> int | None:
        """Find the next byte that is not in a hole (lseek(2), SEEK_DATA)."""
        try:
            return os.lseek(self._descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    def fdatasync(self) -> None:
        """Make written data durable (fdatasync(2))."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the descriptor, once: a second time is EBADF.

        Whoever comes later must not meet another file that has got the same number.
        """
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


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

    def boot_id(self) -> bytes:
        """Return what names this boot of the host (random(4), boot_id)."""
        return uuid.UUID(_BOOT_ID.read_text().strip()).bytes

    def map_live(self, path: Path) -> mmap.mmap | None:
        """Map a live file that is there and not empty."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            size_bytes = os.fstat(descriptor).st_size
            return mmap.mmap(descriptor, size_bytes) if size_bytes else None
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

    def read_small(self, path: Path, size_max: int) -> bytes | None:
        """Read a file, no further than one byte over the limit."""
        try:
            with path.open("rb") as file:
                return file.read(size_max + 1)
        except FileNotFoundError:
            return None

    def replace_small(self, path: Path, content: bytes) -> None:
        """Write beside, fsync, rename, fsync the directory."""
        incoming = path.with_name(path.name + ".new")
        self.remove(incoming)
        self.create_file(incoming, len(content), content, reserve=False)
        incoming.rename(path)
        self.sync_directory(path.parent)

    def link(self, source: Path, target: Path) -> None:
        """Make a hard link (link(2))."""
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: Path, target: Path) -> None:
        """Rename (rename(2))."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        """Unlink (unlink(2))."""
        path.unlink(missing_ok=True)

    def names(self, directory: Path) -> list[str]:
        """List a directory."""
        return os.listdir(directory)


FILES = FileStorage()
