"""Export of an image as a casync store, which `casync extract` and desync read.

A `.castr` directory holds one zstd file per chunk, `abcd/<digest in hexadecimal>.cacnk`
(casync, `src/castore.c`), the all-zero chunk included.
"""

from pathlib import Path

import zstandard

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.manifest import fsync_directory


def export(image: ImageReader, store: Path) -> int:
    """Write every chunk of an image into a casync store; return how many files were new.

    Blocks. Chunks are verified as they are read; raises what `ImageReader.read_blocking` does.
    """
    writer = StoreWriter(store)
    for index in range(image.manifest.chunk_count):
        digest = image.manifest.digest(index)
        if not writer.has(digest):
            writer.add(digest, image.read_blocking(index * CHUNK_BYTES, CHUNK_BYTES))
    writer.close()
    return writer.written


class StoreWriter:
    """Writes chunks into a casync store."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._compressor = zstandard.ZstdCompressor()
        self.written = 0
        """Files that were new."""
        store.mkdir(parents=True, exist_ok=True)

    def has(self, digest: bytes) -> bool:
        """Tell whether a chunk is there already."""
        return self._path(digest).exists()

    def add(self, digest: bytes, data: bytes) -> None:
        """Write the chunk of that digest, by rename."""
        path = self._path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(self._compressor.compress(data))
        temporary.rename(path)
        self.written += 1

    def close(self) -> None:
        """Make the names of the directories durable."""
        fsync_directory(self._store)

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._store / name[:4] / f"{name}.cacnk"
