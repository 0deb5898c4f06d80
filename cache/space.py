"""Room on the file system: the reserve that fetches leave alone, and what a full disk means."""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stratocache.cache.errors import NoSpace

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Space:
    """The free space of one file system, less a reserve that is not ours to take.

    A `limit` is asked besides whether so many bytes may be added to the cache.
    """

    def __init__(
        self, directory: Path, reserve_bytes: int, *, limit: Callable[[int], None] | None = None
    ) -> None:
        self.directory = directory
        self._reserve_bytes = reserve_bytes
        self._limit = limit

    def require(self, size_bytes: int) -> None:
        """Raise `NoSpace` (`no-space`) unless `size_bytes` fit beside the reserve."""
        if self._limit is not None:
            self._limit(size_bytes)
        status = os.statvfs(self.directory)
        free_bytes = status.f_bavail * status.f_frsize
        if free_bytes < size_bytes + self._reserve_bytes:
            raise no_space(
                self.directory,
                f"{size_bytes} bytes are needed and {self._reserve_bytes} kept in reserve, "
                f"{free_bytes} are free",
            )


def no_space(directory: Path, detail: str) -> NoSpace:
    """Return the error for a full file system that holds `directory`."""
    return NoSpace(
        "no-space",
        f"Not enough space in {directory} ({detail}); remove images or disks, or add space.",
    )


@contextmanager
def full_disk_is_no_space(directory: Path) -> Iterator[None]:
    """Turn the ways in which a full disk shows (ENOSPC, EDQUOT, SQLITE_FULL) into `NoSpace`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise no_space(directory, error.strerror or "full") from error
    except sqlite3.OperationalError as error:
        # SQLite rolls back by itself when full; diskcache's ROLLBACK then fails and hides the cause.
        causes = (error, error.__context__)
        if not any(getattr(c, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL for c in causes):
            raise
        raise no_space(directory, "the chunk index cannot grow") from error
