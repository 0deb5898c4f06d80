"""An overlay disk: the blocks that were written, over an image that is never written.

Format, invariants, concurrency and recovery are in OVERLAY.md and CRASH.md. Here are flushes and the
changes of the layers; `blockio.py` has reads and writes.
"""

import errno
from collections.abc import Callable
from functools import partial

import trio

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import Conflict, NotFound, NotVerified
from stratocache.fs.base import Base, BlockSource
from stratocache.fs.bitmap import BLOCK_BYTES, BLOCK_SHIFT
from stratocache.fs.blockio import LayeredBlocks
from stratocache.fs.filling import filler_of
from stratocache.fs.layers import RAW, DiskFiles, Layout
from stratocache.fs.stack import FrozenLayer, Layer, RawLayer, runs
from stratocache.fs.waiting import SpaceWait

__all__ = ["BlockSource", "FrozenLayer", "Overlay"]


class Overlay(LayeredBlocks):
    """One open overlay disk; its methods belong to one trio loop.

    Opening blocks and raises `NotVerified` (`overlay-damaged`), `Internal` (`overlay-too-new`),
    `Conflict` (`disk-in-use`), `NotFound` (`disk-unknown`), `OSError` and what `base_reader_of`
    raises; that is called with the name of the base, if there is one. On a full file system `write`
    waits up to `write_wait_s`; `on_full` is called when a disk begins to wait.
    """

    def __init__(
        self,
        files: DiskFiles,
        base_reader_of: Callable[[str], BlockSource],
        *,
        write_wait_s: float = 0.0,
        on_full: Callable[[], None] = lambda: None,
    ) -> None:
        layout = files.layout()
        if layout is None:
            raise NotFound("disk-unknown", f"There is no overlay disk in {files.directory}.")
        self._files = files
        self._layout = layout
        self._changing = trio.Lock()  # taken by flushes and by every change of the layers
        self._spare: Layer | None = None
        top = Layer(files, layout.top, layout.size_bytes)
        try:
            if files.layout() != layout:
                raise Conflict("disk-in-use", f"{files.directory} is changed by another process.")
            # a process that died may have renamed the layout and not synced that
            files.storage.sync_directory(files.directory)
            files.sweep(layout)
            base = Base(None if layout.base is None else base_reader_of(layout.base))
            if base.size_bytes > layout.size_bytes:
                raise NotVerified(
                    "overlay-damaged", f"{files.directory} is smaller than its base; restore it."
                )
            lower = _open_lower(files, layout, base)
        except BaseException:
            top.close()
            raise
        space = SpaceWait(files.directory, write_wait_s, on_full)
        super().__init__(top, lower, layout.size_bytes, space)

    @property
    def frozen(self) -> FrozenLayer | None:
        """The layer that a snapshot is made of, until `rebase`."""
        return self._lower.frozen

    @property
    def local_bytes(self) -> int:
        """How much of the disk does not need what is below its top layer."""
        return min(self._bitmap.count() << BLOCK_SHIFT, self.size_bytes)

    # Durability.

    async def flush(self) -> None:
        """Make every write that returned before the call survive power loss.

        Raises `OSError`. After a failed sync of the data file every later flush fails with EIO, in
        any process, until the host boots: the kernel reports a lost write once, a disk must not.
        """
        async with self._changing:
            await self._flush_layers()

    async def _flush_layers(self) -> None:
        if self._lower.frozen is not None:
            await self._lower.frozen.layer.flush()
        await self._top.flush()

    # Changes of the layers: first the files, then the layout, then, without an await, our memory.

    async def freeze(self) -> None:
        """Begin a snapshot: put an empty layer on top; what was written is `frozen` and durable.

        Does nothing while a layer is frozen. Raises `OSError`; then call it again, also in another
        process, before anything else relies on `frozen`.
        """
        async with self._changing:
            if self._lower.frozen is None:
                await self._flush_layers()
                layout = self._layout
                changed = Layout(
                    size_bytes=self.size_bytes,
                    top=layout.next_layer,
                    frozen=layout.top,
                    frozen_size_bytes=self.size_bytes,
                    base=layout.base,
                )
                # kept when the layout cannot be written: perhaps it was, and names these files
                if self._spare is None:
                    self._spare = await trio.to_thread.run_sync(self._new_layer, changed.top)
                await trio.to_thread.run_sync(self._files.write_layout, changed)
                top, self._spare = self._spare, None
                assert isinstance(self._lower, Base)
                self._lower = FrozenLayer(self._top, self.size_bytes, self._lower)
                self._layout = changed
                self._put_on_top(top)
                self._epoch += 1
            # what was written since the first flush is the snapshot's too
            await self._flush_layers()

    def _new_layer(self, name: str) -> Layer:
        self._files.remove_layer(name)
        Layer.create(self._files, name, self.size_bytes)
        self._files.storage.sync_directory(self._files.directory)
        return Layer(self._files, name, self.size_bytes)

    async def rebase(self, base: BlockSource, base_name: str) -> None:
        """End a snapshot: read from `base`, which has the frozen layer's bytes, and remove that.

        `base` must be durable. Does nothing when the disk has that base and nothing is frozen.
        Raises `Conflict` (`nothing-frozen`) and `OSError`; EIO also when writes of the frozen layer
        have been lost, which would be forgotten with it.
        """
        async with self._changing:
            frozen = self._lower.frozen
            if frozen is None:
                if self._layout.base == base_name:
                    return
                raise Conflict("nothing-frozen", "No snapshot of this disk is being made.")
            if frozen.layer.data_failed:
                raise OSError(errno.EIO, "an earlier flush of this disk failed")
            if base.size_bytes != frozen.size_bytes:
                raise ValueError(
                    f"{base_name} has {base.size_bytes} bytes, {frozen.size_bytes} not"
                )
            changed = Layout(self.size_bytes, self._layout.top, None, None, base_name)
            await trio.to_thread.run_sync(self._files.write_layout, changed)
            self._lower = Base(base)
            self._layout = changed
            frozen.layer.retire()
            await trio.to_thread.run_sync(self._files.remove_layer, frozen.layer.name)

    async def grow(self, size_bytes: int) -> None:
        """Make the disk larger, by zeros, durably; the size it has is no change.

        Raises `ValueError` for less than it has, and `OSError`: then the size is as before; should a
        second error follow, it may be the new one in the next process.
        """
        async with self._changing:
            if size_bytes < self.size_bytes:
                raise ValueError(f"a disk of {self.size_bytes} bytes does not shrink")
            if size_bytes == self.size_bytes:
                return
            await self._drop_spare()
            layout = self._layout
            changed = Layout(
                size_bytes, layout.top, layout.frozen, layout.frozen_size_bytes, layout.base
            )
            await trio.to_thread.run_sync(self._top.extend, size_bytes)
            try:
                await trio.to_thread.run_sync(self._files.write_layout, changed)
                self._bitmap.grow(size_bytes)
            except OSError:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._files.restore, layout)
                raise
            self._bits = self._bitmap.bits
            self._layout = changed
            self.size_bytes = size_bytes

    async def _drop_spare(self) -> None:
        """Go back from a freeze whose layout could not be written: name the old layers again."""
        if self._spare is not None:
            await trio.to_thread.run_sync(self._files.write_layout, self._layout)
            spare, self._spare = self._spare, None
            spare.retire()

    async def fill(self, progress: Callable[[int], None], *, reflink: bool) -> None:
        """Bring every block into the top layer and flush; what is there already is not copied.

        `progress` gets the number of bytes done, which falls back when a snapshot is made
        meanwhile. With `reflink` the extents of chunk files are shared where that works. Can be
        cancelled and begun again at any time. Raises `OSError`, as `write` does on a full file
        system, and what the base raises.
        """
        index = 0
        while index * CHUNK_BYTES < self.size_bytes:
            epoch = self._epoch
            await self._space.when_there_is(partial(self._fill_chunk, index, reflink))
            # a snapshot emptied the top layer: from the beginning
            index = index + 1 if epoch == self._epoch else 0
            progress(min(index * CHUNK_BYTES, self.size_bytes))
            await trio.lowlevel.checkpoint()
        await self.flush()

    async def _fill_chunk(self, index: int, reflink: bool) -> None:
        start = index * CHUNK_BYTES
        first = start >> BLOCK_SHIFT
        while True:
            epoch, lower = self._epoch, self._lower
            size = min(CHUNK_BYTES, self.size_bytes - start)
            count = (size + BLOCK_BYTES - 1) >> BLOCK_SHIFT
            if self._bitmap.run(first, count) == (1 << count) - 1:
                return
            filler = await filler_of(lower, index, size, share=reflink)
            if epoch == self._epoch and size == min(CHUNK_BYTES, self.size_bytes - start):
                break
        # without an await from here, so that no write comes between
        self._top.unsynced = True
        present = self._bitmap.run(first, count)
        for begin, end, local in runs(start, size, first, count, present):
            if not local:
                filler(self._data, begin, end)
                blocks = (end - begin + BLOCK_BYTES - 1) >> BLOCK_SHIFT
                self._bitmap.mark(begin >> BLOCK_SHIFT, blocks)

    def close(self) -> None:
        """Close the files without a flush, as the death of the process would; no call may run."""
        self._top.close()
        if self._spare is not None:
            self._spare.close()
        if self._lower.frozen is not None:
            self._lower.frozen.layer.close()

    async def aclose(self) -> None:
        """Flush and close; the files are closed also when the flush raises."""
        try:
            await self.flush()
        finally:
            self.close()


def _open_lower(files: DiskFiles, layout: Layout, base: Base) -> Base | FrozenLayer:
    if layout.frozen is None:
        return base
    size_bytes = layout.frozen_size_bytes or 0
    if base.size_bytes > size_bytes:
        raise NotVerified(
            "overlay-damaged", f"{files.directory} is smaller than its base; restore it."
        )
    if layout.frozen == RAW:
        return FrozenLayer(RawLayer(files, size_bytes), size_bytes, base)
    layer = Layer(files, layout.frozen, size_bytes)
    return FrozenLayer(layer, size_bytes, base)
