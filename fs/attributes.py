"""Inode numbers and attributes of the FUSE tree, all of them derived from the state database."""

import errno
import os
import stat
from datetime import UTC, datetime, timedelta
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, InodeT, ModeT

from stratocache.fs.records import Disk, Image

IMAGES: Final = InodeT(2)
DISKS: Final = InodeT(3)
DIRECTORIES: Final = {IMAGES: b"images", DISKS: b"disks"}
"""The entries of the root."""
FIRST_INODE: Final = 16
"""Files begin here; image n and disk n of the state database follow in turn."""

_NAME_TIMEOUT_S = 1
_ATTRIBUTES_TIMEOUT_S = 3600
_DISK_ATTRIBUTES_TIMEOUT_S = 0
"""Disks grow, and whoever opens one right after that must see its new size."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def image_inode(number: int) -> InodeT:
    """Return the inode of the image with that number in the state database."""
    return InodeT(FIRST_INODE + 2 * number)


def disk_inode(number: int) -> InodeT:
    """Return the inode of the disk with that number in the state database."""
    return InodeT(FIRST_INODE + 2 * number + 1)


def is_disk(inode: int) -> bool:
    """Tell whether the inode of a file is a disk's."""
    return bool(inode & 1)


def number_of(inode: int) -> int:
    """Return the number in the state database that an inode of a file stands for."""
    return (inode - FIRST_INODE) >> 1


def directory_attributes(inode: InodeT) -> EntryAttributes:
    """Return a directory's attributes; raises `FUSEError` ESTALE when there is none."""
    if inode != pyfuse3.ROOT_INODE and inode not in DIRECTORIES:
        raise FUSEError(errno.ESTALE)
    attributes = _attributes(inode, stat.S_IFDIR | 0o755)
    attributes.st_nlink = 2
    return attributes


def image_attributes(image: Image) -> EntryAttributes:
    """Return an image's attributes; holes are counted, as nobody can see them."""
    size = image.size_bytes or 0
    return _file_attributes(image_inode(image.number), 0o444, size, size, image.created_at)


def disk_attributes(disk: Disk, allocated_bytes: int) -> EntryAttributes:
    """Return a disk's attributes; its blocks are the space that its files take."""
    attributes = _file_attributes(
        disk_inode(disk.number), 0o600, disk.size_bytes, allocated_bytes, disk.created_at
    )
    attributes.attr_timeout = _DISK_ATTRIBUTES_TIMEOUT_S
    return attributes


def _file_attributes(
    inode: InodeT, permissions: int, size: int, allocated: int, created_at: str
) -> EntryAttributes:
    attributes = _attributes(inode, stat.S_IFREG | permissions)
    attributes.st_size = size
    attributes.st_blocks = (allocated + 511) // 512
    # the kernel drops its pages when this changes: it must be the same in every process
    created = (datetime.fromisoformat(created_at) - _EPOCH) // timedelta(microseconds=1) * 1000
    attributes.st_mtime_ns = attributes.st_ctime_ns = attributes.st_atime_ns = created
    return attributes


def _attributes(inode: InodeT, mode: int) -> EntryAttributes:
    attributes = EntryAttributes()
    attributes.st_ino = inode
    attributes.st_mode = ModeT(mode)
    attributes.st_nlink = 1
    attributes.st_uid = os.geteuid()
    attributes.st_gid = os.getegid()
    attributes.st_blksize = 4096
    attributes.entry_timeout = _NAME_TIMEOUT_S
    attributes.attr_timeout = _ATTRIBUTES_TIMEOUT_S
    return attributes
