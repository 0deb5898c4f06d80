"""Which 4 KiB blocks of an overlay are in its data file: the live and the durable bitmap.

Format, invariants and the order of writes are in OVERLAY.md. Nothing here waits or locks: the
overlay calls it from one thread, between two awaits.
"""

import logging
import struct
import uuid
import zlib
from pathlib import Path
from typing import Final

from stratocache.cache.errors import Internal, NotVerified
from stratocache.fs.storage import BlockFile, LiveMap, Storage

log = logging.getLogger(__name__)

BLOCK_SHIFT: Final = 12
BLOCK_BYTES: Final = 1 << BLOCK_SHIFT
HEADER_BYTES: Final = 4096
PAGE_BYTES: Final = 4096
"""Unit in which the bitmap is compared and written."""

VERSION: Final = 1
_MAGIC = b"stratobm"
_HEADER = struct.Struct("<8sIIQ16s16s")
_CHECKSUM = struct.Struct("<I")
_FAILED_OFFSET = 64
"""One byte of the live header, 1 after a failed sync of the data file; outside the checksum."""
_WRITING_OFFSET = 65
"""The same, 1 from before a page of the durable bitmap is written until it has been synced."""

_NO_BOOT = bytes(16)
_PIECE_BYTES = 256 * PAGE_BYTES


def file_bytes(size_bytes: int) -> int:
    """Return the length of the bitmap file, header included, of a disk of that size."""
    blocks = (size_bytes + BLOCK_BYTES - 1) >> BLOCK_SHIFT
    pages = (blocks + 8 * PAGE_BYTES - 1) // (8 * PAGE_BYTES)
    return HEADER_BYTES + pages * PAGE_BYTES


def new_header(size_bytes: int) -> bytes:
    """Return the header page of a new durable bitmap, with a generation that is nobody else's."""
    return _pack(size_bytes, uuid.uuid4().bytes, _NO_BOOT)


def _pack(size_bytes: int, generation: bytes, boot: bytes) -> bytes:
    fields = _HEADER.pack(_MAGIC, VERSION, BLOCK_BYTES, size_bytes, generation, boot)
    return (fields + _CHECKSUM.pack(zlib.crc32(fields))).ljust(HEADER_BYTES, b"\0")


def read_header(header: bytes, path: Path) -> tuple[int, bytes]:
    """Return the size and the generation that a durable header names.

    Raises `Internal` (`overlay-too-new`) for a later version, `NotVerified` (`overlay-damaged`)
    for anything else that this version did not write.
    """
    fields = header[: _HEADER.size]
    if len(header) == HEADER_BYTES:
        (checksum,) = _CHECKSUM.unpack_from(header, _HEADER.size)
        magic, version, block_bytes, size_bytes, generation, boot = _HEADER.unpack(fields)
        if magic == _MAGIC and version > VERSION:
            raise Internal(
                "overlay-too-new",
                f"{path} has format {version}, this Stratocache knows {VERSION}; "
                "install a newer one.",
            )
        expected = (_MAGIC, VERSION, BLOCK_BYTES, _NO_BOOT, zlib.crc32(fields))
        if (magic, version, block_bytes, boot, checksum) == expected:
            return size_bytes, generation
    raise NotVerified("overlay-damaged", f"{path} is not the bitmap of a disk; restore the disk.")


def _is_live(live: LiveMap, generation: bytes, boot: bytes) -> bool:
    """Tell whether a live bitmap belongs to that durable one and this boot, whatever its size."""
    known = _HEADER.size + _CHECKSUM.size
    if len(live) < HEADER_BYTES:
        return False
    size_bytes: int = _HEADER.unpack(live[: _HEADER.size])[3]
    return live[:known] == _pack(size_bytes, generation, boot)[:known]


