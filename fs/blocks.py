"""What the FUSE tree shows: images and overlays of the state database, opened when first used.

Belongs to one trio loop. Looking up a row costs microseconds; opening runs in a thread, once for
all who ask. An open disk or image stays open until it is forgotten, right before its files go.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import NotFound, StratocacheError
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.images import MANIFEST_FAULTS, ImageStore
from stratocache.fs import records
from stratocache.fs.disks import DiskStore
from stratocache.fs.overlay import Overlay
from stratocache.fs.records import Disk, Image
from stratocache.fs.state import Database

_READABLE = f"state IN {records.READABLE}"
_OVERLAY = "state = 'available' AND form = 'overlay'"

_T = TypeVar("_T")


class _Openings(Generic[_T]):
    """Things open by number, each opened once however many tasks want it."""

    def __init__(self, opener: Callable[[int], Awaitable[_T]]) -> None:
        self._opener = opener
        self._locks: dict[int, trio.Lock] = {}
        self.open: dict[int, _T] = {}

    async def get(self, number: int) -> _T:
        lock = self._locks.setdefault(number, trio.Lock())
        async with lock:
            found = self.open.get(number)
            if found is None:
                found = self.open[number] = await self._opener(number)
            return found

    @asynccontextmanager
    async def withheld(self, number: int) -> AsyncIterator[_T | None]:
        """Yield what was open, which is forgotten, and let nobody open it during the block."""
        async with self._locks.setdefault(number, trio.Lock()):
            yield self.open.pop(number, None)

    def forget(self, number: int) -> _T | None:
        self._locks.pop(number, None)
        return self.open.pop(number, None)


class Blocks:
    """The tree's `Inventory` (`stratocache.fs.tree`) over the state database and its files."""

    def __init__(
        self, configuration: Configuration, db: Database, images: ImageStore, disks: DiskStore
    ) -> None:
        self._configuration = configuration
        self._db = db
        self._images = images
        self._disks = disks
        self._readers = _Openings(self._open_reader)
        self._overlays = _Openings(self._open_overlay)

    def image_by_id(self, image_id: str) -> Image | None:
        """Return an image that can be read."""
        return self._image("id = ?", image_id)

    def image_by_number(self, number: int) -> Image | None:
        """Return an image that can be read."""
        return self._image("number = ?", number)

    def _image(self, condition: str, value: object) -> Image | None:
        row = self._db.row(f"SELECT * FROM images WHERE {condition} AND {_READABLE}", value)  # nosec B608 # no value in it
        return records.image_from(row) if row else None

    def images_after(self, number: int, limit: int) -> Sequence[Image]:
        """Return at most `limit` images of a greater number, in order."""
        rows = self._db.rows(
            f"SELECT * FROM images WHERE number > ? AND {_READABLE} ORDER BY number LIMIT ?",  # nosec B608 # no value in it
            number,
            limit,
        )
        return [records.image_from(row) for row in rows]

    def disk_by_uuid(self, uuid: str) -> Disk | None:
        """Return an overlay disk that is available."""
        return self._disk("uuid = ?", uuid)

    def disk_by_number(self, number: int) -> Disk | None:
        """Return an overlay disk that is available."""
        return self._disk("number = ?", number)

    def _disk(self, condition: str, value: object) -> Disk | None:
        row = self._db.row(f"SELECT * FROM disks WHERE {condition} AND {_OVERLAY}", value)  # nosec B608 # no value in it
        return records.disk_from(row) if row else None

    def disks_after(self, number: int, limit: int) -> Sequence[Disk]:
        """Return at most `limit` overlay disks of a greater number, in order."""
        rows = self._db.rows(
            f"SELECT * FROM disks WHERE number > ? AND {_OVERLAY} ORDER BY number LIMIT ?",  # nosec B608 # no value in it
            number,
            limit,
        )
        return [records.disk_from(row) for row in rows]

    def allocated_bytes(self, disk: Disk) -> int:
        """Return the space that a disk's files take."""
        return self._disks.allocated_bytes(disk.uuid)

    def file_system(self) -> os.statvfs_result:
        """Return the state of the file system that everything is kept on."""
        return os.statvfs(self._configuration.state_dir)

    def opened_reader(self, number: int) -> ImageReader | None:
        """Return the open image of that number, or None when it has to be opened."""
        return self._readers.open.get(number)

    async def open_reader(self, number: int) -> ImageReader:
        """Open an image; raises `NotFound`, `NotVerified`."""
        return await self._readers.get(number)

    async def _open_reader(self, number: int) -> ImageReader:
        image = self.image_by_number(number)
        if image is None:
            raise NotFound("image-unknown", f"There is no image of number {number} any more.")
        return await self._images.open_reader(image.id)

    def opened_overlay(self, number: int) -> Overlay | None:
        """Return the open overlay of that number, or None when it has to be opened."""
        return self._overlays.open.get(number)

    async def open_overlay(self, number: int) -> Overlay:
        """Open an overlay, once for all who ask; raises `NotFound` and what `Overlay` raises."""
        return await self._overlays.get(number)

    async def _open_overlay(self, number: int) -> Overlay:
        disk = self.disk_by_number(number)
        if disk is None:
            raise NotFound("disk-unknown", f"There is no overlay of number {number} any more.")
        try:
            return await self._open_files(disk)
        except StratocacheError as error:
            if disk.base_manifest is None or error.code not in MANIFEST_FAULTS:
                raise
        base = await self._images.open_reader(disk.base_manifest)
        overlay = await self._open_files(disk)
        del base  # until now, so that its manifest was read once
        return overlay

    async def _open_files(self, disk: Disk) -> Overlay:
        return await trio.to_thread.run_sync(
            self._disks.open_overlay, disk.uuid, self._images.reader
        )

    @asynccontextmanager
    async def closed(self, number: int, *, flush: bool) -> AsyncIterator[None]:
        """Close a disk and keep it closed during the block, while its files are exchanged.

        Nobody may be using it. Raises `OSError` when the flush fails; it is closed then too.
        """
        async with self._overlays.withheld(number) as overlay:
            if overlay is not None:
                if flush:
                    await overlay.aclose()
                else:
                    overlay.close()
            yield

    def forget_disk(self, number: int) -> None:
        """Close a disk that nobody has attached; its files are about to go."""
        overlay = self._overlays.forget(number)
        if overlay is not None:
            overlay.close()

    def forget_image(self, number: int) -> None:
        """Let go of an image that nobody uses; its manifest is about to go."""
        self._readers.forget(number)

    async def aclose(self) -> None:
        """Flush and close every overlay; the first error is raised after all were tried."""
        failure: OSError | None = None
        for number in list(self._overlays.open):
            overlay = self._overlays.forget(number)
            try:
                if overlay is not None:
                    await overlay.aclose()
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure
