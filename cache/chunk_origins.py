"""Where single chunks come from: ranges of a raw file, or a casync chunk store beside the index.

An origin gives bytes and is believed nothing: whoever asks compares every chunk with its digest.
What an origin does wrong becomes `Unavailable`, which says what may be expected of it next.
"""

import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

import httpx
import trio
import zstandard

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotFound, OriginFailed, Refused, StratocacheError
from stratocache.cache.location import beside_index
from stratocache.cache.origin import (
    CONTENT_RANGE,
    ERRORS_THAT_PASS,
    GONE_STATUSES,
    PASSING_STATUSES,
    open_file,
    retry_after_s,
)
from stratocache.cache.outgoing import respond

_PACKED_BYTES_MAX = CHUNK_BYTES + CHUNK_BYTES // 8 + 1024
"""No zstd frame of a chunk is longer."""
_WINDOW_BYTES_MAX = 8 * 1024**2
_STORE_SUFFIX = ".castr"
_DEFAULT_STORE = "default.castr"  # what casync looks for beside an index


@dataclass(frozen=True)
class Wanted:
    """One chunk of an image."""

    index: int
    digest: bytes
    size_bytes: int


Deliver = Callable[[Wanted, bytes], Awaitable[None]]
"""Takes the bytes of a chunk; raises what ends the reading."""
Moved = Callable[[int], None]
"""Is told of bytes as they come, whatever becomes of them."""


class Unavailable(Exception):
    """An origin did not give what it was asked for.

    `passing`: another attempt may do, after `retry_after_s` if the server said so. `wrong`: it has
    another file, or lies; it is left alone longer each time. `whole`: as wrong, it has no ranges, but
    the file may be what is wanted. `absent`: it lacks this chunk alone.
    """

    def __init__(
        self,
        reason: str,
        kind: Literal["passing", "wrong", "whole", "absent"] = "passing",
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.retry_after_s = retry_after_s


class ChunkOrigin(Protocol):
    """One place that has chunks of an image."""

    @property
    def location(self) -> str:
        """Its URL, by which its failures are remembered."""

    @property
    def run_max(self) -> int:
        """How many adjacent chunks one request may ask for."""

    @property
    def of_peer(self) -> bool:
        """Whether it is another host, which may have the chunk, and not what the entry names."""

    async def read(self, wanted: Sequence[Wanted], deliver: Deliver, moved: Moved) -> None:
        """Deliver adjacent chunks in order.

        Raises `Unavailable`, and what `deliver` raises; what was delivered before stays.
        """


def host_of(location: str) -> str:
    """Return what shares a limit of parallel requests: scheme, host and port."""
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc}"


def store_url(index_url: str) -> str:
    """Return the chunk store that belongs to an index: `NAME.castr` beside `NAME.caibx`.

    For an index of any other name it is `default.castr` beside it, where casync looks.
    """
    parts = urlsplit(index_url)
    default = parts._replace(path=f"{parts.path.rpartition('/')[0]}/{_DEFAULT_STORE}", fragment="")
    return beside_index(index_url, _STORE_SUFFIX) or urlunsplit(default)


class RangeOrigin:
    """The raw image itself, read in ranges: `http`, `https` or `file`."""

    run_max = 4
    """2 MiB: long enough to fill a link, short enough that a guest's read does not wait behind."""
    of_peer = False

    def __init__(
        self, location: str, image_bytes: int, client: httpx.AsyncClient, timeout: httpx.Timeout
    ) -> None:
        self.location = location
        self._image_bytes = image_bytes
        self._client = client
        self._timeout = timeout

    async def read(self, wanted: Sequence[Wanted], deliver: Deliver, moved: Moved) -> None:
        """Deliver adjacent chunks by one request; see `ChunkOrigin`."""
        start = wanted[0].index * CHUNK_BYTES
        end = start + sum(item.size_bytes for item in wanted)
        if urlsplit(self.location).scheme == "file":
            await self._read_file(wanted, deliver, moved)
            return
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
        pieces = _Pieces(wanted, deliver, moved)

        def judge(response: httpx.Response) -> None:
            _judge_range(response, start, end, self._image_bytes)

        await _receive(self._client, self.location, headers, self._timeout, judge, pieces.take)
        if pieces.received_bytes != end - start:
            raise Unavailable(f"it sent {pieces.received_bytes} of {end - start} bytes")

    async def _read_file(self, wanted: Sequence[Wanted], deliver: Deliver, moved: Moved) -> None:
        for item in wanted:
            data = await trio.to_thread.run_sync(self._read_piece, item)
            if len(data) != item.size_bytes:
                raise Unavailable("the file is shorter than the image", "wrong")
            moved(len(data))
            await deliver(item, data)

    def _read_piece(self, item: Wanted) -> bytes:
        with _local_errors(), closing(open_file(self.location)) as file:
            return os.pread(file.fileno(), item.size_bytes, item.index * CHUNK_BYTES)


async def read_range(
    client: httpx.AsyncClient, location: str, start: int, size_bytes: int, file_bytes: int,
    limits: httpx.Timeout, moved: Moved,
) -> bytes:  # fmt: skip
    """Return a range of a file of `file_bytes`; raises `Unavailable`."""
    data = bytearray()

    async def take(piece: bytes) -> None:
        moved(len(piece))
        data.extend(piece)
        if len(data) > size_bytes:
            raise Unavailable("it sends more than was asked for", "wrong")

    def judge(response: httpx.Response) -> None:
        _judge_range(response, start, start + size_bytes, file_bytes)

    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{start + size_bytes - 1}"}
    await _receive(client, location, headers, limits, judge, take)
    if len(data) != size_bytes:
        raise Unavailable(f"it sent {len(data)} of {size_bytes} bytes")
    return bytes(data)


