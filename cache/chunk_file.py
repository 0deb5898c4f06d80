"""Chunk files for processes that do not own the chunk store: read whole, and verified."""

import hashlib
from pathlib import Path

from stratocache.cache.chunkindex import chunk_file
from stratocache.cache.errors import NotVerified


def read_chunk(state_dir: Path, digest: bytes) -> bytes:
    """Return a chunk that has its digest.

    Raises `NotVerified` (`chunk-missing`, `chunk-corrupt`) and `OSError`.
    """
    name = digest.hex()
    try:
        data = chunk_file(state_dir / "chunks", digest).read_bytes()
    except FileNotFoundError:
        raise NotVerified("chunk-missing", f"Chunk {name} is missing.") from None
    if hashlib.sha256(data).digest() != digest:
        raise NotVerified("chunk-corrupt", f"Chunk {name} is damaged.")
    return data
