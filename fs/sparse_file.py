"""Sparse files: where their data are, and writing to them without writing zeros."""

import errno
import os
from collections.abc import Iterator

from stratocache.fs.storage import OpenFile

BLOCK_BYTES = 4096
"""Zeros are left out in whole blocks of this size, as the usual file systems allocate them."""

_ZERO_BLOCK = bytes(BLOCK_BYTES)


def extents(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, whether there are data) for each stretch of `[start, end)` of a file.

    lseek(2), SEEK_DATA and SEEK_HOLE: a file system that does not know them has data everywhere.
    """
    while start < end:
        data = _next_data(descriptor, start, end)
        if data > start:
            yield start, data, False
        if data == end:
            return
        start = min(os.lseek(descriptor, data, os.SEEK_HOLE), end)
        yield data, start, True


def _next_data(descriptor: int, start: int, end: int) -> int:
    try:
        return min(os.lseek(descriptor, start, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno != errno.ENXIO:  # only a hole is left
            raise
        return end


def write_sparse(descriptor: int, buffer: bytes | bytearray, offset: int) -> None:
    """Write a buffer except its blocks of zeros, where the file must have a hole already.

    The file is not made longer by zeros at the buffer's end. Raises `OSError`.
    """
    with memoryview(buffer) as view:
        for start, end in _data_runs(buffer, offset):
            OpenFile(descriptor).pwrite(view[start:end], offset + start)


def _data_runs(buffer: bytes | bytearray, offset: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches of a buffer whose blocks, counted in the file, are not all zeros."""
    position = run_start = 0
    in_run = False
    while position < len(buffer):
        length = min(BLOCK_BYTES - (offset + position) % BLOCK_BYTES, len(buffer) - position)
        zero = buffer.startswith(_ZERO_BLOCK[:length], position)
        if zero and in_run:
            yield run_start, position
        if not zero and not in_run:
            run_start = position
        in_run = not zero
        position += length
    if in_run:
        yield run_start, position