class Bitmap:
    """The live bitmap, and which of its pages the durable one does not have yet."""

    def __init__(
        self, live: LiveMap, live_path: Path, size_bytes: int, unwritten: set[int], storage: Storage
    ) -> None:
        self.size_bytes = size_bytes
        self._storage = storage
        self._live_path = live_path
        self._unwritten = unwritten
        self._map(live)

    def _map(self, live: LiveMap) -> None:
        self._live = live
        self._view = memoryview(live)
        self.bits = self._view[HEADER_BYTES:]
        """Bit i of byte b is block 8 * b + i; reads index it, `mark` alone writes it."""

    @classmethod
    def load(cls, durable: BlockFile, path: Path, live_path: Path, storage: Storage) -> "Bitmap":
        """Take up the live bitmap if it is this disk's, of this boot, else copy the durable.

        Raises what `read_header` raises, and `OSError`.
        """
        if durable.size() < HEADER_BYTES:
            raise NotVerified("overlay-damaged", f"{path} is cut off; restore the disk.")
        size_bytes, generation = read_header(durable.pread(HEADER_BYTES, 0), path)
        length = file_bytes(size_bytes)
        if durable.size() < length:
            raise NotVerified("overlay-damaged", f"{path} is not {length} bytes; restore the disk.")
        boot = storage.boot_id()
        live = storage.map_live(live_path)
        if live is not None:
            if _is_live(live, generation, boot):
                # a death in the middle of growth leaves it of another length
                if len(live) != length:
                    live = _resized(live, _pack(size_bytes, generation, boot), live_path, storage)
                # half a flush: what the file reads is perhaps not what the medium has
                suspect = live[_WRITING_OFFSET] != 0
                unwritten = _unwritten_pages(live, durable, length, suspect=suspect)
                if unwritten is not None:
                    return cls(live, live_path, size_bytes, unwritten, storage)
            log.warning("%s is stale; the bitmap starts from %s", live_path, path)
            _unmap(live)
        content = _pack(size_bytes, generation, boot) + durable.pread(
            length - HEADER_BYTES, HEADER_BYTES
        )
        live = storage.create_live(live_path, content)
        return cls(live, live_path, size_bytes, set(), storage)

    def extend(self, durable: BlockFile, size_bytes: int) -> None:
        """Let the durable bitmap describe a larger disk, durably; any thread may.

        A crash in between leaves a file that is longer than its header says.
        """
        durable.extend(file_bytes(size_bytes), reserve=True)
        generation = bytes(self._view[24:40])
        durable.pwrite(_pack(size_bytes, generation, _NO_BOOT), 0)
        durable.fdatasync()

    def grow(self, size_bytes: int) -> None:
        """Let the live bitmap describe the larger disk, after `extend`; no `write` may run."""
        fields = _HEADER.unpack(self._view[: _HEADER.size])
        header = _pack(size_bytes, fields[4], fields[5])
        old = self._live
        self.bits.release()
        self._view.release()
        try:
            live = _resized(old, header, self._live_path, self._storage)
        except BaseException:
            self._map(old)
            raise
        self._map(live)
        self.size_bytes = size_bytes

    def is_full(self, size_bytes: int) -> bool:
        """Tell whether every block of a disk of that size is in the data file."""
        return self.count() >= (size_bytes + BLOCK_BYTES - 1) >> BLOCK_SHIFT

    def count(self) -> int:
        """Return how many blocks are in the data file."""
        return int.from_bytes(self.bits, "little").bit_count()

    @property
    def data_failed(self) -> bool:
        """Whether a sync of the data file has failed since this host booted."""
        return self._view[_FAILED_OFFSET] != 0

    def set_data_failed(self) -> None:
        """Remember, beyond this process, that a sync of the data file has failed."""
        self._view[_FAILED_OFFSET] = 1

    def has(self, block: int) -> bool:
        """Tell whether one block is in the data file."""
        return bool(self.bits[block >> 3] >> (block & 7) & 1)

    def run(self, first: int, count: int) -> int:
        """Return `count` blocks as one number, bit i = block `first` + i."""
        piece = self.bits[first >> 3 : (first + count + 7) >> 3]
        return int.from_bytes(piece, "little") >> (first & 7) & ((1 << count) - 1)

    def mark(self, first: int, count: int) -> None:
        """Record that blocks are in the data file; their bytes have been written before."""
        start = first >> 3
        if count == 1:
            before = self.bits[start]
            after = before | 1 << (first & 7)
            if after != before:
                self.bits[start] = after
                self._unwritten.add(start // PAGE_BYTES)
            return
        end = (first + count + 7) >> 3
        before = int.from_bytes(self.bits[start:end], "little")
        after = before | ((1 << count) - 1) << (first & 7)
        if after != before:
            self.bits[start:end] = after.to_bytes(end - start, "little")
            self._unwritten.update(range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1))

    def take_unwritten(self) -> dict[int, bytes]:
        """Return copies of the pages that the durable bitmap lacks, by number, and forget them."""
        pages, self._unwritten = self._unwritten, set()
        return {
            page: bytes(self.bits[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
            for page in sorted(pages)
        }

    def write(self, durable: BlockFile, pages: dict[int, bytes]) -> None:
        """Write pages of `take_unwritten` into the durable bitmap and sync it; any thread may."""
        self._view[_WRITING_OFFSET] = 1
        for page, content in pages.items():
            durable.pwrite(content, HEADER_BYTES + page * PAGE_BYTES)
        durable.fdatasync()
        self._view[_WRITING_OFFSET] = 0

    def put_back(self, pages: dict[int, bytes]) -> None:
        """Remember again the pages of `take_unwritten` that could not be written."""
        self._unwritten.update(pages)

    def close(self) -> None:
        """Unmap the live bitmap; its file stays."""
        self.bits.release()
        self._view.release()
        _unmap(self._live)


def _unmap(live: LiveMap) -> None:
    if not isinstance(live, bytearray):
        live.close()


def _resized(live: LiveMap, header: bytes, path: Path, storage: Storage) -> LiveMap:
    """Replace a live bitmap by one of the length that another header asks for; the marks stay."""
    size_bytes: int = _HEADER.unpack(header[: _HEADER.size])[3]
    length = file_bytes(size_bytes)
    marks = live[_FAILED_OFFSET : _WRITING_OFFSET + 1]
    content = b"".join((header[:_FAILED_OFFSET], marks, header[_WRITING_OFFSET + 1 :]))
    content += live[HEADER_BYTES:length]
    new = storage.create_live(path, content.ljust(length, b"\0"))
    _unmap(live)
    return new


def _unwritten_pages(
    live: LiveMap, durable: BlockFile, length: int, *, suspect: bool
) -> set[int] | None:
    """Return the pages to write, when `suspect` all that have a bit, else those that differ.

    None when the live bitmap lacks a bit of the durable one.
    """
    found = set()
    for start in range(HEADER_BYTES, length, _PIECE_BYTES):
        end = min(length, start + _PIECE_BYTES)
        old, new = durable.pread(end - start, start), live[start:end]
        if old == new and not suspect:
            continue
        if int.from_bytes(old, "little") & ~int.from_bytes(new, "little"):
            return None
        for offset in range(0, end - start, PAGE_BYTES):
            page = new[offset : offset + PAGE_BYTES]
            if old[offset : offset + PAGE_BYTES] != page or (suspect and any(page)):
                found.add((start - HEADER_BYTES + offset) // PAGE_BYTES)
    return found
