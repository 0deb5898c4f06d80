"""Sharing of file extents: two files, one copy of the bytes, until one of them is written.

XFS and btrfs know it; ioctl_ficlonerange(2) is the reference.
"""

import errno
import fcntl
import os
import struct
import tempfile
from pathlib import Path

BLOCK_BYTES = 4096
"""Offsets and lengths are multiples of the file system's block; no wider one is in use here."""

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_RANGE = struct.Struct("=qQQQ")
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS})


def clone_range(
    source: int, source_offset: int, size: int, target: int, target_offset: int
) -> None:
    """Let `target` share a range of `source` (descriptors); raises `OSError`.

    The shared bytes are written back first, so that they are as durable as the source's.
    """
    fcntl.ioctl(target, _FICLONERANGE, _RANGE.pack(source, source_offset, size, target_offset))


def clone_file(source: int, target: int) -> None:
    """Let `target`, an empty file, share all of `source` (descriptors); raises `OSError`."""
    fcntl.ioctl(target, _FICLONE, source)


def is_unsupported(error: OSError) -> bool:
    """Tell whether an error of `clone_range` means that these files can never share extents."""
    return error.errno in _UNSUPPORTED


def supported(source_directory: Path, target_directory: Path) -> bool:
    """Try whether files of one directory can share extents with files of another."""
    with (
        tempfile.TemporaryFile(dir=source_directory) as source,
        tempfile.TemporaryFile(dir=target_directory) as target,
    ):
        os.pwrite(source.fileno(), b"\1" * BLOCK_BYTES, 0)
        try:
            clone_range(source.fileno(), 0, BLOCK_BYTES, target.fileno(), 0)
        except OSError as error:
            if is_unsupported(error):
                return False
            raise
        return os.pread(target.fileno(), 1, 0) == b"\1"
