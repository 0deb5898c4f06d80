"""Export of an image as a casync store, which `casync extract` and desync read.

A `.castr` directory holds one zstd file per chunk, `abcd/<digest in hexadecimal>.cacnk`
(casync, `src/castore.c`), the all-zero chunk included.
"""

from pathlib import Path

import zstandard

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.images import ImageReader
from stratocache.cache.manifest import fsync_directory


def export(image: ImageReader, store: Path) -> int:
    """Write every chunk of an image into a casync store; return how many files were new.

    Blocks. Chunks are verified as they are read; raises what `ImageReader.read_blocking` does.
    """
    compressor = zstandard.ZstdCompressor()
    written = 0
    for index in range(image.manifest.chunk_count):
        name = image.manifest.digest(index).hex()
        path = store / name[:4] / f"{name}.cacnk"
        if path.exists():
            continue
        data = image.read_blocking(index * CHUNK_BYTES, CHUNK_BYTES)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(compressor.compress(data))
        temporary.rename(path)
        written += 1
    store.mkdir(parents=True, exist_ok=True)
    fsync_directory(store)
    return written
