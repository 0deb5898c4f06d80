"""An image that is being made here, chunk by chunk."""

import hashlib
from collections.abc import Iterable, Sequence

from stratocache.cache.chunks import CHUNK_BYTES, DIGEST_BYTES, ChunkStore, zero_digest
from stratocache.cache.manifest import Manifest

NamedChunk = tuple[bytes, bytes]
"""A chunk after its digest."""

_ZERO_CHUNK = bytes(CHUNK_BYTES)


class Draft:
    """An image being made: chunks are added in order, then it is published or abandoned.

    All run in threads, each one at a time; `record` and `store` may run beside each other.
    """

    def __init__(self, chunks: ChunkStore) -> None:
        self._chunks = chunks
        self._digests = bytearray()
        self.size_bytes = 0

    def add(self, data: Sequence[bytes]) -> None:
        """Append chunks: of `CHUNK_BYTES`, only the image's last fewer. Raises `NoSpace`."""
        self.store(self.record(data))

    def record(self, data: Sequence[bytes]) -> list[NamedChunk]:
        """Append chunks that are to be stored next; return those worth storing, with digests.

        The digests are on record before the chunks are in the store: removal looks at records.
        """
        named = []
        for chunk in data:
            if not chunk or len(chunk) > CHUNK_BYTES or self.size_bytes % CHUNK_BYTES:
                raise ValueError(f"{len(chunk)} bytes do not fit at {self.size_bytes}")
            # Two bytes objects: one memcmp, which ends at the first byte that is not zero.
            zero = chunk == _ZERO_CHUNK
            digest = zero_digest(CHUNK_BYTES) if zero else hashlib.sha256(chunk).digest()
            self._digests += digest
            self.size_bytes += len(chunk)
            if not zero:
                named.append((digest, chunk))
        return named

    def store(self, named: Sequence[NamedChunk]) -> None:
        """Store chunks that are on record. Raises `NoSpace`."""
        self._chunks.put_all(named)

    def manifest(self) -> Manifest:
        """Return the manifest of what has been added."""
        return Manifest(self.size_bytes, bytes(self._digests))

    def stored(self) -> Iterable[bytes]:
        """Return the digests added so far."""
        digests = bytes(self._digests)
        return (digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES))
