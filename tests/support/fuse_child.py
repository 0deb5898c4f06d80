"""A small `blockd` for tests of the supervisor: two files over FUSE, and a target for one.

    disk     read-write, direct I/O, kept in STATE_DIR/disk
    image    the same bytes, cannot be opened for writing

Every fsync adds a byte to STATE_DIR/syncs. A read at `STALLED_AT` adds a byte to
STATE_DIR/stalls and is answered when STATE_DIR/answered is there. With `--export` the target `EXPORT`
is kept on `disk`, made again on a poke.
"""

import argparse
import errno
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyfuse3
import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import StratocacheError
from stratocache.fs.fuse_connection import serve_inherited
from stratocache.fs.poke import PokeListener
from stratocache.fs.portal import Portal
from stratocache.fs.resident import keep_resident
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.target import Target, iqn_of, serial_of
from stratocache.fs.tgt import Tgt

DISK_BYTES = 16 * 1024**2
_LOOK_INTERVAL_S = 0.01
STALLED_AT = DISK_BYTES - 4096
_INODES = {b"disk": pyfuse3.InodeT(2), b"image": pyfuse3.InodeT(3)}


def export(run_dir: Path) -> Target:
    """Return the target that `--export` keeps."""
    return Target(
        number=1,
        iqn=iqn_of("11111111-2222-4333-8444-555555555555"),
        backing=run_dir / "blocks" / "disk",
        read_only=False,
        serial=serial_of("11111111-2222-4333-8444-555555555555"),
        chap_username="guest",
        chap_secret="only-for-tests-1",
    )


class Files(pyfuse3.Operations):
    """The tree; remembers nothing, so that another process can go on."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__()
        self._data = os.open(state_dir / "disk", os.O_RDWR)
        self._answered = state_dir / "answered"
        self._stalls = os.open(state_dir / "stalls", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._syncs = os.open(state_dir / "syncs", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _attributes(self, inode: pyfuse3.InodeT) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_nlink = 1
        entry.attr_timeout = entry.entry_timeout = 60
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755)
        else:
            writable = inode == _INODES[b"disk"]
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | (0o600 if writable else 0o444))
            entry.st_size = DISK_BYTES
        return entry

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of a file."""
        return self._attributes(inode)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a file."""
        if name not in _INODES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(_INODES[name])

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """Open a file; its inode is its handle."""
        if inode == _INODES[b"image"] and flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Read."""
        if off == STALLED_AT:
            os.write(self._stalls, b"S")
            while not self._answered.exists():  # noqa: ASYNC110 - another process makes it
                await trio.sleep(_LOOK_INTERVAL_S)
        return os.pread(self._data, size, off)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Write."""
        return os.pwrite(self._data, buf, off)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Note that it was asked for."""
        os.write(self._syncs, b"S")

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Nothing to do."""


async def _keep_export(target: Target, daemon: Tgt, listener: PokeListener) -> None:
    while True:
        with suppress(StratocacheError):
            await daemon.create(target)
            await daemon.open_portal()
        await listener.wait()


async def serve(configuration: Configuration, fuse_fd: int, ready_fd: int, exporting: bool) -> None:
    """Serve until cancelled; say `R` on `ready_fd` once requests are answered."""
    keep_resident()
    directory = RunDirectory(configuration.run_dir)
    with PokeListener(directory.poke_socket) as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(
                serve_inherited,
                Files(configuration.state_dir),
                fuse_fd,
                directory.init_request.read_bytes(),
            )
            os.write(ready_fd, b"R")
            os.close(ready_fd)
            if exporting:
                target = export(configuration.run_dir)
                portal = Portal(configuration.iscsi.address, configuration.iscsi.port)
                daemon = Tgt(directory.tgt_control, portal)
                nursery.start_soon(_keep_export, target, daemon, listener)


def prepare() -> None:
    """Nothing more has to be imported."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until killed or unmounted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--fuse-fd", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--export", action="store_true")
    given = parser.parse_args(arguments)
    configuration = Configuration.model_validate_json(given.config_json.read_bytes())
    if (configuration.state_dir / "broken").exists():
        sys.exit(3)
    trio.run(serve, configuration, given.fuse_fd, given.ready_fd, given.export)


if __name__ == "__main__":
    main()