def _judge_range(response: httpx.Response, start: int, end: int, file_bytes: int) -> None:
    if response.status_code == 200:
        raise Unavailable("it does not serve ranges", "whole")
    if response.status_code != 206:
        raise _status(response)
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or [int(text) for text in match.groups()] != [start, end - 1, file_bytes]:
        raise Unavailable("it sends another range, or has another file", "wrong")


class CastrOrigin:
    """A casync chunk store: one zstd file per chunk, `abcd/<digest in hexadecimal>.cacnk`."""

    run_max = 1
    of_peer = False

    def __init__(self, location: str, client: httpx.AsyncClient, timeout: httpx.Timeout) -> None:
        self.location = location
        self._client = client
        self._timeout = timeout

    async def read(self, wanted: Sequence[Wanted], deliver: Deliver, moved: Moved) -> None:
        """Deliver chunks by a request for each; see `ChunkOrigin`."""
        for item in wanted:
            packed = await self._packed(item, moved)
            data = await trio.to_thread.run_sync(_unpack, packed, item.size_bytes)
            await deliver(item, data)

    async def _packed(self, item: Wanted, moved: Moved) -> bytes:
        name = item.digest.hex()
        location = _below(self.location, f"{name[:4]}/{name}.cacnk")
        if urlsplit(location).scheme == "file":
            found = await trio.to_thread.run_sync(_read_packed, location)
            moved(len(found))
            return found
        packed = bytearray()

        async def take(data: bytes) -> None:
            moved(len(data))
            packed.extend(data)
            if len(packed) > _PACKED_BYTES_MAX:
                raise Unavailable("a chunk file is longer than a chunk can be", "wrong")

        def judge(response: httpx.Response) -> None:
            if response.status_code in GONE_STATUSES:
                raise Unavailable(f"it has no chunk {name}", "absent")
            if response.status_code != 200:
                raise _status(response)

        headers = {"Accept-Encoding": "identity"}
        await _receive(self._client, location, headers, self._timeout, judge, take)
        return bytes(packed)


class _Pieces:
    """Cuts a body into the chunks that were asked for."""

    def __init__(self, wanted: Sequence[Wanted], deliver: Deliver, moved: Moved) -> None:
        self._moved = moved
        self._remaining = list(reversed(wanted))
        self._deliver = deliver
        self._buffer = bytearray()
        self.received_bytes = 0

    async def take(self, data: bytes) -> None:
        self._moved(len(data))
        self.received_bytes += len(data)
        self._buffer += data
        while self._remaining and len(self._buffer) >= self._remaining[-1].size_bytes:
            item = self._remaining.pop()
            chunk = bytes(self._buffer[: item.size_bytes])
            del self._buffer[: item.size_bytes]
            await self._deliver(item, chunk)
        if not self._remaining and self._buffer:
            raise Unavailable("it sends more than was asked for", "wrong")


async def _receive(
    client: httpx.AsyncClient,
    location: str,
    headers: dict[str, str],
    limits: httpx.Timeout,
    judge: Callable[[httpx.Response], None],
    take: Callable[[bytes], Awaitable[None]],
) -> None:
    """Ask, judge the answer's head, and give its body to `take`."""
    failure: Exception | None = None
    try:
        async with respond(client, location, headers, limits) as response:
            try:
                judge(response)
            except Unavailable as error:
                failure = error
            # The loop is left by cancelling only: leaving it by an exception of ours would abandon
            # the client's nested generators half way.
            with trio.CancelScope() as stop:
                if failure is not None:
                    stop.cancel()
                async for data in response.aiter_raw():
                    try:
                        if failure is None:
                            await take(data)
                    except (Unavailable, StratocacheError, OSError) as error:
                        failure = error
                        stop.cancel()
    except ERRORS_THAT_PASS as error:
        raise failure or Unavailable(f"the connection failed: {_describe(error)}") from None
    except (httpx.InvalidURL, httpx.HTTPError) as error:
        raise Unavailable(f"it failed: {_describe(error)}", "wrong") from None
    except (Refused, OriginFailed) as error:
        raise Unavailable(error.message, "wrong") from None
    if failure is not None:
        raise failure


def _status(response: httpx.Response) -> Unavailable:
    status = response.status_code
    reason = f"it answers {status}"
    if status in PASSING_STATUSES:
        return Unavailable(reason, retry_after_s=retry_after_s(response))
    return Unavailable(reason, "wrong")


def _unpack(packed: bytes, size_bytes: int) -> bytes:
    """Decompress a chunk, never to more than one byte beyond its size."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX)
    try:
        with decompressor.stream_reader(packed) as reader:
            return reader.read(size_bytes + 1)
    except zstandard.ZstdError as error:
        raise Unavailable(f"a chunk file is damaged: {error}", "wrong") from None


def _read_packed(location: str) -> bytes:
    with _local_errors(), closing(open_file(location)) as file:
        return os.pread(file.fileno(), _PACKED_BYTES_MAX, 0)


@contextmanager
def _local_errors() -> Iterator[None]:
    """Turn what opening and reading a local file raises into `Unavailable`."""
    try:
        yield
    except NotFound as error:
        raise Unavailable(error.message, "absent") from None
    except (Refused, OSError) as error:
        raise Unavailable(str(error), "wrong") from None


def _below(location: str, name: str) -> str:
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _describe(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__
