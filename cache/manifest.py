"""Manifests: an image's ordered list of chunk digests, as a casync `.caibx` file.

The layout is casync's index of a blob cut in chunks of one size and named by SHA-256
(`casync make --digest=sha256 --chunk-size=N:N:N`), all integers little-endian 64 bit:

    header   48, CA_FORMAT_INDEX, feature flags, minimum, average and maximum chunk size
    table    2^64-1, CA_FORMAT_TABLE
    items    end offset of the chunk, 32 bytes SHA-256
    tail     0, 0, 48, bytes from the table's start to the end, CA_FORMAT_TABLE_TAIL_MARKER

Source: casync, `src/caformat.h`. Our files are byte for byte what casync writes.
"""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stratocache.cache.chunks import CHUNK_BYTES, DIGEST_BYTES, zero_digest
from stratocache.cache.errors import NotVerified

# CA_FORMAT_EXCLUDE_NODUMP | CA_FORMAT_EXCLUDE_FILE, as casync sets for a blob; bit 61
# (CA_FORMAT_SHA512_256) is clear, so the digest is SHA-256.
_FLAGS = 0x9000000000000000
_INDEX_MAGIC = 0x96824D9C7B129FF9
_TABLE_MAGIC = 0xE75B9E112F17417D
_TAIL_MAGIC = 0x4B4F050E5549ECD1
_HEADER = struct.pack(
    "<8Q", 48, _INDEX_MAGIC, _FLAGS, CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES, 2**64 - 1, _TABLE_MAGIC
)
_TABLE_HEADER_BYTES = 16
_ITEM = struct.Struct("<Q32s")
_TAIL = struct.Struct("<5Q")
_FRAME_BYTES = len(_HEADER) + _TAIL.size


