"""The FUSE tree: every readable image as a read-only file, every overlay disk as a writable one.

    images/ID     size of the image, mode 0444, page cache
    disks/UUID    size of the disk, mode 0600, direct I/O

Another process may continue the same kernel connection at any moment, with requests repeated. So
nothing is remembered here: inode and handle numbers follow from the numbers in the state database,
and every handler may run twice. Names time out after a second, so that a deleted one goes away
even when it was deleted while nobody served; a missing name is never cached.
"""

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from time import perf_counter
from typing import Any, Concatenate, Never, ParamSpec, Protocol, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from stratocache.cache.errors import NoSpace, NotFound, Refused, StratocacheError
from stratocache.cache.traffic import reading_for
from stratocache.fs.attributes import (
    DIRECTORIES,
    DISKS,
    FIRST_INODE,
    IMAGES,
    directory_attributes,
    disk_attributes,
    image_attributes,
    is_disk,
    number_of,
)
from stratocache.fs.disk_io import DiskIo
from stratocache.fs.overlay import BlockSource, Overlay
from stratocache.fs.records import Disk, Image

log = logging.getLogger(__name__)

_LISTED_AT_ONCE = 256
_NAME_BYTES_MAX = 255


class Inventory(Protocol):
    """What exists, and its open form. The plain methods run on the event loop and must be quick."""

    def image_by_id(self, image_id: str) -> Image | None:
        """Return an image that can be read."""

    def image_by_number(self, number: int) -> Image | None:
        """Return an image that can be read."""

    def images_after(self, number: int, limit: int) -> Sequence[Image]:
        """Return at most `limit` images of a greater number, in order."""

    def disk_by_uuid(self, uuid: str) -> Disk | None:
        """Return an overlay disk that is available."""

    def disk_by_number(self, number: int) -> Disk | None:
        """Return an overlay disk that is available."""

    def disks_after(self, number: int, limit: int) -> Sequence[Disk]:
        """Return at most `limit` overlay disks of a greater number, in order."""

    def allocated_bytes(self, disk: Disk) -> int:
        """Return the space that a disk's files take."""

    def file_system(self) -> os.statvfs_result:
        """Return the state of the file system that everything is kept on."""

    def opened_reader(self, number: int) -> BlockSource | None:
        """Return the open image of that number, or None when it has to be opened."""

    async def open_reader(self, number: int) -> BlockSource:
        """Open an image; raises `NotFound`, `NotVerified`."""

    def opened_overlay(self, number: int) -> Overlay | None:
        """Return the open overlay of that number, or None when it has to be opened."""

    async def open_overlay(self, number: int) -> Overlay:
        """Open an overlay, once for all who ask; raises `NotFound` and what `Overlay` raises."""


_P = ParamSpec("_P")
_R = TypeVar("_R")
_Handler = Callable[Concatenate["Tree", _P], Coroutine[Any, Any, _R]]


