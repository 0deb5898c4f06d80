"""The operating system's file calls, one of which fails: whoever makes it, in whichever thread.

All calls by which this process reads, writes, names and syncs the files below one directory are
counted, and the call of one number fails. Reached are the functions of `os`, `open`, the ioctls
that share extents, and the C calls of the engine; not reached are SQLite, which has its own
recovery, `close`, and stores into mapped files, which tmpfs cannot fail.
"""

import builtins
import ctypes
import errno
import fcntl
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stratocache.cache import chunks
from stratocache.fs import storage

SECTOR_BYTES = 512
_BY_PATH = (
    "open", "mkdir", "rmdir", "unlink", "remove", "link", "rename", "replace", "listdir", "scandir",
    "stat", "truncate", "statvfs",
)  # fmt: skip
_BY_DESCRIPTOR = (
    "pread", "preadv", "pwrite", "write", "fsync", "fdatasync", "ftruncate", "posix_fallocate",
    "fstat", "lseek", "copy_file_range", "sendfile",
)  # fmt: skip
_NEEDING_SPACE = frozenset({
    "open", "mkdir", "link", "rename", "replace", "pwrite", "write", "fsync", "fdatasync", "syncfs",
    "ftruncate", "truncate", "posix_fallocate", "fallocate", "ioctl", "copy_file_range", "sendfile",
})  # fmt: skip


class FailingCalls:
    """Counts the calls about files below directories, and lets one fail, of that number from 0.

    A write that fails has written its first sectors. Of ENOSPC only calls that may need space fail.
    """

    def __init__(self, directories: Sequence[Path], number: int, code: int) -> None:
        self.count = 0
        self.failed: str | None = None
        """What failed, for messages: the call and its file."""
        self._prefixes = tuple(f"{directory}/" for directory in directories)
        self._number = number
        self._code = code
        self._lock = threading.Lock()

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Count, and fail, while the block runs."""
        with ExitStack() as patches:
            for name in (*_BY_PATH, *_BY_DESCRIPTOR):
                patches.enter_context(patch.object(os, name, self._wrapped(name)))
            opened = self._wrapped_open()
            patches.enter_context(patch.object(io, "open", opened))
            patches.enter_context(patch.object(builtins, "open", opened))
            patches.enter_context(patch.object(fcntl, "ioctl", self._wrapped_ioctl()))
            for library, name in ((storage._LIBC, "fallocate"), (chunks._LIBC, "syncfs")):
                patches.enter_context(patch.object(library, name, self._wrapped_c(library, name)))
            yield

    def _is_ours(self, target: object) -> str | None:
        """Return the path that a call is about, when it is below our directory."""
        if isinstance(target, int):
            try:
                path = os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return None
        elif isinstance(target, str | os.PathLike):
            path = os.fspath(target)
        else:
            return None
        return path if path.startswith(self._prefixes) else None

    def _fails(self, name: str, target: object) -> bool:
        """Count one call; tell whether it is the one."""
        path = self._is_ours(target)
        if path is None or (self._code == errno.ENOSPC and name not in _NEEDING_SPACE):
            return False
        with self._lock:
            self.count += 1
            if self.count - 1 != self._number:
                return False
            self.failed = f"{name} of {path}"
        return True

    def _error(self) -> OSError:
        return OSError(self._code, os.strerror(self._code))

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if arguments and self._fails(name, arguments[0]):
                if name == "pwrite":
                    descriptor, buffer, offset = arguments
                    middle = (offset + len(buffer) // 2) // SECTOR_BYTES * SECTOR_BYTES
                    real(descriptor, bytes(buffer)[: max(0, middle - offset)], offset)
                raise self._error()
            return real(*arguments, **options)

        return call

    def _wrapped_open(self) -> Callable[..., Any]:
        real = io.open

        def call(file: Any, *arguments: Any, **options: Any) -> Any:
            if self._fails("open", file):
                raise self._error()
            return real(file, *arguments, **options)

        return call

    def _wrapped_ioctl(self) -> Callable[..., Any]:
        real = fcntl.ioctl

        def call(descriptor: Any, *arguments: Any) -> Any:
            if self._fails("ioctl", descriptor):
                raise self._error()
            return real(descriptor, *arguments)

        return call

    def _wrapped_c(self, library: ctypes.CDLL, name: str) -> Callable[..., int]:
        real = getattr(library, name)

        def call(descriptor: int, *arguments: Any) -> int:
            if self._fails(name, descriptor):
                ctypes.set_errno(self._code)
                return -1
            found: int = real(descriptor, *arguments)
            return found

        return call


CODES = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
