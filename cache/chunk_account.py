"""The account of the chunk files: diskcache's rows, one a file, made again from the files if need be."""

import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import diskcache

from stratocache.cache.chunkindex import (
    ChunkDisk,
    Written,
    damage,
    discard_index,
    is_damage,
    open_index,
)
from stratocache.cache.space import full_disk_is_no_space

log = logging.getLogger(__name__)

ROWS = 256
"""Rows read or deleted at a time."""

_T = TypeVar("_T")


class ChunkAccount:
    """Rows of a directory's chunks. Every method may be called from any thread; all may block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # diskcache keeps a connection per thread and cannot close another's: one thread has it.
        self._indexer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chunk-index")
        self._cache = self._indexer.submit(open_index, directory).result()
        self.disk: ChunkDisk = self._cache.disk

    def path(self, digest: bytes) -> Path:
        """Return where a chunk's file is, or would be."""
        return Path(self.disk.filename(digest)[1])

    def digests(self, first_byte: int) -> Iterator[bytes]:
        """Yield the digests of all files whose digest starts with one byte."""
        high, low = divmod(first_byte, 16)
        for path in (self._directory / f"{high:x}" / f"{low:x}").glob("*"):
            with suppress(ValueError):
                yield bytes.fromhex(path.name)

    def add(self, chunks: Sequence[tuple[bytes, bytes]]) -> None:
        """Have rows of chunks, each given as digest and data, whose files are there.

        Raises `NoSpace` (`no-space`).
        """

        def insert() -> None:
            with self._cache.transact():
                for digest, data in chunks:
                    if digest not in self._cache:
                        self._cache.set(digest, Written(len(data)))

        with full_disk_is_no_space(self._directory):
            self._index(insert)

    def drop(self, digests: Sequence[bytes]) -> None:
        """Delete the rows of those chunks whose files are gone; raises `NoSpace` (`no-space`)."""

        def delete() -> None:
            with full_disk_is_no_space(self._directory), self._cache.transact():
                for digest in digests:
                    if not self.path(digest).exists():
                        self._cache.delete(digest)

        self._index(delete)

    def totals(self) -> tuple[int, int]:
        """Return how many chunks there are, and their bytes."""
        return self._index(self._totals)

    def reconcile(self) -> None:
        """Make the account agree with the files: rows without a file go, files get their row."""
        keys: Iterator[bytes] = self._cache.iterkeys()
        while batch := self._index(lambda: list(islice(keys, ROWS))):
            self.drop([digest for digest in batch if not self.path(digest).exists()])
        for first_byte in range(256):
            for digest in self.digests(first_byte):
                self._index(partial(self._adopt, digest))

    def close(self) -> None:
        """Close the index."""
        self._index(self._cache.close)
        self._indexer.shutdown()

    def _totals(self) -> tuple[int, int]:
        chunks, size_bytes = self._cache.reset("count"), self._cache.reset("size")
        if not (isinstance(chunks, int) and isinstance(size_bytes, int)):
            raise damage(f"{chunks!r} chunks have {size_bytes!r} bytes")
        return chunks, size_bytes

    def _index(self, operation: Callable[[], _T]) -> _T:
        """Run an operation on diskcache in the thread that has its connection."""
        return self._indexer.submit(self._with_index, operation).result()

    def _with_index(self, operation: Callable[[], _T]) -> _T:
        try:
            return operation()
        except (sqlite3.DatabaseError, diskcache.Timeout) as error:
            if not is_damage(error):
                raise
            log.error("the chunk index is damaged (%s); it is made again", error)
        self._renew()
        return operation()

    def _renew(self) -> None:
        """Make the account again from the files, in the thread that has its connection."""
        with suppress(sqlite3.Error):
            self._cache.close()
        discard_index(self._directory)
        self._cache = open_index(self._directory)
        for first_byte in range(256):
            with self._cache.transact():
                for digest in self.digests(first_byte):
                    self._adopt(digest)

    def _adopt(self, digest: bytes) -> None:
        if digest not in self._cache:
            with suppress(FileNotFoundError), full_disk_is_no_space(self._directory):
                self._cache.set(digest, Written(self.path(digest).stat().st_size))
