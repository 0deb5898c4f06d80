"""The chunk store: bytes named by their SHA-256, on diskcache with a `Disk` of our own.

The file is the truth (`a/b/ab…`, the digest in hexadecimal, the raw bytes and nothing else); diskcache's
rows are the account of them and can be made again from the files. See FETCH.md.
"""

import ctypes
import errno
import hashlib
import logging
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from stratocache.cache.chunk_account import ROWS, ChunkAccount
from stratocache.cache.chunkindex import INCOMING
from stratocache.cache.errors import NotVerified
from stratocache.cache.medium import read_medium, write_cached, write_medium
from stratocache.cache.space import full_disk_is_no_space

log = logging.getLogger(__name__)

CHUNK_BYTES = 512 * 1024
"""Size of every chunk but an image's last; a multiple of 4 KiB, so that files can be reflinked."""
DIGEST_BYTES = 32

_OPEN_MAX = 16384
_VERIFIED_MAX = 2**18
"""Digests remembered as verified; when full all are forgotten and hashed again (40 MiB at most)."""
_DAMAGE = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ELOOP, errno.EISDIR})
"""What the system says of a file that is lost; other errors are of the process or the host."""

_T = TypeVar("_T")

_LIBC = ctypes.CDLL(None, use_errno=True)


@lru_cache(maxsize=64)
def zero_digest(size_bytes: int) -> bytes:
    """Return the SHA-256 of `size_bytes` zero bytes; at most a chunk's size."""
    if not 0 <= size_bytes <= CHUNK_BYTES:
        raise ValueError(f"no chunk has {size_bytes} bytes")
    return hashlib.sha256(bytes(size_bytes)).digest()


@dataclass(frozen=True)
class ChunkStatistics:
    """What the store holds and did since it was opened."""

    chunks: int
    """Chunks in the account."""
    size_bytes: int
    """Their bytes."""
    open_descriptors: int
    """Files kept open now."""
    verified: int
    """Chunks hashed and found right."""
    quarantined: int
    """Chunks hashed and found wrong."""
    inspected_bytes: int
    """Read again from the medium, past the page cache."""


class ChunkDescriptor(int):
    """A read-only file descriptor that is closed when its last reference goes.

    An eviction from the table of open files thus never closes a descriptor that a reader in
    another thread is using; keep the object, not a copy of its number, while you read.
    """

    stamp_ns: int
    """When the file was last changed, as it was hashed (st_ctime: nobody can set that back)."""

    def is_intact(self) -> bool:
        """Tell whether the file has stayed as it was hashed; ask after reading from it."""
        return os.fstat(self).st_ctime_ns == self.stamp_ns

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self)


