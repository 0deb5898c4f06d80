"""Reading a file as the medium has it, not as the page cache does. Standard library only."""

import errno
import mmap
import os
from pathlib import Path

_ALIGNMENT_BYTES = 4096


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


def _read_whole(path: Path, limit_bytes: int, flags: int) -> tuple[memoryview, int]:
    descriptor = os.open(path, flags)
    try:
        room_bytes = limit_bytes - limit_bytes % -_ALIGNMENT_BYTES + _ALIGNMENT_BYTES
        buffer = mmap.mmap(-1, room_bytes)
        count = os.preadv(descriptor, [buffer], 0)
        return memoryview(buffer)[:count], os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)
