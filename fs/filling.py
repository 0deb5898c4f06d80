"""Ways to bring a range of the lower into a data file: zeros, shared extents, or a copy."""

import os
from collections.abc import Callable

import trio

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.fs import reflink
from stratocache.fs.base import Base
from stratocache.fs.bitmap import BLOCK_BYTES
from stratocache.fs.stack import FrozenLayer
from stratocache.fs.storage import BlockFile

Filler = Callable[[BlockFile, int, int], None]
"""Called with the data file and a range of the disk within the chunk; does not wait for long."""


async def filler_of(lower: Base | FrozenLayer, index: int, size: int, *, share: bool) -> Filler:
    """Return what fills ranges of a chunk, `size` bytes of it, as the lower has them.

    Whatever takes time, reading and verifying, has been done. Raises what the lower raises.
    """
    start = index * CHUNK_BYTES
    if lower.is_zero(start, size):
        # a hole is no zero for sure: a write that failed may have left bytes there
        return _zero
    if share:
        chunk = await trio.to_thread.run_sync(lower.open_chunk, index, size)
        if chunk is not None:
            return _sharing(chunk, start)
    content = await lower.read(start, size)
    return lambda data, begin, end: data.pwrite(content[begin - start : end - start], begin)


def _zero(data: BlockFile, begin: int, end: int) -> None:
    data.zero(begin, end - begin)


def _sharing(chunk: int, start: int) -> Filler:
    def fill(data: BlockFile, begin: int, end: int) -> None:
        # whole blocks can be shared, the end of an image may be none
        whole = (end - begin) // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            try:
                data.share(chunk, begin - start, whole, begin)
            except OSError as error:
                if not reflink.is_unsupported(error):
                    raise
                whole = 0
        if begin + whole < end:
            rest = os.pread(chunk, end - begin - whole, begin + whole - start)
            data.pwrite(rest, begin + whole)

    return fill
