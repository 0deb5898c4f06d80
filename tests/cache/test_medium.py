"""Files past the page cache."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.medium import read_medium, write_medium


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk, which can do without its page cache, and one that is nothing else."""
    if request.param == "disk":
        yield tmp_path
    else:
        with TemporaryDirectory(dir="/dev/shm") as directory:
            yield Path(directory)


@pytest.mark.parametrize(
    "size_bytes", [0, 1, 4095, 4096, 4097, 12288, CHUNK_BYTES - 1, CHUNK_BYTES]
)
def test_what_is_written_past_the_cache_is_read_by_everyone(folder: Path, size_bytes: int) -> None:
    """Whatever the length and the file system, the file has the bytes and no more."""
    data = os.urandom(size_bytes)
    path = folder / "file"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        write_medium(descriptor, data)
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT  # as it was
    finally:
        os.close(descriptor)

    assert path.read_bytes() == data
    content, inode = read_medium(path, CHUNK_BYTES)
    assert (bytes(content), inode) == (data, path.stat().st_ino)


def test_imported_chunks_leave_the_page_cache_to_guests(tmp_path: Path) -> None:
    """Many chunks at once are not kept in memory; one that somebody waits for is."""
    store = ChunkStore(tmp_path / "chunks")
    many = [os.urandom(CHUNK_BYTES) for _ in range(4)]
    single = os.urandom(CHUNK_BYTES)
    try:
        assert store.put_all([(_digest(data), data) for data in many]) == 4
        assert store.put(_digest(single), single)
        assert [_is_cached(store.path(_digest(data))) for data in many] == [False] * 4
        assert _is_cached(store.path(_digest(single)))
    finally:
        store.close()


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _is_cached(path: Path) -> bool:
    """Whether a read would be answered from memory (preadv2(2), RWF_NOWAIT)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(4096)], 0, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