class ChunkStore:
    """Verified chunks on disk. Every method may be called from any thread; all may block.

    One process owns the directory. Chunks that fail their digest go to `quarantine/` beside it.
    """

    def __init__(self, directory: Path, *, open_max: int | None = None) -> None:
        self._directory = directory
        self._quarantine_directory = directory.parent / "quarantine"
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._open_max = open_max or min(_OPEN_MAX, max(64, soft_limit // 4))
        (directory / INCOMING).mkdir(mode=0o750, parents=True, exist_ok=True)
        for leftover in (directory / INCOMING).iterdir():
            leftover.unlink()
        self._account = ChunkAccount(directory)
        self._disk = self._account.disk
        # Lock order: _removal, then _lock. _lock is taken by the event loop too and is never held
        # over a system call that may wait.
        self._lock = threading.Lock()
        self._removal = threading.Lock()
        self._open: OrderedDict[bytes, ChunkDescriptor] = OrderedDict()
        self._verified: dict[bytes, int] = {}
        self._condemned: list[set[bytes]] = []
        self._verified_count = 0
        self._quarantined_count = 0
        self._inspected_bytes = 0

    def put(self, digest: bytes, data: bytes) -> bool:
        """Store a chunk whose SHA-256 is `digest`; tell whether it was new.

        A chunk of zeros is not stored. A file that is there but differs is written again. Raises
        `NoSpace` (`no-space`).
        """
        return self._put([(digest, data)], write_cached) == 1

    def put_all(self, chunks: Sequence[tuple[bytes, bytes]]) -> int:
        """Store chunks, each given as digest and data, as `put` does; return how many were new.

        They go past the page cache: a whole image would push out of it what guests read, while a
        single chunk is put because somebody waits for it.
        """
        return self._put(chunks, write_medium)

    def _put(
        self, chunks: Sequence[tuple[bytes, bytes]], write: Callable[[int, bytes], None]
    ) -> int:
        stored = [(digest, data) for digest, data in chunks if digest != zero_digest(len(data))]
        with self._removal:
            for condemned in self._condemned:
                condemned.difference_update(digest for digest, _ in stored)
        new = 0
        with full_disk_is_no_space(self._directory):
            for digest, data in stored:
                if not self._trusts(digest) and not self._holds(digest, data):
                    self._disk.write(digest, data, write)
                    new += 1
        self._account.add(stored)
        return new

    def _trusts(self, digest: bytes) -> bool:
        """Tell whether a chunk's file is there and unchanged since it was hashed."""
        stamp_ns = self._verified.get(digest)
        try:
            return stamp_ns is not None and self.path(digest).lstat().st_ctime_ns == stamp_ns
        except OSError:
            return False

    def _holds(self, digest: bytes, data: bytes) -> bool:
        path = self._disk.filename(digest)[1]
        if not os.path.exists(path):
            return False
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read(CHUNK_BYTES + 1) == data
        except FileNotFoundError:
            return False

    def opened(self, digest: bytes) -> ChunkDescriptor | None:
        """Return the descriptor of a chunk that is open and verified, else None; never blocks."""
        with self._lock:
            descriptor = self._open.get(digest)
            if descriptor is not None:
                self._open.move_to_end(digest)
            return descriptor

    def open(self, digest: bytes) -> ChunkDescriptor:
        """Return a read-only descriptor of a chunk, hashed when this process first opens it, and
        again when its file has changed since.

        Raises `NotVerified`: `chunk-missing`, or `chunk-corrupt` after moving it to quarantine.
        """
        descriptor = self.opened(digest)
        if descriptor is not None:
            if descriptor.is_intact():
                return descriptor
            self.distrust(digest)
        while True:
            descriptor = self._open_file(digest)
            if self._verified.get(digest) == descriptor.stamp_ns:
                break
            if self._verify(digest, descriptor):
                break
        with self._lock:
            if len(self._verified) >= _VERIFIED_MAX:
                self._verified.clear()
            self._verified[digest] = descriptor.stamp_ns
            self._open[digest] = descriptor
            while len(self._open) > self._open_max:
                self._open.popitem(last=False)
        return descriptor

    def _open_file(self, digest: bytes) -> ChunkDescriptor:
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = ChunkDescriptor(_tried_again(os.open, self.path(digest), flags))
        except FileNotFoundError:
            self.distrust(digest)
            raise _missing(digest) from None
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            log.error("chunk %s cannot be opened: %s", digest.hex(), error)
            self.quarantine(digest)
            raise _corrupt(digest) from None
        descriptor.stamp_ns = os.fstat(descriptor).st_ctime_ns
        return descriptor

    def distrust(self, digest: bytes) -> None:
        """Hash a chunk again when it is next opened."""
        self._forget(digest)

    def inspect(self, digest: bytes) -> int:
        """Hash a chunk as the medium has it, past the page cache; return its bytes.

        Raises as `open` does.
        """
        inode: int | None
        try:
            content, inode = _tried_again(read_medium, self.path(digest), CHUNK_BYTES)
        except FileNotFoundError:
            self.distrust(digest)
            raise _missing(digest) from None
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            log.error("chunk %s cannot be read: %s", digest.hex(), error)
            content, inode = memoryview(b""), None
        self._inspected_bytes += len(content)
        if len(content) <= CHUNK_BYTES and hashlib.sha256(content).digest() == digest:
            self._verified_count += 1
            return len(content)
        if self.quarantine(digest, inode):
            raise _corrupt(digest)
        return self.inspect(digest)

    def path(self, digest: bytes) -> Path:
        """Return where a chunk's file is, or would be."""
        return self._account.path(digest)

    def __contains__(self, digest: bytes) -> bool:
        return self.path(digest).exists()

    @contextmanager
    def condemned(self, digests: set[bytes]) -> Iterator[set[bytes]]:
        """Announce chunks that may be removed; a `put` of one from now on takes it off the set."""
        with self._removal:
            self._condemned.append(digests)
        try:
            yield digests
        finally:
            with self._removal:
                self._condemned = [other for other in self._condemned if other is not digests]

    def remove(self, digests: set[bytes]) -> int:
        """Delete the chunks of a set, and empty it; return how many files went.

        Within `condemned` a chunk that was put again meanwhile stays. Files go before rows: on a
        full disk the index needs the space that they free.
        """
        removed = 0
        rows: list[bytes] = []
        for digest in list(digests):
            with self._removal:
                if digest not in digests:
                    continue
                digests.discard(digest)
                self._forget(digest)
                with suppress(FileNotFoundError):
                    self.path(digest).unlink()
                    removed += 1
            rows.append(digest)
            if len(rows) >= ROWS:
                self._account.drop(rows)
                rows.clear()
        self._account.drop(rows)
        return removed

    def _forget(self, digest: bytes) -> None:
        with self._lock:
            self._open.pop(digest, None)
            self._verified.pop(digest, None)

    def digests(self, first_byte: int) -> Iterator[bytes]:
        """Yield the digests of all files whose digest starts with one byte."""
        return self._account.digests(first_byte)

    def reconcile(self) -> None:
        """Make the account agree with the files: rows without a file go, files get their row."""
        self._account.reconcile()

    def sync(self) -> None:
        """Make every chunk put so far survive power loss, by one syncfs(2).

        An fsync per chunk costs a journal commit each; an image of 20 GiB has 40,000. One syncfs
        writes files, directories and the index (SQLite's WAL) alike, at the price of writing what
        others have dirty on the same file system. Raises `OSError` for a failed write-back.
        """
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with full_disk_is_no_space(self._directory):
                if _LIBC.syncfs(descriptor) != 0:
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code), str(self._directory))
        finally:
            os.close(descriptor)

    def statistics(self) -> ChunkStatistics:
        """Return what the store holds and did."""
        chunks, size_bytes = self._account.totals()
        return ChunkStatistics(
            chunks=chunks,
            size_bytes=size_bytes,
            open_descriptors=len(self._open),
            verified=self._verified_count,
            quarantined=self._quarantined_count,
            inspected_bytes=self._inspected_bytes,
        )

    def close(self) -> None:
        """Close the index and forget the open files."""
        with self._lock:
            self._open.clear()
        self._account.close()

    def _verify(self, digest: bytes, descriptor: ChunkDescriptor) -> bool:
        """Tell whether a file has its digest; False when another has taken its place meanwhile."""
        try:
            data = _tried_again(os.pread, descriptor, CHUNK_BYTES + 1, 0)
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            log.error("chunk %s cannot be read: %s", digest.hex(), error)
            data = b""
        if len(data) <= CHUNK_BYTES and hashlib.sha256(data).digest() == digest:
            self._verified_count += 1
            return True
        if self.quarantine(digest, os.fstat(descriptor).st_ino):
            raise _corrupt(digest)
        return False

    def quarantine(self, digest: bytes, inode: int | None = None) -> bool:
        """Move a chunk's file to where a person can look at it; tell whether it was there.

        One that has taken the place of the file of number `inode` stays.
        """
        self._quarantine_directory.mkdir(mode=0o750, exist_ok=True)
        path = self.path(digest)
        with self._removal:
            self._forget(digest)
            try:
                if inode is not None and path.lstat().st_ino != inode:
                    return False
                path.rename(self._quarantine_directory / digest.hex())
            except FileNotFoundError:
                return False
        log.error("chunk %s is moved to quarantine", digest.hex())
        self._quarantined_count += 1
        self._account.drop([digest])
        return True


def _missing(digest: bytes) -> NotVerified:
    return NotVerified(
        "chunk-missing", f"Chunk {digest.hex()} is not in the store; fetch its image again."
    )


def _corrupt(digest: bytes) -> NotVerified:
    return NotVerified(
        "chunk-corrupt",
        f"Chunk {digest.hex()} no longer has its digest and went to quarantine; "
        "check the disk for errors and fetch its image again.",
    )


def _tried_again(call: Callable[..., _T], *arguments: object) -> _T:
    """Call, and once more after an error of the medium: one that passes must not cost a chunk that
    perhaps no origin has any more."""
    try:
        return call(*arguments)
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        log.warning("a chunk is tried once more: %s", error)
        return call(*arguments)
