"""Origins: one location's bytes, from an HTTP(S) server or a local file.

A download goes to a stage directory and continues there after a cut connection or a restart:
`Range` with `If-Range` (RFC 9110 section 14), the rest only if the server still has the same file,
else from the first byte. No HEAD is sent.
"""

import logging
import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import httpx
import trio

from stratocache.cache.configuration import FetchSettings
from stratocache.cache.errors import NotFound, NotVerified, OriginFailed, Refused, StratocacheError
from stratocache.cache.outgoing import respond
from stratocache.cache.room import CacheSpace
from stratocache.cache.space import full_disk_is_no_space
from stratocache.cache.stage import Source, Stage
from stratocache.cache.traffic import Traffic

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]

_BUFFER_BYTES = 1024**2
_GAIN_BYTES = 64 * 1024
"""An attempt that brought this much does not count as a failure: long files survive many cuts."""
GONE_STATUSES = frozenset({404, 410})
PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
ERRORS_THAT_PASS = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)


@dataclass(frozen=True)
class Backoff:
    """Pauses between attempts: `base_s` doubled each time, a server's Retry-After, `limit_s`."""

    base_s: float = 0.5
    limit_s: float = 60

    def pause_s(self, failures: int, retry_after_s: float) -> float:
        """Return how long to wait after so many failures in a row."""
        return min(self.limit_s, max(retry_after_s, self.base_s * 2.0 ** (failures - 1)))


@dataclass(frozen=True)
class SizeLimit:
    """How long a source may be."""

    size_bytes: int
    exact: bool
    """An uncompressed source has exactly this size; a compressed one at most."""

    def judge(self, size_bytes: int, *, total: bool) -> None:
        """Raise `NotVerified` (`size-mismatch`) for a length that cannot be right."""
        if size_bytes > self.size_bytes or (total and self.exact and size_bytes < self.size_bytes):
            bound = "exactly" if self.exact else "at most"
            raise NotVerified(
                "size-mismatch",
                f"The source has {size_bytes} bytes or more but {bound} {self.size_bytes} were "
                "promised; the location serves another file than the entry describes.",
            )


