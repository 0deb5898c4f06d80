"""Single chunks of a qcow2 image that is still at its origin, read by ranges of its file.

What the file says is only a hint where to look: each chunk is compared with the digest that the
endorser signed. So a file that lies, or changes meanwhile, costs time and never a byte. No code of
QEMU's sees it; DEMAND.md says why.
"""

import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import httpx
import trio
import zstandard

from stratocache.cache.chunk_origins import Deliver, Moved, Unavailable, Wanted, read_range
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotVerified
from stratocache.cache.qcow2 import (
    HEADER_BYTES,
    Extent,
    Header,
    judge_header,
    locate,
    require_readable,
    table_offset,
)

_TABLES_MAX = 64
"""Of the second level, kept in memory: each is a cluster, and names 512 MiB at 64 KiB."""
_GAP_BYTES = 64 * 1024
"""What lies between two clusters is read over rather than asked around."""
_RANGES_MAX = 64
"""For the chunks of one request; more is fetched whole rather."""
_RANGE_BYTES_MAX = 4 * 1024**2


class Qcow2Origin:
    """One location of a qcow2 file of `file_bytes` whose disk has `image_bytes`; `http` or `https`."""

    of_peer = False
    run_max = 4

    def __init__(
        self, location: str, file_bytes: int, image_bytes: int, client: httpx.AsyncClient,
        timeout: httpx.Timeout,
    ) -> None:  # fmt: skip
        self.location = location
        self._file_bytes = file_bytes
        self._image_bytes = image_bytes
        self._client = client
        self._timeout = timeout
        self._header: Header | None = None
        self._level_1 = b""
        self._tables: OrderedDict[int, bytes] = OrderedDict()
        self._opening = trio.Lock()

    async def read(self, wanted: Sequence[Wanted], deliver: Deliver, moved: Moved) -> None:
        """Deliver adjacent chunks with few requests; see `ChunkOrigin`."""
        try:
            header = await self._open(moved)
            extents: dict[int, Extent | None] = {}
            for cluster in _clusters(wanted, header):
                extent = await self._locate(cluster, header, moved)
                extents[cluster] = _trimmed(extent, cluster, wanted, header)
            pieces = await self._fetch([e for e in extents.values() if e is not None], moved)
            for item in wanted:
                await deliver(item, self._chunk(item, extents, pieces, header))
        except Unavailable as error:
            if error.kind == "wrong":
                self._forget()  # the file may be another one now
            raise

    def _forget(self) -> None:
        self._header, self._level_1 = None, b""
        self._tables.clear()

    async def _open(self, moved: Moved) -> Header:
        """Return the header, with the first level's table read, once for all who ask."""
        async with self._opening:
            if self._header is not None:
                return self._header
            try:
                head = await self._range(0, min(HEADER_BYTES, self._file_bytes), moved)
                header = judge_header(head, image_bytes_max=self._image_bytes)
                require_readable(header, self._image_bytes)
            except NotVerified as error:
                raise Unavailable(error.message, "wrong") from None
            tables = -(-self._image_bytes // (header.cluster_bytes * header.l2_entries))
            self._level_1 = await self._range(header.l1_offset, tables * 8, moved)
            self._header = header
            return header

    async def _locate(self, cluster: int, header: Header, moved: Moved) -> Extent | None:
        number, place = divmod(cluster, header.l2_entries)
        offset = table_offset(_entry(self._level_1, number))
        if not offset:
            return None
        table = self._tables.get(offset)
        if table is None:
            async with self._opening:  # one reads a table for all who need it
                table = self._tables.get(offset)
                if table is None:
                    table = await self._range(offset, header.cluster_bytes, moved)
                    self._tables[offset] = table
                    while len(self._tables) > _TABLES_MAX:
                        self._tables.popitem(last=False)
        try:
            return locate(_entry(table, place), header)
        except NotVerified as error:
            raise Unavailable(error.message, "wrong") from None

    async def _fetch(self, extents: list[Extent], moved: Moved) -> dict[int, bytes]:
        """Return the bytes of extents by their offsets."""
        found: dict[int, bytes] = {}
        groups = list(_groups(extents))
        if len(groups) > _RANGES_MAX:
            raise Unavailable("its clusters are too scattered", "wrong")
        for group in groups:
            start = group[0].offset
            end = min(self._file_bytes, max(one.offset + one.size_bytes for one in group))
            data = await self._range(start, end - start, moved)
            for one in group:
                found[one.offset] = data[one.offset - start :][: one.size_bytes]
        return found

    async def _range(self, start: int, size_bytes: int, moved: Moved) -> bytes:
        if size_bytes <= 0 or start + size_bytes > self._file_bytes:
            raise Unavailable("its tables lead beyond its end", "wrong")
        return await read_range(
            self._client, self.location, start, size_bytes, self._file_bytes, self._timeout, moved
        )

    def _chunk(
        self, item: Wanted, extents: dict[int, Extent | None], pieces: dict[int, bytes],
        header: Header,
    ) -> bytes:  # fmt: skip
        """Put a chunk together; it may begin and end within clusters."""
        data = bytearray()
        for cluster in _clusters([item], header):
            extent = extents[cluster]
            if extent is None:
                data += bytes(header.cluster_bytes)
            elif extent.compressed:
                data += _unpack(pieces[extent.offset], header)
            else:
                # its beginning may have been left out
                skipped = extent.offset % header.cluster_bytes
                whole = bytes(skipped) + pieces[extent.offset]
                data += whole.ljust(header.cluster_bytes, b"\0")
        skipped = item.index * CHUNK_BYTES % header.cluster_bytes
        return bytes(data[skipped : skipped + item.size_bytes])


def _clusters(wanted: Sequence[Wanted], header: Header) -> range:
    """Return the clusters of adjacent chunks."""
    start = wanted[0].index * CHUNK_BYTES
    end = wanted[-1].index * CHUNK_BYTES + wanted[-1].size_bytes
    return range(start >> header.cluster_bits, -(-end >> header.cluster_bits))


def _trimmed(
    extent: Extent | None, cluster: int, wanted: Sequence[Wanted], header: Header
) -> Extent | None:
    """Leave out what nobody wants of a cluster that may be longer than a chunk."""
    if extent is None or extent.compressed:
        return extent
    start = cluster << header.cluster_bits
    first = max(start, wanted[0].index * CHUNK_BYTES)
    end = wanted[-1].index * CHUNK_BYTES + wanted[-1].size_bytes
    last = min(start + header.cluster_bytes, end)
    return Extent(extent.offset + first - start, last - first, compressed=False)


def _groups(extents: list[Extent]) -> Iterator[list[Extent]]:
    """Put together what lies close enough for one request."""
    group: list[Extent] = []
    end = 0
    for extent in sorted(extents, key=lambda one: one.offset):
        far = extent.offset > end + _GAP_BYTES
        long = group and extent.offset + extent.size_bytes - group[0].offset > _RANGE_BYTES_MAX
        if group and (far or long):
            yield group
            group = []
        group.append(extent)
        end = max(end, extent.offset + extent.size_bytes)
    if group:
        yield group


def _entry(table: bytes, place: int) -> int:
    try:
        entry: int = struct.unpack_from(">Q", table, place * 8)[0]
    except struct.error:
        raise Unavailable("its tables are too short", "wrong") from None
    return entry


def _unpack(packed: bytes, header: Header) -> bytes:
    """Decompress a cluster, never to more than its size."""
    try:
        if header.zstd:
            with zstandard.ZstdDecompressor(
                max_window_size=8 * 1024**2
            ).stream_reader(packed) as reader:  # fmt: skip
                data = reader.read(header.cluster_bytes)
        else:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, header.cluster_bytes)
    except (zlib.error, zstandard.ZstdError) as error:
        raise Unavailable(f"a cluster is damaged: {error}", "wrong") from None
    return data.ljust(header.cluster_bytes, b"\0")
