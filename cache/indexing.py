"""Making the chunk index of an image file, and the chunk store beside it, for others to fetch by."""

import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path

from stratocache.cache.castr import StoreWriter
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.decompression import decompressed
from stratocache.cache.errors import InvalidInput, NoSpace, NotVerified
from stratocache.cache.ingestion import chunks_of
from stratocache.cache.manifest import Manifest
from stratocache.cache.publication import compression_of

_IMAGE_BYTES_MAX = 64 * 1024**4


@dataclass(frozen=True)
class Indexed:
    """What was written for one image."""

    index: Path
    store: Path
    sha256: str
    """Of the index file."""
    size_bytes: int
    """Of the image."""
    chunks: int
    """Distinct ones, zeros counted once."""
    new_chunks: int


def index_image(image: Path, directory: Path) -> Indexed:
    """Write `NAME.caibx` and `NAME.castr/` of an image, which is decompressed if its name says so.

    NAME is that of the image without the suffix of a compression. Blocks. Done again it writes what
    is missing. Raises `InvalidInput` (`image-unreadable`, `output-unwritable`), `NoSpace`
    (`output-no-space`) and `NotVerified` for a damaged stream.
    """
    name = image.name if compression_of(image) == "none" else image.stem
    index, store = directory / f"{name}.caibx", directory / f"{name}.castr"
    overlong = NotVerified("image-too-large", f"{image} has more than {_IMAGE_BYTES_MAX} bytes.")
    try:
        file = image.open("rb")
    except OSError as error:
        raise InvalidInput(
            "image-unreadable", f"{image} cannot be read: {error.strerror}."
        ) from None
    try:
        with file:
            writer = StoreWriter(store)
            digests, size_bytes, seen = bytearray(), 0, set()
            stream = decompressed(file, compression_of(image))
            for chunk in chunks_of(stream, _IMAGE_BYTES_MAX, overlong=overlong):
                digest = hashlib.sha256(chunk).digest()
                digests += digest
                size_bytes += len(chunk)
                if digest not in seen and not writer.has(digest):
                    writer.add(digest, chunk)
                seen.add(digest)
            writer.close()
            # the index last: whoever reads it finds every chunk of it
            Manifest(size_bytes, bytes(digests)).write(index)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("output-no-space", f"{directory}: {error.strerror}.") from None
        raise InvalidInput(
            "output-unwritable", f"{directory} cannot be written: {error.strerror}."
        ) from None
    assert len(digests) == 32 * -(-size_bytes // CHUNK_BYTES)
    sha256 = hashlib.sha256(index.read_bytes()).hexdigest()
    return Indexed(index, store, sha256, size_bytes, len(seen), writer.written)
