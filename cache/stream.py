"""The source of an image read from its first byte, while it is still being downloaded.

For origins that give no single chunks: compressed files, servers without ranges. The download goes
to the image's stage, as that of a whole fetch does, so that it resumes after cuts and restarts; a
thread reads behind it, decompresses, and gives each chunk as soon as it is complete.
"""

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import trio

from stratocache.cache.decompression import decompressed
from stratocache.cache.entry import Entry
from stratocache.cache.errors import (
    NotFound,
    NotVerified,
    OriginFailed,
    Refused,
    StratocacheError,
)
from stratocache.cache.fetch import combined
from stratocache.cache.ingestion import chunks_of
from stratocache.cache.origin import HttpOrigin, open_file
from stratocache.cache.promises import overlong, source_limit, wrong_size
from stratocache.cache.stage import Stage

log = logging.getLogger(__name__)

Keep = Callable[[int, bytes], None]
"""Takes a chunk's index and bytes, in a thread of trio's; raises what ends the reading."""


class Stream:
    """One image's source. `moved` is told of the bytes that a download brought."""

    def __init__(
        self, entry: Entry, stage: Stage, http: HttpOrigin, keep: Keep, moved: Callable[[int], None]
    ) -> None:
        self._entry = entry
        self._stage = stage
        self._http = http
        self._keep = keep
        self._moved = moved
        # Its thread waits for the network: it must not be one that others need.
        self._limiter = trio.CapacityLimiter(1)

    async def run(self) -> None:
        """Give all chunks to `keep` in order, from the first location that has all of them.

        With the next location it begins again at the first chunk. The stage stays. Raises as
        `Fetcher.fetch` does, and what `keep` raises but for `NotVerified`, which another location
        may mend.
        """
        failures: list[tuple[str, StratocacheError]] = []
        source = await trio.to_thread.run_sync(self._stage.load)
        known = source.location if source else None
        for location in sorted(self._entry.locations, key=lambda location: location != known):
            try:
                await self._pass(location)
                return
            except (NotFound, Refused, OriginFailed, NotVerified) as error:
                log.warning("stream of %s from %s: %s", self._entry.identifier, location, error)
                failures.append((location, error))
        raise combined(self._entry, failures)

    async def _pass(self, location: str) -> None:
        if urlsplit(location).scheme == "file":
            with closing(await trio.to_thread.run_sync(open_file, location)) as file:
                source_limit(self._entry).judge(os.fstat(file.fileno()).st_size, total=True)
                await self._read(file)
            return
        continued = self._stage.downloaded_bytes() > 0
        try:
            if await self._follow(location):
                return
            log.info("%s changed while it was read; it is read again", location)
        except NotVerified as error:
            await trio.to_thread.run_sync(self._stage.drop)
            if not continued:
                raise
            # The parts may be of two files, or hurt by a power cut; the whole may still be right.
            log.warning("%s was continued and is not verified (%s); again", location, error)
        if not await self._follow(location):
            raise OriginFailed("origin-failed", "It changes again and again; try again later.")

    async def _follow(self, location: str) -> bool:
        """Download and read behind; tell whether one and the same file was read to its end."""
        growth = _Growth(self._stage, self._moved)
        failures: list[StratocacheError | OSError] = []

        async def download() -> None:
            try:
                limit = source_limit(self._entry)
                await self._http.download(location, self._stage, limit, growth.note)
                growth.end()
            except (StratocacheError, OSError) as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(download)
            try:
                await growth.begun()
                with closing(_GrowingFile(self._stage, growth)) as file:
                    await self._read(cast("BinaryIO", file))
            except (StratocacheError, OSError) as error:
                failures.append(error)
            nursery.cancel_scope.cancel()
        changed = [error for error in failures if isinstance(error, _Changed)]
        if failures and not changed:
            raise failures[0]
        return not failures

    async def _read(self, source: BinaryIO) -> None:
        entry = self._entry
        stream = decompressed(source, entry.compression)
        chunks = enumerate(chunks_of(stream, entry.size_bytes, overlong=overlong(entry)))
        size_bytes = 0
        while piece_bytes := await trio.to_thread.run_sync(
            self._next, chunks, limiter=self._limiter
        ):
            size_bytes += piece_bytes
        if size_bytes != entry.size_bytes:
            raise wrong_size(f"{size_bytes}", entry)

    def _next(self, chunks: Iterator[tuple[int, bytes]]) -> int:
        """Let one chunk be kept; return its bytes, 0 at the end. Runs in a thread."""
        for index, chunk in chunks:
            self._keep(index, chunk)
            return len(chunk)
        return 0


class _Changed(OSError):
    """The file that was being read has been started anew."""


class _Growth:
    """What a download has written so far; belongs to the trio loop."""

    def __init__(self, stage: Stage, moved: Callable[[int], None]) -> None:
        self.ended = False
        self._moved = moved
        self._size_bytes = stage.downloaded_bytes()
        self._grown = trio.Event()

    def note(self, size_bytes: int, _: int | None) -> None:
        """Take note of the file's length."""
        self._moved(size_bytes - self._size_bytes if size_bytes > self._size_bytes else 0)
        self._size_bytes = size_bytes
        self._wake()

    def end(self) -> None:
        """Take note that nothing more comes."""
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = trio.Event()

    async def begun(self) -> None:
        """Return when the download has said what its file is."""
        await self._grown.wait()

    async def beyond(self, position: int) -> None:
        """Return when the file is no longer of this length, or complete."""
        while self._size_bytes == position and not self.ended:
            await self._grown.wait()


class _GrowingFile(io.RawIOBase):
    """A file that a download appends to. Reads wait for bytes, in a thread of trio's."""

    def __init__(self, stage: Stage, growth: _Growth) -> None:
        super().__init__()
        self._path = stage.source
        self._growth = growth
        try:
            self._file = stage.source.open("rb", buffering=0)
        except FileNotFoundError:
            raise _Changed from None
        self._inode = os.fstat(self._file.fileno()).st_ino
        self._position = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def tell(self) -> int:
        """Return how many bytes have been read."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read what is there, or wait for it; 0 at the end. Raises `OSError` for another file."""
        while True:
            ended = self._growth.ended
            count = self._file.readinto(buffer) or 0
            self._position += count
            if count or ended:
                return count
            self._check()
            trio.from_thread.run(self._growth.beyond, self._position)
            self._check()

    def _check(self) -> None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            raise _Changed from None
        if status.st_ino != self._inode or status.st_size < self._position:
            raise _Changed

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()