def _handler(method: _Handler[_P, _R]) -> _Handler[_P, _R]:
    """Turn whatever a handler raises into `FUSEError`: anything else ends pyfuse3's main loop."""

    @functools.wraps(method)
    async def translated(self: "Tree", /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await method(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            number = _errno_of(error)
            self.io.failed(method.__name__, args[0])  # type: ignore[arg-type]  # its first is the handle
            if isinstance(error, OSError | StratocacheError):
                log.error("%s of inode %s: %s", method.__name__, args[0], error)
            else:
                log.exception("%s of inode %s", method.__name__, args[0])
            raise FUSEError(number) from error

    return translated


def _errno_of(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, NotFound):
        return errno.ESTALE
    if isinstance(error, NoSpace):
        return errno.ENOSPC
    if isinstance(error, Refused):
        return errno.EACCES
    return errno.EIO


async def _refuse(*_: Any) -> Never:
    raise FUSEError(errno.EROFS)


_refused: Any = _refuse


class Tree(pyfuse3.Operations):
    """The handlers of one connection, over an `Inventory`.

    `on_init` runs when the kernel's INIT is being answered (see `fuse_connection`). With
    `opened_by_kernel` root, whom modes do not hold, may open images for writing, as LIO does with every file, and is
    refused when it writes. `io` is told of every read, write and flush.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        inventory: Inventory,
        on_init: Callable[[], None] | None = None,
        *,
        opened_by_kernel: bool = False,
        io: DiskIo | None = None,
    ) -> None:
        super().__init__()
        self.io = io or DiskIo()
        self._image_modes = {os.O_RDONLY, os.O_RDWR} if opened_by_kernel else {os.O_RDONLY}
        self._inventory = inventory
        self._on_init = on_init

    def init(self) -> None:
        """Run the hook; never raises."""
        try:
            if self._on_init is not None:
                self._on_init()
        except Exception:
            log.exception("the FUSE connection could not be taken over")

    # Names and attributes.

    @_handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Find a name in a directory."""
        if parent_inode == pyfuse3.ROOT_INODE:
            for inode, directory_name in DIRECTORIES.items():
                if name == directory_name:
                    return directory_attributes(inode)
        text = name.decode("ascii", "replace")
        if parent_inode == IMAGES:
            image = self._inventory.image_by_id(text)
            if image is not None:
                return image_attributes(image)
        if parent_inode == DISKS:
            disk = self._inventory.disk_by_uuid(text)
            if disk is not None:
                return self._disk_attributes(disk)
        raise FUSEError(errno.ENOENT)

    @_handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """Return an inode's attributes."""
        return self._attributes(inode)

    def _attributes(self, inode: InodeT) -> EntryAttributes:
        if inode < FIRST_INODE:
            return directory_attributes(inode)
        if is_disk(inode):
            disk = self._inventory.disk_by_number(number_of(inode))
            if disk is not None:
                return self._disk_attributes(disk)
        else:
            image = self._inventory.image_by_number(number_of(inode))
            if image is not None:
                return image_attributes(image)
        raise FUSEError(errno.ESTALE)

    def _disk_attributes(self, disk: Disk) -> EntryAttributes:
        return disk_attributes(disk, self._inventory.allocated_bytes(disk))

    @_handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Open a directory; its handle is its inode."""
        return FileHandleT(inode)

    @_handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """List a directory from where the last call ended: entries are numbered for good."""
        while True:
            entries = list(self._entries(InodeT(fh), start_id))
            for name, attributes, entry_id in entries:
                if not pyfuse3.readdir_reply(token, FileNameT(name), attributes, entry_id):
                    return
                start_id = entry_id
            if len(entries) < _LISTED_AT_ONCE:
                return

    def _entries(
        self, directory: InodeT, after: int
    ) -> Iterable[tuple[bytes, EntryAttributes, int]]:
        if directory == IMAGES:
            for image in self._inventory.images_after(after, _LISTED_AT_ONCE):
                yield image.id.encode(), image_attributes(image), image.number
        elif directory == DISKS:
            for disk in self._inventory.disks_after(after, _LISTED_AT_ONCE):
                yield disk.uuid.encode(), self._disk_attributes(disk), disk.number
        else:
            for inode, name in DIRECTORIES.items():
                if inode > after:
                    yield name, directory_attributes(inode), inode

    @_handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Do nothing: a handle is a number."""

    @_handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Return the file system below: its space is what writes to disks can use."""
        below = self._inventory.file_system()
        status = StatvfsData()
        for field in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail",
            "f_files", "f_ffree", "f_favail",
        ):  # fmt: skip
            setattr(status, field, getattr(below, field))
        status.f_namemax = _NAME_BYTES_MAX
        return status

    # Bytes.

    @_handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Open a file; its handle is its inode, so that another process knows it too."""
        handle = FileHandleT(inode)
        if is_disk(inode):
            if ctx.uid not in (0, os.geteuid()):
                raise FUSEError(errno.EACCES)
            if flags & os.O_TRUNC:
                # the kernel leaves truncation to open (FUSE_ATOMIC_O_TRUNC)
                raise FUSEError(errno.EPERM)
            await self._overlay(handle)
            # direct: the kernel holds no page of a disk, so a take-over finds none that is stale
            return FileInfo(fh=handle, direct_io=True)
        if flags & os.O_ACCMODE not in self._image_modes or flags & os.O_TRUNC:
            raise FUSEError(errno.EROFS)
        await self._reader(handle)
        return FileInfo(fh=handle, keep_cache=True)

    async def _overlay(self, handle: FileHandleT) -> Overlay:
        number = number_of(handle)
        return self._inventory.opened_overlay(number) or await self._inventory.open_overlay(number)

    async def _reader(self, handle: FileHandleT) -> BlockSource:
        number = number_of(handle)
        return self._inventory.opened_reader(number) or await self._inventory.open_reader(number)

    @_handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Read, from the event loop when nothing has to be waited for."""
        started = perf_counter()
        if is_disk(fh):
            overlay = await self._overlay(fh)
            data = overlay.read_nowait(off, size)
            if data is None:
                with reading_for(str(number_of(InodeT(fh)))):
                    data = await overlay.read(off, size)
        else:
            reader = await self._reader(fh)
            size = min(size, reader.size_bytes - off)
            if size <= 0:
                return b""
            data = reader.read_nowait(off, size)
            if data is None:
                data = await reader.read(off, size)
        self.io.read.note(fh, len(data), perf_counter() - started)
        return data  # type: ignore[return-value]  # any buffer will do

    @_handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write to a disk, all or an error."""
        if not is_disk(fh):
            raise FUSEError(errno.EROFS)
        started = perf_counter()
        overlay = await self._overlay(fh)
        if not overlay.write_nowait(off, buf):
            with reading_for(str(number_of(InodeT(fh)))):
                await overlay.write(off, buf)
        self.io.write.note(fh, len(buf), perf_counter() - started)
        return len(buf)

    @_handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Make a disk's writes durable; a failure is reported here, and from then on always."""
        if is_disk(fh):
            started = perf_counter()
            await (await self._overlay(fh)).flush()
            self.io.flush.note(fh, 0, perf_counter() - started)

    @_handler
    async def flush(self, fh: FileHandleT) -> None:
        """Do nothing when a descriptor is closed: closing promises no durability."""

    async def release(self, fh: FileHandleT) -> None:
        """Do nothing: a handle is a number. Never raises."""

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Do nothing: inodes follow from the state, nobody counts them. Never raises."""

    # Changes of the tree, all refused: it follows the state database.

    @_handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Refuse: an image never changes, a disk's size and mode are not changed here."""
        of_disk = inode >= FIRST_INODE and is_disk(inode)
        raise FUSEError(errno.EPERM if of_disk else errno.EROFS)

    mknod = mkdir = unlink = rmdir = symlink = rename = link = create = _refused
