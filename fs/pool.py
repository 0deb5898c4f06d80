"""The pool: an XFS file mounted over the state directory, for hosts whose file system has no
reflinks.

Everything below STATE_DIR is then in the pool, so that chunks, disks and stage are on one file
system, free space is the pool's, and no other module knows. `pool.json` is kept twice: in the
directory that the mount hides, where it says what to mount, and inside the pool. POOL.md has the
reasons. Standard library only, as the supervisor uses it.
"""

import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from stratocache.cache.errors import Internal, InvalidInput, NotFound, NotVerified
from stratocache.cache.space import full_disk_is_no_space, no_space

log = logging.getLogger(__name__)

RECORD_NAME = "pool.json"
POOL_BYTES_MIN = 512 * 1024**2
"""mkfs.xfs makes nothing below 300 MiB, and a log of a sensible size needs more."""

_VERSION = 1
_RECORD_BYTES_MAX = 64 * 1024
_BLOCK_BYTES = 4096
_PROGRAM_TIMEOUT_S = 300
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
_XFS_MAGIC = b"XFSB"
_XFS_UUID = slice(32, 48)  # struct xfs_dsb: sb_uuid


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A pool as it is now."""

    path: str
    uuid: str
    sparse: bool
    size_bytes: int
    """Of the file, which is what the file system fills."""
    allocated_bytes: int
    """What the file takes of the file system that it is in."""
    mounted: bool
    free_bytes: int | None
    """Inside the pool; None when it is not mounted."""


@dataclass(frozen=True, slots=True)
class Pool:
    """One state directory's pool. Methods need root and block.

    They raise `NotFound` (`program-missing`), `Internal` (`pool-program-failed`), `NotVerified`
    (`pool-missing`, `pool-foreign`) and `OSError`.
    """

    state_dir: Path
    path: Path
    uuid: str
    sparse: bool

    @classmethod
    def read(cls, state_dir: Path) -> Self | None:
        """Return the pool of a state directory, None when it has none.

        Raises `NotVerified` (`pool-record-damaged`): what is below an unmounted pool must not be
        used as if there were none.
        """
        path = state_dir / RECORD_NAME
        try:
            with path.open("rb") as file:
                record = json.loads(file.read(_RECORD_BYTES_MAX))
            if record["version"] != _VERSION:
                raise ValueError(f"version {record['version']!r}")
            return cls(state_dir, Path(record["path"]), str(record["uuid"]), bool(record["sparse"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise NotVerified(
                "pool-record-damaged",
                f"{path} is not a record of a pool that this version knows ({error!r}); restore "
                "it, or install the version that wrote it.",
            ) from None

    def write(self, directory: Path) -> None:
        """Write the record into a directory: beside, fsync, rename, fsync of the directory."""
        record = {
            "version": _VERSION,
            "path": str(self.path),
            "uuid": self.uuid,
            "sparse": self.sparse,
        }
        fresh = directory / f".{RECORD_NAME}.new"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(directory / RECORD_NAME)
        sync_directory(directory)

    @property
    def mounted(self) -> bool:
        """Whether the pool is what is mounted on top at the state directory."""
        return self._device() is not None

    def _device(self) -> str | None:
        found = mounted_at(self.state_dir)
        if found is None or not found.startswith("/dev/loop"):
            return None
        backing = Path("/sys/block", Path(found).name, "loop/backing_file")
        try:
            named = backing.read_text().rstrip("\n")
            return found if os.path.samefile(named, self.path) else None
        except OSError:
            return None

    def mount(self) -> None:
        """Mount the pool over the state directory, unless it is; verified by its XFS UUID."""
        if self.mounted:
            return
        self._verify()
        mount_file(self.path, self.state_dir, discard=self.sparse)
        inside = Pool.read(self.state_dir)
        if inside is None or inside.uuid != self.uuid:
            run_program("umount", str(self.state_dir))
            raise self._foreign("it has no record of this pool")

    def _verify(self) -> None:
        try:
            with self.path.open("rb") as file:
                superblock = file.read(512)
        except FileNotFoundError:
            raise NotVerified(
                "pool-missing",
                f"The pool {self.path} of {self.state_dir} is not there; mount the file system it "
                "is in, or restore it.",
            ) from None
        if not superblock.startswith(_XFS_MAGIC):
            raise self._foreign("it holds no XFS file system")
        if superblock[_XFS_UUID].hex() != self.uuid.replace("-", ""):
            raise self._foreign("its XFS file system has another UUID")

    def _foreign(self, fault: str) -> NotVerified:
        return NotVerified(
            "pool-foreign",
            f"{self.path} is not the pool of {self.state_dir}: {fault}; restore the right file.",
        )

    def unmount(self) -> bool:
        """Unmount the pool and tell whether it is now; a busy one stays and is taken up later."""
        if not self.mounted:
            return True
        try:
            run_program("umount", str(self.state_dir))
        except Internal as error:
            log.warning("the pool stays mounted: %s", error.message)
            return False
        return True

    def grow(self, size_bytes: int, reserve_bytes: int) -> None:
        """Grow file and file system to a size, mounted or not; the same size again ends what a
        crash cut short.

        Raises `InvalidInput` (`pool-shrink`) and `NoSpace` (`no-space`).
        """
        size_bytes -= size_bytes % _BLOCK_BYTES
        present_bytes = self.path.stat().st_size
        if size_bytes < present_bytes:
            raise InvalidInput(
                "pool-shrink",
                f"The pool has {present_bytes} bytes; XFS does not shrink, give more.",
                field="size",
            )
        with available(self.state_dir):
            if size_bytes > present_bytes:
                require_room(self.path.parent, size_bytes - present_bytes, reserve_bytes,
                             sparse=self.sparse)  # fmt: skip
                extend(self.path, size_bytes, sparse=self.sparse)
            device = self._device()
            assert device is not None
            run_program("losetup", "--set-capacity", device)
            run_program("xfs_growfs", "-d", str(self.state_dir))

    def status(self) -> PoolStatus:
        """Return the pool as it is now."""
        self._verify()
        status = self.path.stat()
        mounted = self.mounted
        free_bytes = None
        if mounted:
            inside = os.statvfs(self.state_dir)
            free_bytes = inside.f_bavail * inside.f_frsize
        return PoolStatus(
            path=str(self.path),
            uuid=self.uuid,
            sparse=self.sparse,
            size_bytes=status.st_size,
            allocated_bytes=status.st_blocks * 512,
            mounted=mounted,
            free_bytes=free_bytes,
        )


@contextmanager
def available(state_dir: Path) -> Iterator[None]:
    """Have a state directory's pool, if it has one, mounted; leave it as it was."""
    pool = Pool.read(state_dir)
    if pool is None or pool.mounted:
        yield
        return
    pool.mount()
    try:
        yield
    finally:
        pool.unmount()


