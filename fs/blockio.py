"""Reads and writes of an overlay disk: a top layer, which is written, and the lower below it.

One task at a time runs between two awaits, and the argument in OVERLAY.md depends on it: adding an
await to a `_nowait` path, or to `_write`, breaks the engine.
"""

import errno
from functools import partial

import trio

from stratocache.fs.base import Base
from stratocache.fs.bitmap import BLOCK_BYTES, BLOCK_SHIFT
from stratocache.fs.stack import FrozenLayer, Layer, runs
from stratocache.fs.storage import Buffer
from stratocache.fs.waiting import FULL, SpaceWait

_IN_BLOCK = BLOCK_BYTES - 1


class LayeredBlocks:
    """The bytes of one disk; its methods belong to one trio loop."""

    def __init__(
        self, top: Layer, lower: Base | FrozenLayer, size_bytes: int, space: SpaceWait
    ) -> None:
        self.size_bytes = size_bytes
        self._lower = lower
        self._space = space
        self._epoch = 0
        """Counts how often the top layer was replaced by an empty one."""
        self._put_on_top(top)

    def _put_on_top(self, top: Layer) -> None:
        self._top = top
        self._bitmap = top.bitmap
        self._bits = top.bitmap.bits
        self._data = top.data

    # Reads.

    def read_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        """Return up to `size` bytes, fewer only at the disk's end, or None if that would wait."""
        if offset + size > self.size_bytes:
            size = max(0, self.size_bytes - offset)
        if size == 0:
            return b""
        first = offset >> BLOCK_SHIFT
        count = (offset + size - 1 >> BLOCK_SHIFT) - first + 1
        if count == 1:
            if self._bits[first >> 3] >> (first & 7) & 1:
                return self._data.pread_cached(size, offset)
            return self._lower.read_nowait(offset, size)
        present = self._bitmap.run(first, count)
        if present == 0:
            return self._lower.read_nowait(offset, size)
        if present == (1 << count) - 1:
            return self._data.pread_cached(size, offset)
        return self._mixed_nowait(offset, size, first, count, present)

    def _mixed_nowait(
        self, offset: int, size: int, first: int, count: int, present: int
    ) -> bytearray | None:
        found = bytearray(size)
        for start, end, local in runs(offset, size, first, count, present):
            if local:
                piece = self._data.pread_cached(end - start, start)
            else:
                piece = self._lower.read_nowait(start, end - start)
            if piece is None:
                return None
            found[start - offset : end - offset] = piece
        return found

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Return up to `size` bytes, fewer only at the disk's end; raises what the base raises."""
        answer = self.read_nowait(offset, size)
        if answer is not None:
            return answer
        size = min(size, self.size_bytes - offset)
        first = offset >> BLOCK_SHIFT
        count = (offset + size - 1 >> BLOCK_SHIFT) - first + 1
        found = bytearray(size)
        local_runs = []
        # what is top and lower now is read to the end, whatever is frozen or rebased meanwhile
        top, lower = self._top, self._lower
        top.hold()
        if lower.frozen is not None:
            lower.frozen.layer.hold()
        try:
            present = top.run(first, count)
            for start, end, local in runs(offset, size, first, count, present):
                if local:
                    local_runs.append((start, end))
                else:
                    found[start - offset : end - offset] = await lower.read(start, end - start)
            if local_runs:
                await trio.to_thread.run_sync(_read_data, top, found, offset, local_runs)
        finally:
            top.let_go()
            if lower.frozen is not None:
                lower.frozen.layer.let_go()
        return found

    # Writes.

    def write_nowait(self, offset: int, buffer: Buffer) -> bool:
        """Write all of the buffer and return True, or False if that would wait: then `write` it.

        Raises `OSError`: ENOSPC past the disk's end, EIO.
        """
        self._check_end(offset, len(buffer))
        try:
            return self._write(offset, buffer, {})
        except OSError as error:
            if error.errno not in FULL:
                raise
            return False

    async def write(self, offset: int, buffer: Buffer) -> None:
        """Write all of the buffer, on a full file system as soon as there is space.

        Raises `OSError`, ENOSPC after `write_wait_s` too, and what the base raises.
        """
        self._check_end(offset, len(buffer))
        await self._space.when_there_is(partial(self._write_fetching, offset, buffer))

    def _check_end(self, offset: int, size: int) -> None:
        if offset + size > self.size_bytes:
            raise OSError(errno.ENOSPC, "write past the end of the disk")

    async def _write_fetching(self, offset: int, buffer: Buffer) -> None:
        fetched: dict[int, bytes | bytearray] = {}
        while not self._write(offset, buffer, fetched):
            epoch = self._epoch
            for block in self._partial_blocks(offset, len(buffer)):
                start = block << BLOCK_SHIFT
                size = min(BLOCK_BYTES, self.size_bytes - start)
                fetched[block] = await self._lower.read(start, size)
            if epoch != self._epoch:
                # a freeze put blocks below that were on top when others were fetched
                fetched.clear()

    def _partial_blocks(self, offset: int, size: int) -> list[int]:
        """Return the blocks that a write covers in part and that are not in the data file."""
        end = offset + size
        partial = []
        if offset & _IN_BLOCK:
            partial.append(offset >> BLOCK_SHIFT)
        if end & _IN_BLOCK and end != self.size_bytes and end >> BLOCK_SHIFT not in partial:
            partial.append(end >> BLOCK_SHIFT)
        return [block for block in partial if not self._bitmap.has(block)]

    def _write(self, offset: int, buffer: Buffer, fetched: dict[int, bytes | bytearray]) -> bool:
        """Decide and write in one go, so that no other write comes between; see OVERLAY.md."""
        size = len(buffer)
        end = offset + size
        if size == 0:
            return True
        first = offset >> BLOCK_SHIFT
        count = (end - 1 >> BLOCK_SHIFT) - first + 1
        if not buffer[0] and not buffer[-1] and self._is_needless(offset, buffer, first, count):
            return True
        if (offset | end) & _IN_BLOCK:
            for block in self._partial_blocks(offset, size):
                start = block << BLOCK_SHIFT
                whole = fetched.get(block)
                if whole is None:
                    whole = self._lower.read_nowait(
                        start, min(BLOCK_BYTES, self.size_bytes - start)
                    )
                if whole is None:
                    return False
                # widen the buffer by what the block has before it, and behind it
                before, behind = whole[: max(0, offset - start)], whole[end - start :]
                buffer = b"".join((before, buffer, behind))
                offset -= len(before)
                end += len(behind)
        self._top.unsynced = True
        self._data.pwrite(buffer, offset)
        self._bitmap.mark(first, count)
        return True

    def _is_needless(self, offset: int, buffer: Buffer, first: int, count: int) -> bool:
        """Tell whether a write puts zeros where nothing is but zeros of the base."""
        size = len(buffer)
        if self._bitmap.run(first, count) or not self._lower.is_zero(offset, size):
            return False
        return bytes(buffer).count(0) == size


def _read_data(top: Layer, found: bytearray, offset: int, wanted: list[tuple[int, int]]) -> None:
    for start, end in wanted:
        found[start - offset : end - offset] = top.data.pread(end - start, start)
