"""Files as the medium has them, past the page cache. Standard library only."""

import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

_ALIGNMENT_BYTES = 4096
_buffers = threading.local()


def read_medium(path: Path, limit_bytes: int) -> tuple[memoryview, int]:
    """Return the content of a file of at most `limit_bytes`, and its inode's number.

    The content of a longer file is longer than that, and not all of it. It comes past the page
    cache if the file system can do that, as O_DIRECT of open(2) wants it: aligned. No link is
    followed. Raises `OSError`.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return _read_whole(path, limit_bytes, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return _read_whole(path, limit_bytes, flags)


def write_medium(descriptor: int, data: bytes) -> None:
    """Write the whole content of a new file, past the page cache if the file system can do that.

    What fills no block at the end goes through the cache. Nothing is durable yet: names are not.
    Raises `OSError`.
    """
    view = memoryview(data)
    position = _write_aligned(descriptor, view[: len(view) - len(view) % _ALIGNMENT_BYTES])
    write_cached(descriptor, view[position:], position)


def write_cached(descriptor: int, data: bytes | memoryview, position: int = 0) -> None:
    """Write all of `data` at a position of a file, through the page cache. Raises `OSError`."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def _write_aligned(descriptor: int, data: memoryview) -> int:
    """Return how many bytes the medium took: none where the file system cannot."""
    if not data:
        return 0
    buffer = _buffer(len(data))
    buffer[: len(data)] = data
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        return os.pwrite(descriptor, buffer[: len(data)], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def _buffer(size_bytes: int) -> memoryview:
    """Return this thread's aligned memory; made once, since bringing pages in costs a write."""
    buffer: memoryview | None = getattr(_buffers, "memory", None)
    if buffer is None or len(buffer) < size_bytes:
        buffer = _buffers.memory = memoryview(mmap.mmap(-1, size_bytes))
    return buffer


def _read_whole(path: Path, limit_bytes: int, flags: int) -> tuple[memoryview, int]:
    descriptor = os.open(path, flags)
    try:
        room_bytes = limit_bytes - limit_bytes % -_ALIGNMENT_BYTES + _ALIGNMENT_BYTES
        buffer = mmap.mmap(-1, room_bytes)
        count = os.preadv(descriptor, [buffer], 0)
        return memoryview(buffer)[:count], os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)
