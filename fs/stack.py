"""What an overlay disk is made of: layers of written blocks, and the base below them.

A `Layer` is a data file and its bitmap. Below the top is the *lower*: a `Base`, or a
`FrozenLayer` over a `Base`; both answer the same calls, so that a disk without a frozen layer pays
nothing for those that have one. See OVERLAY.md.
"""

import errno
import logging
from collections.abc import Iterator
from pathlib import Path

import trio

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotVerified
from stratocache.fs import bitmap
from stratocache.fs.base import Base
from stratocache.fs.bitmap import BLOCK_BYTES, BLOCK_SHIFT, Bitmap
from stratocache.fs.layers import RAW, DiskFiles
from stratocache.fs.storage import BlockFile

log = logging.getLogger(__name__)

_BLOCKS_PER_CHUNK = CHUNK_BYTES >> BLOCK_SHIFT


class _Held:
    """Files that stay open as long as somebody uses them; for one thread."""

    _users = 0
    _retired = False

    def hold(self) -> None:
        """Keep the files open until `let_go`: a thread is about to use them."""
        self._users += 1

    def let_go(self) -> None:
        """End a `hold`."""
        self._users -= 1
        if self._retired and self._users == 0:
            self.close()

    def retire(self) -> None:
        """Close as soon as nobody holds the files."""
        self._retired = True
        if self._users == 0:
            self.close()

    def close(self) -> None:
        """Close the files; nothing is synced."""
        raise NotImplementedError


