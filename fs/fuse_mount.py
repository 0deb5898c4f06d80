"""The FUSE connection as the supervisor holds it: opened, mounted, kept over deaths, taken down.

Standard library only. Whoever holds the descriptor of `/dev/fuse` keeps the connection alive, so
the file system survives the process that answers its requests. The kernel sends FUSE_INIT once per
connection; it is read here and kept in a file for every process that serves the connection
(`stratocache.fs.fuse_connection`). Nothing here opens or looks at a file of the mount itself: that
would wait for ever when nobody serves it.

Source: fuse(4), mount(2), `include/uapi/linux/fuse.h`, `Documentation/filesystems/fuse`.
"""

import ctypes
import errno
import logging
import os
import re
import select
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from stratocache.cache.errors import Conflict, Internal

_LIBC = ctypes.CDLL(None, use_errno=True)

log = logging.getLogger(__name__)

_FSTYPE = "fuse.stratocache"
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MNT_FORCE, _MNT_DETACH = 1, 2

_BACKGROUND_MAX = 1024
"""Reads ahead at a time of all images together. The kernel's own 12 are soon used up by images whose
origin says nothing, and then no other image's pages are read."""
_MAX_READ_BYTES = 1024**2
_READ_AHEAD_BYTES = 1024**2
"""What the kernel reads ahead of whoever reads in order. Its own 128 KiB make each request as small,
and a request costs more than its bytes."""
_READ_BUFFER_BYTES = 64 * 1024  # fuse.h wants FUSE_MIN_READ_BUFFER = 8192 at least
_FUSE_INIT = 26
_HEADER = struct.Struct("<II")  # of struct fuse_in_header: len, opcode
_HEADER_BYTES = 40
_INIT_FLAGS = struct.Struct("<IIIII")  # struct fuse_init_in: major, minor, readahead, flags, flags2
_INIT_READ_AHEAD = _HEADER_BYTES + 8
_INIT_EXT = 1 << 30
_HAS_RESEND = 1 << (39 - 32)  # in flags2
_OUT_HEADER = struct.Struct("<IiQ")  # struct fuse_out_header: len, error, unique
_NOTIFY_RESEND = _OUT_HEADER.pack(16, 7, 0)  # the code stands in the place of the error
_UNIQUE = struct.Struct("<Q")  # in struct fuse_in_header, behind len and opcode
_INTERRUPT_BIT = 1  # in `unique`: FUSE_INT_REQ_BIT of the kernel's fs/fuse/fuse_dev_i.h


