"""What a check of disks finds, and the few things that are safe to mend.

A *fault* means that bytes are, or may be, not what they should be: nothing is guessed, it is told.
A *leak* is what a crash left: it costs space, no reader ever sees it, and it can go.
"""

import ctypes
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # fallocate(2)

Mend = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    code: str
    """Stable, lower-case and dashed."""
    subject: str
    """UUID of the disk, or name of the file or manifest, that it is about."""
    message: str
    """One sentence for people."""
    mend: Mend | None = None
    """What makes it go; a leak has one, a fault has none."""

    @property
    def leak(self) -> bool:
        """Whether it only costs space."""
        return self.mend is not None


def removal(path: Path) -> Mend:
    """Return what removes a file or a directory that nothing refers to."""
    return partial(_remove, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def punching(path: Path, ranges: Sequence[tuple[int, int]]) -> Mend:
    """Return what frees ranges (start, end) of a file, whose bytes nobody reads."""
    return partial(_punch, path, ranges)


def _punch(path: Path, ranges: Sequence[tuple[int, int]]) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for start, end in ranges:
            if _LIBC.fallocate(
                descriptor, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_long(start), ctypes.c_long(end - start)
            ):  # fmt: skip
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
