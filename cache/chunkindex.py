"""The chunk store's index: a diskcache with a `Disk` of ours and none of its defaults.

diskcache keeps one row per chunk in SQLite and asks its `Disk` for names and files. Ours names a
file by its digest, writes raw bytes by rename, and never pickles.
"""

import hashlib
import itertools
import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import diskcache

log = logging.getLogger(__name__)

INCOMING = "incoming"
"""Where files are written before they have their name."""
_DAMAGE = frozenset({
    sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CORRUPT_INDEX, sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR, sqlite3.SQLITE_IOERR_SHORT_READ,
})  # fmt: skip
_DIGEST_BYTES = hashlib.sha256().digest_size


def chunk_file(directory: Path, digest: bytes) -> Path:
    """Return where a chunk's file is, or would be, below the store's directory."""
    return directory / _relative_name(digest)


def _relative_name(digest: bytes) -> str:
    name = digest.hex()
    return f"{name[0]}/{name[1]}/{name}"


class Written(NamedTuple):
    """A chunk whose file is there already; given to diskcache in place of its bytes."""

    size_bytes: int


class ChunkDisk(diskcache.Disk):  # type: ignore[misc]
    """diskcache's file layer: keys are digests, names follow from keys, values are raw bytes."""

    _serial = itertools.count()

    def hash(self, key: bytes) -> int:
        """Return a portable hash of a key."""
        return int.from_bytes(key[:4], "big")

    def put(self, key: bytes) -> tuple[sqlite3.Binary, bool]:
        """Return the database form of a digest."""
        if not is_digest(key):
            raise TypeError(f"a chunk's key is {_DIGEST_BYTES} bytes of digest")
        return sqlite3.Binary(key), True

    def get(self, key: object, raw: bool) -> bytes:
        """Return the digest that a database key holds; raises `sqlite3.DatabaseError` if none."""
        if not is_digest(key):
            raise damage(f"the key {key!r} is no digest")
        return key

    def filename(self, key: bytes, value: object = None) -> tuple[str, str]:
        """Return a digest's file name, relative and absolute."""
        relative = _relative_name(key)
        return relative, f"{self._directory}/{relative}"

    def store(self, value: Written, read: bool, key: bytes) -> tuple[int, int, str, None]:
        """Return diskcache's columns for a chunk that `write` has written."""
        return value.size_bytes, diskcache.core.MODE_BINARY, self.filename(key)[0], None

    def write(self, key: bytes, data: bytes, write: Callable[[int, bytes], None]) -> None:
        """Have `write` fill a file with a temporary name, and rename it to be a chunk's."""
        _, path = self.filename(key)
        temporary = f"{self._directory}/{INCOMING}/{key.hex()}.{next(self._serial)}"
        try:
            with open(temporary, "xb", buffering=0) as file:
                write(file.fileno(), data)
            try:
                os.rename(temporary, path)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), mode=0o750, exist_ok=True)
                os.rename(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def fetch(self, mode: int, filename: str, value: object, read: bool) -> bytes:
        """Return a chunk's bytes; no other mode, pickles above all, is ever read."""
        if mode != diskcache.core.MODE_BINARY:
            raise ValueError(f"mode {mode} is no chunk")
        return Path(self._directory, filename).read_bytes()

    def remove(self, file_path: str) -> None:
        """Do nothing: diskcache would remove the file it believes replaced, the one just written.

        The name follows from the digest, so a row that is written again keeps its file;
        `ChunkStore.remove` deletes files itself.
        """


def open_index(directory: Path) -> Any:
    """Open the index of a chunk directory; a damaged one is put aside, its rows are made again."""
    try:
        return _new_cache(directory)
    except sqlite3.DatabaseError as error:
        log.error("the chunk index in %s is damaged (%s); it is made again", directory, error)
        discard_index(directory)
        return _new_cache(directory)


def discard_index(directory: Path) -> None:
    """Remove an index, which must be closed."""
    for path in directory.glob("cache.db*"):
        path.unlink(missing_ok=True)


def is_digest(key: object) -> TypeGuard[bytes]:
    """Tell whether a database key can be a chunk's: rotten pages may be well-formed rows."""
    return isinstance(key, bytes) and len(key) == _DIGEST_BYTES


def damage(message: str) -> sqlite3.DatabaseError:
    """Return the error of an index whose file is well-formed, and whose rows cannot be ours."""
    error = sqlite3.DatabaseError(message)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def is_damage(error: sqlite3.DatabaseError | diskcache.Timeout) -> bool:
    """Tell whether an error of an index that worked says that its file no longer is one.

    A statement that was right is wrong (SQLITE_ERROR) when its table is gone. diskcache says Timeout
    of all that keeps a transaction from beginning, and nobody else writes here.
    """
    return isinstance(error, diskcache.Timeout) or error.sqlite_errorcode in _DAMAGE


def _new_cache(directory: Path) -> Any:
    # NORMAL: no fsync per commit; `sync` makes the write-ahead log durable with the files.
    return diskcache.Cache(
        str(directory),
        disk=ChunkDisk,
        disk_min_file_size=0,
        eviction_policy="none",
        cull_limit=0,
        size_limit=2**62,
        statistics=0,
        tag_index=0,
        sqlite_journal_mode="wal",
        sqlite_synchronous=1,
        # no memory map: a file that is cut would end the process, not the statement
        sqlite_mmap_size=0,
    )