def mount_file(path: Path, directory: Path, *, discard: bool) -> None:
    """Mount an XFS file through a loop device that goes with the mount (mount(8), `loop`)."""
    options = "loop,discard" if discard else "loop"
    run_program("mount", "-t", "xfs", "-o", options, str(path), str(directory))
    device = mounted_at(directory)
    if device is not None:
        try:  # else every page of the pool is cached twice
            run_program("losetup", "--direct-io=on", device)
        except Internal as error:
            log.info("the pool's loop device stays buffered: %s", error.message)


def mounted_at(directory: Path) -> str | None:
    """Return the source of the topmost mount at a path, None when nothing is mounted there."""
    wanted = os.path.realpath(directory)
    source = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]) == wanted:
            source = fields[fields.index("-") + 2]
    return source


def require_room(directory: Path, size_bytes: int, reserve_bytes: int, *, sparse: bool) -> None:
    """Raise `NoSpace` (`no-space`) unless a file system holds so much more.

    Of a sparse file only its size counts: it must fit when everything else has gone.
    """
    outside = os.statvfs(directory)
    blocks = outside.f_blocks if sparse else outside.f_bavail
    room_bytes = blocks * outside.f_frsize - reserve_bytes
    if size_bytes > room_bytes:
        raise no_space(directory, f"the pool needs {size_bytes} bytes, {max(room_bytes, 0)} fit")


def extend(path: Path, size_bytes: int, *, sparse: bool) -> None:
    """Lengthen a file durably, with its space taken unless it is to be sparse.

    Raises `NoSpace`, and then the file is as long as before.
    """
    with path.open("r+b") as file:
        before_bytes = os.fstat(file.fileno()).st_size
        try:
            with full_disk_is_no_space(path.parent):
                if not sparse:
                    os.posix_fallocate(file.fileno(), 0, size_bytes)
                os.ftruncate(file.fileno(), size_bytes)
                os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), before_bytes)
            raise


def sync_directory(directory: Path) -> None:
    """Make durable which names a directory has (fsync(2))."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run_program(program: str, *arguments: str) -> str:
    """Run a program of the system and return what it printed.

    Raises `NotFound` (`program-missing`), `Internal` (`pool-program-failed`) with its complaint.
    """
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":" + _SYSTEM_PATH)
    if found is None:
        package = "xfsprogs" if "xfs" in program else "util-linux (mount)"
        raise NotFound(
            "program-missing", f"{program} is not installed; install the package {package}."
        )
    try:
        done = subprocess.run(
            [found, *arguments], check=False, capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Internal(
            "pool-program-failed", f"{program} did not end in {_PROGRAM_TIMEOUT_S} s."
        ) from None
    if done.returncode != 0:
        complaint = " ".join((done.stderr or done.stdout).split())[:500]
        raise Internal("pool-program-failed", f"{program} failed: {complaint or done.returncode}.")
    return done.stdout
