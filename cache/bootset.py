"""Boot sets: which chunks of an image a boot reads, in the order in which it does.

One JSON object, in `bootsets/ID` and as `NAME.bootset` beside `NAME.caibx`:

    {"version": 1, "chunk_bytes": 524288, "size_bytes": SIZE OF THE IMAGE, "indexes": [0, 7, …]}

It is advice and nothing relies on it: one that is wrong costs time, never bytes of a guest.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotVerified
from stratocache.cache.manifest import fsync_directory

INDEXES_MAX = 4096
"""2 GiB of chunks; a boot reads far less."""
BYTES_MAX = 64 * 1024
SUFFIX = ".bootset"
_VERSION = 1


def encode(indexes: Sequence[int], size_bytes: int) -> bytes:
    """Return the bytes of a boot set of an image of `size_bytes`."""
    record = {
        "version": _VERSION,
        "chunk_bytes": CHUNK_BYTES,
        "size_bytes": size_bytes,
        "indexes": list(indexes)[:INDEXES_MAX],
    }
    return json.dumps(record).encode()


def decode(content: bytes, size_bytes: int) -> list[int]:
    """Return the chunks that a boot set names, each once.

    It is untrusted. Raises `NotVerified` (`bootset-invalid`), also for one of an image of another
    size.
    """
    try:
        record = json.loads(content) if len(content) <= BYTES_MAX else None
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("version") != _VERSION:
        raise _invalid("it is not a boot set of version 1")
    if record.get("chunk_bytes") != CHUNK_BYTES or record.get("size_bytes") != size_bytes:
        raise _invalid("it belongs to another image")
    indexes = record.get("indexes")
    count = -(-size_bytes // CHUNK_BYTES)
    if not isinstance(indexes, list) or len(indexes) > INDEXES_MAX:
        raise _invalid("it names no chunks, or too many")
    if not all(type(index) is int and 0 <= index < count for index in indexes):
        raise _invalid("it names chunks that the image does not have")
    return list(dict.fromkeys(indexes))


def write(path: Path, content: bytes) -> None:
    """Write a boot set: to a temporary name, fsync, rename, fsync of the directory."""
    path.parent.mkdir(mode=0o750, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_directory(path.parent)


def read(path: Path) -> bytes:
    """Return the bytes of a boot set, never more than one may have. Raises `FileNotFoundError`."""
    with path.open("rb") as file:
        return file.read(BYTES_MAX + 1)


def _invalid(fault: str) -> NotVerified:
    return NotVerified("bootset-invalid", f"The boot set cannot be used: {fault}.")