class FuseMount:
    """A mounted FUSE connection; `create` makes one, `adopt` goes on with one."""

    def __init__(self, mount_point: Path, init_file: Path, descriptor: int) -> None:
        """Take a descriptor whose FUSE_INIT is in `init_file`; raises `OSError`, `Internal`."""
        self.mount_point = mount_point
        self.descriptor = descriptor
        self._init_file = init_file
        request = init_file.read_bytes()
        _require_init(request)
        self.can_resend = _can_resend(request)
        (self._init_unique,) = _UNIQUE.unpack_from(request, _HEADER.size)

    @classmethod
    def create(cls, mount_point: Path, init_file: Path) -> Self:
        """Mount; `mount_point` must be an empty folder. Raises `Internal` (`fuse-unavailable`)."""
        try:
            descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _unavailable(error) from error
        try:
            _mount(descriptor, mount_point)
        except OSError as error:
            os.close(descriptor)
            raise _unavailable(error) from error
        try:
            _keep_init(descriptor, init_file)
            _widen(mount_point)
            return cls(mount_point, init_file, descriptor)
        except BaseException:
            unmount(mount_point)
            os.close(descriptor)
            raise

    @classmethod
    def adopt(cls, mount_point: Path, init_file: Path, descriptor: int) -> Self | None:
        """Go on with a connection that outlived its supervisor; None when that cannot be.

        It cannot when it was aborted or unmounted, or when this kernel does not send again what
        the dead processes had read.
        """
        try:
            mount = cls(mount_point, init_file, descriptor)
        except (OSError, Internal):
            return None
        alone = mounted_at(mount_point) == [_FSTYPE]
        if not (alone and mount.can_resend and mount.connected):
            return None
        _widen(mount_point)
        return mount

    @property
    def connected(self) -> bool:
        """Whether the kernel's side still exists; false after an unmount or abort by others."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return not any(events & select.POLLERR for _, events in poll.poll(0))

    def resend(self) -> None:
        """Queue again what a dead process had read and not answered (Linux 6.9).

        Not before FUSE_INIT has been answered: nothing else can have been asked then, and libfuse
        answers a second FUSE_INIT with an error, after which the kernel refuses every request.
        Raises `OSError` when the kernel cannot or the connection is gone.
        """
        if self._init_answered():
            os.write(self.descriptor, _NOTIFY_RESEND)

    def _init_answered(self) -> bool:
        """Ask the kernel by an answer to an interrupt of FUSE_INIT, which changes nothing."""
        answer = _OUT_HEADER.pack(_OUT_HEADER.size, 0, self._init_unique | _INTERRUPT_BIT)
        try:
            os.write(self.descriptor, answer)
        except FileNotFoundError:  # it waits for no answer
            return True
        return False

    def unmount(self) -> None:
        """Abort the connection, so that nobody waits on it any more, and take the mount away."""
        with suppress(FileNotFoundError):
            unmount(self.mount_point)
        os.close(self.descriptor)
        self._init_file.unlink(missing_ok=True)


def unmount_stale(mount_point: Path) -> int:
    """Take away FUSE mounts that a dead predecessor left at a path, stacked ones too.

    Returns their number. Raises `Conflict` (`mount-point-busy`) when something else is mounted.
    """
    mounted = mounted_at(mount_point)
    for fstype in reversed(mounted):
        if not fstype.startswith("fuse"):
            raise Conflict(
                "mount-point-busy",
                f"A {fstype} file system is mounted at {mount_point}; unmount it.",
            )
        unmount(mount_point)
    return len(mounted)


def unmount(mount_point: Path) -> None:
    """Abort and detach the topmost mount at a path; none is fine."""
    if _LIBC.umount2(os.fsencode(mount_point), _MNT_FORCE | _MNT_DETACH):
        number = ctypes.get_errno()
        if number != errno.EINVAL:  # not a mount point
            raise OSError(number, os.strerror(number), os.fspath(mount_point))


def _mount(descriptor: int, mount_point: Path) -> None:
    options = (
        f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,"
        f"allow_other,default_permissions,max_read={_MAX_READ_BYTES}"
    )
    _call_mount(mount_point, _FSTYPE, _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)


def _call_mount(mount_point: Path, fstype: str, flags: int, options: str) -> None:
    if _LIBC.mount(
        b"stratocache", os.fsencode(mount_point), fstype.encode(), flags, options.encode()
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(mount_point))


def _widen(mount_point: Path) -> None:
    """Let more and longer reads ahead be under way at once; without that all works, but slower,
    and when an origin is dead others wait for it."""
    control = mount_point.with_name("fusectl")
    try:
        control.mkdir(mode=0o700, exist_ok=True)
        unmount(control)  # what a supervisor that was killed here left, on which none can be put
        _call_mount(control, "fusectl", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "")
        try:
            device = _mounts_at(mount_point)[-1].device
            folder = control / device.rpartition(":")[2]
            (folder / "max_background").write_text(str(_BACKGROUND_MAX))
            (folder / "congestion_threshold").write_text(str(_BACKGROUND_MAX * 3 // 4))
            # last: where /sys is read-only, as in containers, the others still hold
            read_ahead = Path("/sys/class/bdi", device, "read_ahead_kb")
            read_ahead.write_text(str(_READ_AHEAD_BYTES // 1024))
        finally:
            unmount(control)
            control.rmdir()
    except (OSError, IndexError) as error:
        log.warning("reads of images may be slower, or wait for each other: %s", error)


@dataclass(frozen=True)
class _Mounted:
    """One line of `/proc/self/mountinfo`."""

    fstype: str
    device: str
    """Major and minor number of the file system, with a colon."""


def mounted_at(mount_point: Path) -> list[str]:
    """Return the types of the mounts at a path, the topmost last; does not look at the path."""
    return [mounted.fstype for mounted in _mounts_at(mount_point)]


def _mounts_at(mount_point: Path) -> list[_Mounted]:
    wanted = os.fspath(mount_point)
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if path == wanted:
            found.append(_Mounted(fields[fields.index("-") + 1], fields[2]))
    return found


def _keep_init(descriptor: int, init_file: Path) -> None:
    request = bytearray(os.read(descriptor, _READ_BUFFER_BYTES))
    _require_init(request)
    # libfuse answers with what was asked for, and the kernel takes the lesser of that and `_widen`
    struct.pack_into("<I", request, _INIT_READ_AHEAD, _READ_AHEAD_BYTES)
    partial = init_file.with_name(init_file.name + ".new")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(request)
    partial.rename(init_file)


def _require_init(request: bytes | bytearray) -> None:
    if len(request) < _HEADER_BYTES or _HEADER.unpack_from(request) != (len(request), _FUSE_INIT):
        raise Internal("fuse-unavailable", "The kernel did not begin with FUSE_INIT.")


def _can_resend(request: bytes) -> bool:
    if len(request) < _HEADER_BYTES + _INIT_FLAGS.size:
        return False
    *_, flags, flags2 = _INIT_FLAGS.unpack_from(request, _HEADER_BYTES)
    return bool(flags & _INIT_EXT and flags2 & _HAS_RESEND)


def _unavailable(error: OSError) -> Internal:
    return Internal(
        "fuse-unavailable",
        f"FUSE cannot be used here ({error}); run as root on a kernel with FUSE (modprobe fuse).",
    )
