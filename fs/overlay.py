"""An overlay disk: the blocks that were written, over an image that is never written.

Format, invariants, concurrency and recovery are in OVERLAY.md. One task at a time runs between two
awaits: the argument there depends on it, so adding an await to a `_nowait` path breaks the engine.
"""

import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import trio

from stratocache.cache.errors import NotVerified
from stratocache.fs import bitmap
from stratocache.fs.bitmap import BLOCK_BYTES, BLOCK_SHIFT, Bitmap
from stratocache.fs.storage import FILES, BlockFile, Buffer, Storage

log = logging.getLogger(__name__)

_IN_BLOCK = BLOCK_BYTES - 1


class BlockSource(Protocol):
    """Bytes that never change: the base of an overlay."""

    @property
    def size_bytes(self) -> int:
        """The length; a disk may be larger, and reads zeros behind it."""

    def read_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        """Return exactly `size` bytes if that never blocks, else None."""

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Return exactly `size` bytes."""


class Overlay:
    """One open overlay disk; its methods belong to one trio loop.

    Opening blocks and raises `NotVerified` (`overlay-damaged`), `Internal` (`overlay-too-new`),
    `Conflict` (`disk-in-use`) and `OSError`.
    """

    def __init__(
        self,
        directory: Path,
        live_path: Path,
        size_bytes: int,
        base: BlockSource,
        storage: Storage = FILES,
    ) -> None:
        self.size_bytes = size_bytes
        self._base = base
        self._base_bytes = min(base.size_bytes, size_bytes)
        path = directory / "bitmap"
        self._durable = storage.open_file(path, exclusive=True)
        try:
            self._bitmap = Bitmap.load(self._durable, path, live_path, size_bytes, storage)
            try:
                self._data = _open_data(directory / "data", size_bytes, storage)
            except BaseException:
                self._bitmap.close()
                raise
        except BaseException:
            self._durable.close()
            raise
        self._bits = self._bitmap.bits
        self._unsynced = True  # the process before may have written without a flush
        self._flushing = trio.Lock()

    @staticmethod
    def create(directory: Path, size_bytes: int, storage: Storage = FILES) -> None:
        """Make the files of an overlay that has no block yet, durably, in an empty directory."""
        header = bitmap.new_header(size_bytes)
        storage.create_file(directory / "data", size_bytes, b"", reserve=False)
        length = bitmap.file_bytes(size_bytes)
        storage.create_file(directory / "bitmap", length, header, reserve=True)
        storage.sync_directory(directory)

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
            return self._base_nowait(offset, size)
        present = self._bitmap.run(first, count)
        if present == 0:
            return self._base_nowait(offset, size)
        if present == (1 << count) - 1:
            return self._data.pread_cached(size, offset)
        return self._mixed_nowait(offset, size, first, count, present)

    def _mixed_nowait(
        self, offset: int, size: int, first: int, count: int, present: int
    ) -> bytearray | None:
        found = bytearray(size)
        for start, end, local in _runs(offset, size, first, count, present):
            if local:
                piece = self._data.pread_cached(end - start, start)
            else:
                piece = self._base_nowait(start, end - start)
            if piece is None:
                return None
            found[start - offset : end - offset] = piece
        return found

    def _base_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        if offset + size <= self._base_bytes:
            return self._base.read_nowait(offset, size)
        if offset >= self._base_bytes:
            return bytes(size)
        piece = self._base.read_nowait(offset, self._base_bytes - offset)
        return None if piece is None else piece.ljust(size, b"\0")

    async def _read_base(self, offset: int, size: int) -> bytes | bytearray:
        piece = self._base_nowait(offset, size)
        if piece is None:
            wanted = min(size, self._base_bytes - offset)
            piece = (await self._base.read(offset, wanted)).ljust(size, b"\0")
        return piece

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
        present = self._bitmap.run(first, count)
        for start, end, local in _runs(offset, size, first, count, present):
            if local:
                local_runs.append((start, end))
            else:
                found[start - offset : end - offset] = await self._read_base(start, end - start)
        if local_runs:
            await trio.to_thread.run_sync(self._read_data, found, offset, local_runs)
        return found

    def _read_data(self, found: bytearray, offset: int, runs: list[tuple[int, int]]) -> None:
        for start, end in runs:
            found[start - offset : end - offset] = self._data.pread(end - start, start)

    def write_nowait(self, offset: int, buffer: Buffer) -> bool:
        """Write all of the buffer and return True, or False, with nothing done, if that would wait.

        Raises `OSError`: ENOSPC past the disk's end or on a full file system, EIO.
        """
        return self._write(offset, buffer, {})

    async def write(self, offset: int, buffer: Buffer) -> None:
        """Write all of the buffer; raises what `write_nowait` and the base raise."""
        if self._write(offset, buffer, {}):
            return
        fetched = {}
        for block in self._partial_blocks(offset, len(buffer)):
            start = block << BLOCK_SHIFT
            size = min(BLOCK_BYTES, self.size_bytes - start)
            fetched[block] = await self._read_base(start, size)
        done = self._write(offset, buffer, fetched)
        assert done, "blocks that were missing have been fetched"

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
        if end > self.size_bytes:
            raise OSError(errno.ENOSPC, "write past the end of the disk")
        if size == 0:
            return True
        first = offset >> BLOCK_SHIFT
        count = (end - 1 >> BLOCK_SHIFT) - first + 1
        if (offset | end) & _IN_BLOCK:
            for block in self._partial_blocks(offset, size):
                start = block << BLOCK_SHIFT
                whole = fetched.get(block)
                if whole is None:
                    whole = self._base_nowait(start, min(BLOCK_BYTES, self.size_bytes - start))
                if whole is None:
                    return False
                # widen the buffer by what the block has before it, and behind it
                before, behind = whole[: max(0, offset - start)], whole[end - start :]
                buffer = b"".join((before, buffer, behind))
                offset -= len(before)
                end += len(behind)
        self._unsynced = True
        self._data.pwrite(buffer, offset)
        self._bitmap.mark(first, count)
        return True

    async def flush(self) -> None:
        """Make every write that returned before the call survive power loss.

        Raises `OSError`. After a failed sync of the data file every later flush fails with EIO, in
        any process, until the host boots: the kernel reports a lost write once, a disk must not.
        """
        async with self._flushing:
            if self._bitmap.data_failed:
                raise OSError(errno.EIO, "an earlier flush of this disk failed")
            if not self._unsynced:
                return
            self._unsynced = False
            pages = self._bitmap.take_unwritten()
            try:
                await trio.to_thread.run_sync(self._sync, pages)
            except BaseException:
                self._unsynced = True
                self._bitmap.put_back(pages)
                raise

    def _sync(self, pages: dict[int, bytes]) -> None:
        try:
            self._data.fdatasync()
        except OSError as error:
            self._bitmap.set_data_failed()
            log.critical("the data of a disk could not be made durable: %s", error)
            raise
        if pages:
            self._bitmap.write(self._durable, pages)

    def close(self) -> None:
        """Close the files without a flush, as the death of the process would; no call may run."""
        self._data.close()
        self._bits.release()
        self._bitmap.close()
        self._durable.close()

    async def aclose(self) -> None:
        """Flush and close; the files are closed also when the flush raises."""
        try:
            await self.flush()
        finally:
            self.close()


def _open_data(path: Path, size_bytes: int, storage: Storage) -> BlockFile:
    data = storage.open_file(path, exclusive=False)
    if data.size() != size_bytes:
        data.close()
        raise NotVerified("overlay-damaged", f"{path} is not {size_bytes} bytes; restore the disk.")
    return data


def _runs(
    offset: int, size: int, first: int, count: int, present: int
) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, local) for each stretch of equal bits, clipped to the request."""
    done = 0
    while done < count:
        local = bool(present & 1)
        changed = ~present if local else present
        length = min((changed & -changed).bit_length() - 1 if changed else count, count - done)
        start = max(offset, first + done << BLOCK_SHIFT)
        end = min(offset + size, first + done + length << BLOCK_SHIFT)
        yield start, end, local
        present >>= length
        done += length