class Layer(_Held):
    """An open layer: the blocks that were written into it, and which those are.

    `size_bytes` is the length of the disk that it is for. Opening blocks and raises `NotVerified` (`overlay-damaged`), `Internal` (`overlay-too-new`),
    `Conflict` (`disk-in-use`) and `OSError`.
    """

    def __init__(self, files: DiskFiles, name: str, size_bytes: int) -> None:
        self.name = name
        path = files.bitmap(name)
        self._durable = files.storage.open_file(path, exclusive=True)
        try:
            self.bitmap = Bitmap.load(self._durable, path, files.live(name), files.storage)
            try:
                # both may be longer: the trace of a growth that a crash ended
                _check_size(path, self.bitmap.size_bytes, size_bytes)
                self.data = _open_data(files, name, size_bytes)
            except BaseException:
                self.bitmap.close()
                raise
        except BaseException:
            self._durable.close()
            raise
        self.unsynced = True  # the process before may have written without a flush

    @staticmethod
    def create(files: DiskFiles, name: str, size_bytes: int) -> None:
        """Make the files of a layer without a block, durably; the caller syncs the directory."""
        header = bitmap.new_header(size_bytes)
        files.storage.create_file(files.data(name), size_bytes, b"", reserve=False)
        length = bitmap.file_bytes(size_bytes)
        files.storage.create_file(files.bitmap(name), length, header, reserve=True)

    async def flush(self) -> None:
        """Make every write that returned before the call survive power loss; one call at a time.

        Raises `OSError`. After a failed sync of the data file every later flush fails with EIO, in
        any process, until the host boots: the kernel reports a lost write once, a disk must not.
        """
        if self.bitmap.data_failed:
            raise OSError(errno.EIO, "an earlier flush of this disk failed")
        if not self.unsynced:
            return
        self.unsynced = False
        pages = self.bitmap.take_unwritten()
        try:
            await trio.to_thread.run_sync(self._sync, pages)
        except BaseException:
            self.unsynced = True
            self.bitmap.put_back(pages)
            raise

    def _sync(self, pages: dict[int, bytes]) -> None:
        try:
            self.data.fdatasync()
        except OSError as error:
            self._remember_loss(error)
            raise
        if pages:
            self.bitmap.write(self._durable, pages)

    def _remember_loss(self, error: OSError) -> None:
        """Note that a sync of the data failed: the kernel says so once, to whichever call it was."""
        self.bitmap.set_data_failed()
        log.critical("the data of a disk could not be made durable: %s", error)

    def sync_now(self) -> None:
        """Make all of the layer durable, as `flush` does; blocks, of an overlay that is closed."""
        if self.data_failed:
            raise OSError(errno.EIO, "an earlier flush of this disk failed")
        self._sync(self.bitmap.take_unwritten())

    def extend(self, size_bytes: int) -> None:
        """Let the files have room for a larger disk, durably; `Bitmap.grow` comes after."""
        try:
            self.data.extend(size_bytes, reserve=False)
        except OSError as error:
            if self.data.size() >= size_bytes:  # it is longer, so the sync has failed
                self._remember_loss(error)
            raise
        self.bitmap.extend(self._durable, size_bytes)

    def cut(self, size_bytes: int) -> None:
        """Let the data be no longer than the disk, durably."""
        if self.data.size() <= size_bytes:
            return
        try:
            self.data.cut(size_bytes)
        except OSError as error:
            if self.data.size() <= size_bytes:
                self._remember_loss(error)
            raise

    def run(self, first: int, count: int) -> int:
        """Return which of `count` blocks are in this layer, bit i = block `first` + i."""
        return self.bitmap.run(first, count)

    def chunks(self, size_bytes: int) -> Iterator[int]:
        """Yield the chunks that have a block in this layer."""
        bits, step = self.bitmap.bits, _BLOCKS_PER_CHUNK >> 3
        for index in range(-(-size_bytes // CHUNK_BYTES)):
            if any(bits[index * step : (index + 1) * step]):
                yield index

    @property
    def data_failed(self) -> bool:
        """Whether writes of this layer may be lost."""
        return self.bitmap.data_failed

    def close(self) -> None:
        """Close the files; nothing is synced."""
        self.data.close()
        self.bitmap.close()
        self._durable.close()


class RawLayer(_Held):
    """A raw disk's file as a layer that has every block; it was synced before it became one."""

    data_failed = False

    def __init__(self, files: DiskFiles, size_bytes: int) -> None:
        self.name = RAW
        self.data = _open_data(files, RAW, size_bytes)
        self._blocks = (size_bytes + BLOCK_BYTES - 1) >> BLOCK_SHIFT

    async def flush(self) -> None:
        """Do nothing."""

    def run(self, first: int, count: int) -> int:
        """Return ones for all blocks up to the end."""
        return (1 << max(0, min(count, self._blocks - first))) - 1

    def chunks(self, size_bytes: int) -> Iterator[int]:
        """Yield the chunks that are not holes."""
        offset = self.data.data_after(0)
        while offset is not None and offset < size_bytes:
            yield offset // CHUNK_BYTES
            offset = self.data.data_after((offset // CHUNK_BYTES + 1) * CHUNK_BYTES)

    def close(self) -> None:
        """Close the file."""
        self.data.close()


class FrozenLayer:
    """A layer that never changes again, over its base: what a snapshot is made of.

    The `_nowait` call belongs to the event loop; `chunks` and `read_chunk` are for any thread, up
    to `Overlay.rebase` or the end of the overlay.
    """

    def __init__(self, layer: Layer | RawLayer, size_bytes: int, base: Base) -> None:
        self.size_bytes = size_bytes
        """Length of the disk when the layer was frozen."""
        self.layer = layer
        self.base = base
        self.frozen: FrozenLayer | None = self

    def chunks(self) -> Iterator[int]:
        """Yield, in order, the indexes of the chunks that are not simply the base's.

        The others have the base's digest, or are zeros behind its end. Where the base ends within
        a chunk, and the disk does not, that chunk is longer than the base's and is yielded too.
        """
        longer = -1
        if self.size_bytes > self.base.size_bytes and self.base.size_bytes % CHUNK_BYTES:
            longer = self.base.size_bytes // CHUNK_BYTES
        for index in self.layer.chunks(self.size_bytes):
            if 0 <= longer < index:
                yield longer
            if longer <= index:
                longer = -1
            yield index
        if longer >= 0:
            yield longer

    def read_chunk(self, index: int) -> bytes:
        """Return one chunk, frozen over base; the last may be short. Blocks.

        Raises `OSError`, EIO also when writes to the layer have been lost: what it holds now is
        not what was acknowledged. Raises what the base raises.
        """
        start = index * CHUNK_BYTES
        size = min(CHUNK_BYTES, self.size_bytes - start)
        if size <= 0:
            raise IndexError(index)
        return bytes(self.read_blocking(start, size))

    def _runs(self, offset: int, size: int) -> Iterator[tuple[int, int, bool]]:
        first = offset >> BLOCK_SHIFT
        count = (offset + size - 1 >> BLOCK_SHIFT) - first + 1
        return runs(offset, size, first, count, self.layer.run(first, count))

    def read_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        """Return exactly `size` bytes, zeros behind the end, or None if that would wait."""
        found = bytearray(size)
        for start, end, local in self._runs(offset, size):
            if local:
                # the last block may be cut, by the end of the disk when it was frozen
                piece = self.layer.data.pread_cached(min(end, self.size_bytes) - start, start)
            else:
                piece = self.base.read_nowait(start, end - start)
            if piece is None:
                return None
            found[start - offset : start - offset + len(piece)] = piece
        return found

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Return exactly `size` bytes; raises what the source raises."""
        found = self.read_nowait(offset, size)
        if found is None:
            self.layer.hold()
            try:
                found = await trio.to_thread.run_sync(self._read, offset, size)
            finally:
                self.layer.let_go()
        return found

    def read_blocking(self, offset: int, size: int) -> bytearray:
        """Return exactly `size` bytes, from any thread; EIO when writes have been lost."""
        if self.layer.data_failed:
            raise OSError(errno.EIO, "an earlier flush of this disk failed")
        return self._read(offset, size)

    def _read(self, offset: int, size: int) -> bytearray:
        found = bytearray(size)
        for start, end, local in self._runs(offset, size):
            if local:
                piece: bytes | bytearray = self.layer.data.pread(
                    min(end, self.size_bytes) - start, start
                )
            else:
                piece = self.base.read_blocking(start, end - start)
            found[start - offset : start - offset + len(piece)] = piece
        return found

    def is_zero(self, offset: int, size: int) -> bool:
        """Tell whether a range is known, without reading it, to be zeros."""
        first = offset >> BLOCK_SHIFT
        count = (offset + size - 1 >> BLOCK_SHIFT) - first + 1
        return self.layer.run(first, count) == 0 and self.base.is_zero(offset, size)

    def open_chunk(self, index: int, size: int) -> int | None:
        """Return what the base does, or None when the layer has a block of the chunk."""
        if self.layer.run(index * _BLOCKS_PER_CHUNK, _BLOCKS_PER_CHUNK):
            return None
        return self.base.open_chunk(index, size)


def _open_data(files: DiskFiles, layer: str, size_bytes: int) -> BlockFile:
    path = files.data(layer)
    data = files.storage.open_file(path, exclusive=False)
    try:
        _check_size(path, data.size(), size_bytes)
    except BaseException:
        data.close()
        raise
    return data


def _check_size(path: Path, found: int, wanted: int) -> None:
    if found < wanted:
        raise NotVerified(
            "overlay-damaged",
            f"{path} is for {found} bytes of a disk of {wanted}; restore the disk.",
        )


def runs(
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