@dataclass(frozen=True, slots=True)
class Manifest:
    """The chunks of one image: its size, and 32 bytes per chunk in `digests`.

    Invariant: `digests` holds one digest for each started `CHUNK_BYTES` of `size_bytes`.
    """

    size_bytes: int
    digests: bytes

    def __post_init__(self) -> None:
        if self.size_bytes < 0 or len(self.digests) != DIGEST_BYTES * _chunk_count(self.size_bytes):
            raise ValueError(f"{len(self.digests)} digest bytes for {self.size_bytes} image bytes")

    @property
    def chunk_count(self) -> int:
        """How many chunks the image has, zero ones counted."""
        return len(self.digests) // DIGEST_BYTES

    def digest(self, index: int) -> bytes:
        """Return the digest of chunk `index`; `IndexError` when there is no such chunk."""
        if not 0 <= index < self.chunk_count:
            raise IndexError(index)
        return self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]

    def chunk_bytes(self, index: int) -> int:
        """Return the size of chunk `index`; only the last may be shorter than `CHUNK_BYTES`."""
        return min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)

    def is_zero(self, index: int) -> bool:
        """Tell whether chunk `index` is all zero bytes, which no store holds."""
        return self.digest(index) == zero_digest(self.chunk_bytes(index))

    def index_of(self, digest: bytes) -> int | None:
        """Return the first index of a chunk, None when the image has none such."""
        start = self.digests.find(digest)
        while start >= 0 and start % DIGEST_BYTES:
            start = self.digests.find(digest, start + 1)
        return start // DIGEST_BYTES if start >= 0 else None

    def stored(self) -> Iterator[bytes]:
        """Yield the digest of every chunk that a store must hold, in order, repeats included."""
        zero = zero_digest(CHUNK_BYTES)
        for index in range(self.chunk_count):
            digest = self.digest(index)
            last = index == self.chunk_count - 1
            if digest != zero and not (last and self.is_zero(index)):
                yield digest

    def stored_bytes(self) -> int:
        """Return what a store takes for the image alone: each chunk once, none of zeros."""
        last = self.chunk_count - 1
        distinct = set(self.stored())
        short = CHUNK_BYTES - self.chunk_bytes(last) if self.chunk_count else 0
        ends_short = short and self.digest(last) in distinct
        return len(distinct) * CHUNK_BYTES - (short if ends_short else 0)

    def write(self, path: Path, *, mark: Callable[[Path], None] = lambda _: None) -> None:
        """Write the `.caibx` file: to a temporary name, fsync, rename, fsync of the directory.

        `mark` may add attributes to the file before it has its name.
        """
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(self.to_bytes())
                file.flush()
                mark(temporary)
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)

    def to_bytes(self) -> bytes:
        """Return the content of the `.caibx` file."""
        content = bytearray(_HEADER)
        for index in range(self.chunk_count):
            content += self._item(index)
        table_bytes = _TABLE_HEADER_BYTES + self.chunk_count * _ITEM.size + _TAIL.size
        content += _TAIL.pack(0, 0, 48, table_bytes, _TAIL_MAGIC)
        return bytes(content)

    def _item(self, index: int) -> bytes:
        end = min((index + 1) * CHUNK_BYTES, self.size_bytes)
        return _ITEM.pack(end, self.digest(index))

    @classmethod
    def read(cls, path: Path, *, image_bytes_max: int) -> "Manifest":
        """Read a `.caibx` file of an image of at most `image_bytes_max` bytes.

        The file is untrusted: its size is judged before memory is taken. Raises `NotVerified`
        (`manifest-invalid`) naming the first fault, and `FileNotFoundError`.
        """
        return cls.load(path, image_bytes_max=image_bytes_max)[0]

    @classmethod
    def load(cls, path: Path, *, image_bytes_max: int) -> "tuple[Manifest, bytes]":
        """Return a `.caibx` file as `read` does, and its content."""
        file_bytes_max = index_bytes(image_bytes_max)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > file_bytes_max:
                raise _invalid(str(path), f"{size} bytes are more than an image may need")
            content = file.read(size + 1)
        return cls.parse(content, str(path), image_bytes_max=image_bytes_max), content

    @classmethod
    def parse(cls, content: bytes, name: str, *, image_bytes_max: int) -> "Manifest":
        """Read the bytes of a `.caibx` file; `name` is what errors call it.

        Raises `NotVerified` (`manifest-invalid`) naming the first fault.
        """
        if len(content) < _FRAME_BYTES or (len(content) - _FRAME_BYTES) % _ITEM.size:
            raise _invalid(name, f"no index has {len(content)} bytes")
        if not content.startswith(_HEADER):
            raise _invalid(name, "it is not a casync index of 512 KiB chunks named by SHA-256")
        table_bytes = len(content) - len(_HEADER) + _TABLE_HEADER_BYTES
        if content[-_TAIL.size :] != _TAIL.pack(0, 0, 48, table_bytes, _TAIL_MAGIC):
            raise _invalid(name, "its tail is damaged")
        return cls._items(memoryview(content)[len(_HEADER) : -_TAIL.size], name, image_bytes_max)

    @classmethod
    def _items(cls, items: memoryview, name: str, image_bytes_max: int) -> "Manifest":
        digests = bytearray()
        end = 0
        for item_end, digest in _ITEM.iter_unpack(items):
            size = item_end - end
            if end % CHUNK_BYTES or not 0 < size <= CHUNK_BYTES:
                raise _invalid(name, f"chunk {len(digests) // DIGEST_BYTES} has a wrong end offset")
            digests += digest
            end = item_end
        if end > image_bytes_max:
            raise _invalid(name, f"an image of {end} bytes is over the limit of {image_bytes_max}")
        return cls(end, bytes(digests))


def index_bytes(image_bytes: int) -> int:
    """Return the length of the `.caibx` file of an image of so many bytes."""
    return _FRAME_BYTES + _chunk_count(image_bytes) * _ITEM.size


def fsync_directory(path: Path) -> None:
    """Make renames and deletions in a directory survive power loss (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunk_count(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


def _invalid(name: str, fault: str) -> NotVerified:
    return NotVerified("manifest-invalid", f"{name} is not a valid manifest: {fault}.")