class _Passing(Exception):
    """A failure that another attempt may not meet."""

    def __init__(self, reason: str, retry_after_s: float = 0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class _StartOver(_Passing):
    """What has been downloaded cannot be continued."""


class OriginBusy(OriginFailed):
    """A location that wants to be left alone for longer than somebody would wait."""


class HttpOrigin:
    """Downloads from HTTP(S) locations into stages, appending `piece_bytes` or more at a time."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        settings: FetchSettings,
        space: CacheSpace,
        backoff: Backoff,
        traffic: Traffic | None = None,
        *,
        piece_bytes: int = _BUFFER_BYTES,
    ) -> None:
        self._client = client
        self._piece_bytes = piece_bytes
        self._attempts = settings.attempts
        self._space = space
        self._backoff = backoff
        self._traffic = traffic
        self._timeout = httpx.Timeout(settings.read_timeout_s, connect=settings.connect_timeout_s)

    async def download(
        self, location: str, stage: Stage, limit: SizeLimit, progress: Progress,
        *, wait_max_s: float = math.inf,
    ) -> bool:  # fmt: skip
        """Complete `stage.source`; tell whether bytes of an earlier request are part of it.

        `attempts` failures in a row that bring next to nothing end it, and `OriginBusy` a pause of
        more than `wait_max_s`. Raises `NotFound`
        (`location-not-found`), `Refused` (`location-refused`), `OriginFailed` (`origin-failed`),
        `NotVerified` (`size-mismatch`), `NoSpace` (`no-space`).
        """
        failures = 0
        while True:
            source = await trio.to_thread.run_sync(_continuation, stage, location)
            offset = stage.downloaded_bytes() if source else 0
            if source and (source.complete or offset == source.length_bytes):
                progress(offset, offset)
                return True
            try:
                return await self._attempt(location, stage, source, limit, progress)
            except _Passing as error:
                gained = stage.downloaded_bytes() - offset >= _GAIN_BYTES
                failures = 1 if gained else failures + 1
                if failures >= self._attempts:
                    raise OriginFailed(
                        "origin-failed", f"{error} ({failures} attempts); try again later."
                    ) from None
                if isinstance(error, _StartOver):
                    await trio.to_thread.run_sync(stage.drop)
                pause_s = self._backoff.pause_s(failures, error.retry_after_s)
                if pause_s > wait_max_s:
                    raise OriginBusy(
                        "origin-failed", f"{error}, to be asked again in {pause_s:.0f} s."
                    ) from None
                log.info("%s: %s; trying again", location, error)
                await trio.sleep(pause_s)

    async def _attempt(
        self, location: str, stage: Stage, source: Source | None, limit: SizeLimit,
        progress: Progress,
    ) -> bool:  # fmt: skip
        offset = stage.downloaded_bytes() if source else 0
        headers = {"Accept-Encoding": "identity"}
        if source and source.validator and offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": source.validator}
        try:
            async with respond(self._client, location, headers, self._timeout) as response:
                _judge_status(response, offset)
                begun = _begin(response, location, source, offset)
                if response.status_code == 200:
                    offset = 0
                    await trio.to_thread.run_sync(_restart, stage, begun)
                if begun.length_bytes is not None:
                    limit.judge(begun.length_bytes, total=True)
                    await self._space.obtain(begun.length_bytes - offset)
                await self._receive(response, stage, begun, offset, limit, progress)
        except ERRORS_THAT_PASS as error:
            raise _Passing(f"The connection failed: {_describe(error)}") from None
        except (httpx.InvalidURL, httpx.HTTPError) as error:
            raise OriginFailed("origin-failed", f"It failed: {_describe(error)}.") from None
        return offset > 0

    async def _receive(
        self, response: httpx.Response, stage: Stage, begun: Source, offset: int,
        limit: SizeLimit, progress: Progress,
    ) -> None:  # fmt: skip
        received = offset
        buffer = bytearray()
        failure: Exception | None = None
        try:
            # The loop is left by cancelling only: leaving it by an exception of ours would abandon
            # the client's nested generators half way.
            with trio.CancelScope() as stop:
                async for data in response.aiter_raw():
                    try:
                        received += len(data)
                        if self._traffic is not None:
                            self._traffic.moved(stage.directory.name, len(data))
                        limit.judge(received, total=False)
                        buffer += data
                        if len(buffer) >= self._piece_bytes:
                            await self._append(stage, buffer)
                            progress(received, begun.length_bytes)
                    except (StratocacheError, OSError) as error:
                        failure = failure or error
                        stop.cancel()
        finally:
            # What arrived before a cut is kept; nobody fetches it twice.
            if failure is None:
                await self._append(stage, buffer)
        if failure is not None:
            raise failure
        progress(received, begun.length_bytes)
        if begun.length_bytes is not None and received != begun.length_bytes:
            raise _Passing(f"The server sent {received} of {begun.length_bytes} bytes")
        limit.judge(received, total=True)
        complete = replace(begun, length_bytes=received, complete=True)
        await trio.to_thread.run_sync(stage.save, complete)

    async def _append(self, stage: Stage, buffer: bytearray) -> None:
        def append() -> None:
            self._space.obtain_blocking(len(buffer))
            with full_disk_is_no_space(stage.directory), stage.source.open("ab") as file:
                file.write(buffer)

        if buffer:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(append)
            buffer.clear()


def open_file(location: str) -> BinaryIO:
    """Open the regular file that a `file:` location names.

    Raises `NotFound` (`location-not-found`), `Refused` (`location-refused`).
    """
    parts = urlsplit(location)
    path = Path(unquote(parts.path))
    decorated = parts.netloc not in ("", "localhost") or parts.query or parts.fragment
    if decorated or not path.is_absolute() or "\0" in str(path):
        raise Refused("location-refused", "It is not of the form file:///absolute/path.")
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound("location-not-found", "The file does not exist.") from None
    except OSError as error:
        raise Refused("location-refused", f"It cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused("location-refused", "It is not a regular file.")
    return open(descriptor, "rb", buffering=0)


def _continuation(stage: Stage, location: str) -> Source | None:
    """Return the record of a download that can be continued; prepare an empty stage else."""
    stage.create()
    source = stage.load()
    if source is None or source.location != location:
        return None
    return source if source.complete or source.validator else None


def _restart(stage: Stage, begun: Source) -> None:
    with full_disk_is_no_space(stage.directory):
        stage.restart(begun)


def _begin(response: httpx.Response, location: str, source: Source | None, offset: int) -> Source:
    """Return what the body belongs to; a part that does not continue ours starts over."""
    if response.status_code == 200:
        text = response.headers.get("Content-Length", "")
        length = int(text) if re.fullmatch(r"\d{1,19}", text) else None
        return Source(location, _validator(response.headers), length)
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if source is None or match is None or int(match[1]) != offset:
        raise _StartOver("The server answers with a part nobody asked for")
    total = int(match[3])
    etag = response.headers.get("ETag", source.validator)
    changed = source.validator and source.validator.startswith('"') and etag != source.validator
    if changed or (source.length_bytes is not None and total != source.length_bytes):
        raise _StartOver("The file changed while it was downloaded")
    return replace(source, length_bytes=total)


def _judge_status(response: httpx.Response, offset: int) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status == 416 and offset:
        raise _StartOver("The server cannot continue where the download stopped")
    reason = f"The server answers {status} {response.reason_phrase[:60]}".rstrip()
    if status in GONE_STATUSES:
        raise NotFound("location-not-found", f"{reason}.")
    if status in PASSING_STATUSES:
        raise _Passing(reason, retry_after_s(response))
    raise OriginFailed("origin-failed", f"{reason}.")


def retry_after_s(response: httpx.Response) -> float:
    """Return how long a server asks us to wait, 0 when it does not say in seconds."""
    text = response.headers.get("Retry-After", "")
    return float(text) if re.fullmatch(r"\d{1,6}", text) else 0.0


def _validator(headers: httpx.Headers) -> str | None:
    etag: str | None = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    modified: str | None = headers.get("Last-Modified")
    return modified


def _describe(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__
