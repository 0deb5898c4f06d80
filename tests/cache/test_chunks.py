"""The chunk store: names, verification, quarantine, removal, the account."""

import errno
import hashlib
import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import diskcache
import pytest
from support.failing_calls import FailingCalls

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore, zero_digest
from stratocache.cache.errors import NotVerified


def _chunk(seed: int, size: int = CHUNK_BYTES) -> tuple[bytes, bytes]:
    data = hashlib.shake_128(seed.to_bytes(8, "big")).digest(size)
    return hashlib.sha256(data).digest(), data


def _files(state_dir: Path) -> list[Path]:
    return sorted(p for p in (state_dir / "chunks").rglob("*") if p.is_file() and len(p.name) > 60)


def test_a_chunk_is_a_file_of_raw_bytes_named_by_its_digest(
    chunks: ChunkStore, state_dir: Path
) -> None:
    """A stored chunk's file has the digest as name and the data as content."""
    digest, data = _chunk(1)

    assert chunks.put(digest, data)

    name = digest.hex()
    path = state_dir / "chunks" / name[0] / name[1] / name
    assert chunks.path(digest) == path
    assert path.read_bytes() == data


def test_putting_twice_stores_once(chunks: ChunkStore) -> None:
    """The second put of the same chunk says that it was there."""
    digest, data = _chunk(2, 1234)

    assert chunks.put(digest, data)
    assert not chunks.put(digest, data)

    statistics = chunks.statistics()
    assert (statistics.chunks, statistics.size_bytes) == (1, 1234)
    assert chunks.path(digest).read_bytes() == data


@pytest.mark.parametrize("size", [1, 4096, CHUNK_BYTES])
def test_zero_chunks_are_never_stored(chunks: ChunkStore, state_dir: Path, size: int) -> None:
    """A chunk of zeros, full or short, leaves no file."""
    assert not chunks.put(zero_digest(size), bytes(size))
    assert _files(state_dir) == []


def test_an_open_chunk_reads_back(chunks: ChunkStore) -> None:
    """The descriptor of a verified chunk gives its bytes and cannot write."""
    digest, data = _chunk(3)
    chunks.put(digest, data)

    assert chunks.opened(digest) is None
    descriptor = chunks.open(digest)

    assert os.pread(descriptor, CHUNK_BYTES, 0) == data
    assert chunks.opened(digest) is descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(descriptor, b"x", 0)


def test_a_corrupt_chunk_goes_to_quarantine(chunks: ChunkStore, state_dir: Path) -> None:
    """A changed byte is noticed at the first opening; the file is kept aside, not served."""
    digest, data = _chunk(4)
    chunks.put(digest, data)
    with chunks.path(digest).open("r+b") as file:
        file.seek(1000)
        file.write(b"!")

    with pytest.raises(NotVerified) as caught:
        chunks.open(digest)

    assert caught.value.code == "chunk-corrupt"
    assert digest not in chunks
    assert (state_dir / "quarantine" / digest.hex()).exists()
    assert chunks.statistics().chunks == 0
    assert chunks.put(digest, data)
    assert os.pread(chunks.open(digest), CHUNK_BYTES, 0) == data


def test_an_error_of_the_medium_that_passes_costs_no_chunk(
    chunks: ChunkStore, state_dir: Path
) -> None:
    """A chunk whose file cannot be opened, or read, just once is given and inspected all the same."""
    digest, data = _chunk(14)
    chunks.put(digest, data)
    for read, numbers in ((chunks.open, (0, 2)), (chunks.inspect, (0, 1))):
        for number in numbers:
            chunks.distrust(digest)
            calls = FailingCalls([state_dir / "chunks"], number, errno.EIO)
            with calls.armed():
                read(digest)
            assert calls.failed is not None
            assert calls.failed.startswith(("open", "pread")), calls.failed
    assert chunks.statistics().quarantined == 0


def test_an_error_of_the_medium_that_stays_is_damage(
    chunks: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that cannot be read when it is tried once more goes to quarantine."""
    digest, data = _chunk(15)
    chunks.put(digest, data)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(NotVerified) as failure:
        chunks.open(digest)
    assert failure.value.code == "chunk-corrupt"
    assert digest not in chunks


def test_an_overlong_chunk_is_corrupt(chunks: ChunkStore) -> None:
    """Bytes after a chunk's end do not pass."""
    digest, data = _chunk(5)
    chunks.put(digest, data)
    with chunks.path(digest).open("ab") as file:
        file.write(b"more")

    with pytest.raises(NotVerified, match="quarantine"):
        chunks.open(digest)


def test_a_missing_chunk_is_named(chunks: ChunkStore) -> None:
    """Opening what is not there says which chunk is missing."""
    digest, _ = _chunk(6)

    with pytest.raises(NotVerified, match=digest.hex()) as caught:
        chunks.open(digest)

    assert caught.value.code == "chunk-missing"


def test_a_put_repairs_a_torn_file(chunks: ChunkStore) -> None:
    """A file that does not hold its chunk, as power loss leaves it, is written again."""
    digest, data = _chunk(7)
    chunks.put(digest, data)
    os.truncate(chunks.path(digest), 100)

    assert chunks.put(digest, data)

    assert chunks.path(digest).read_bytes() == data


def test_a_process_hashes_a_chunk_once(state_dir: Path) -> None:
    """After its descriptor was evicted a chunk opens again without being hashed again."""
    store = ChunkStore(state_dir / "chunks", open_max=1)
    (first, data), (second, other) = _chunk(8), _chunk(9)
    store.put(first, data)
    store.put(second, other)

    held = store.open(first)
    store.open(second)
    assert store.opened(first) is None
    assert os.pread(held, 10, 0) == data[:10]
    store.open(first)

    assert store.statistics().verified == 2
    assert store.statistics().open_descriptors == 1
    store.close()


def test_descriptors_are_closed_when_evicted(state_dir: Path) -> None:
    """A hundred chunks through a table of four leave no more than four descriptors open."""
    store = ChunkStore(state_dir / "chunks", open_max=4)
    before = len(os.listdir("/proc/self/fd"))
    for seed in range(100, 200):
        digest, data = _chunk(seed, 100)
        store.put(digest, data)
        store.open(digest)

    # The index may open its journal meanwhile: three files of SQLite's.
    assert len(os.listdir("/proc/self/fd")) <= before + 4 + 3
    store.close()


def test_removed_chunks_are_gone(chunks: ChunkStore, state_dir: Path) -> None:
    """Removal takes file and account, and leaves the others."""
    (first, data), (second, other) = _chunk(10), _chunk(11)
    chunks.put(first, data)
    chunks.put(second, other)

    assert chunks.remove({first}) == 1

    assert _files(state_dir) == [chunks.path(second)]
    assert chunks.statistics().chunks == 1


def test_a_chunk_put_again_escapes_removal(chunks: ChunkStore) -> None:
    """A chunk that is condemned and then needed by another image stays."""
    digest, data = _chunk(12)
    chunks.put(digest, data)

    with chunks.condemned({digest}) as doomed:
        assert not chunks.put(digest, data)
        assert chunks.remove(doomed) == 0

    assert digest in chunks


def test_many_threads_may_put_the_same_chunks(chunks: ChunkStore) -> None:
    """Eight threads storing the same twenty chunks end with twenty whole files."""
    wanted = [_chunk(seed, 5000) for seed in range(20, 40)]
    start = threading.Barrier(8)
    new: list[bool] = []

    def put_all() -> None:
        start.wait()
        new.extend([chunks.put(digest, data) for digest, data in wanted])

    threads = [threading.Thread(target=put_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(new) == 160
    assert chunks.statistics().chunks == 20
    for digest, data in wanted:
        assert chunks.path(digest).read_bytes() == data


def test_a_restart_finds_the_chunks(state_dir: Path) -> None:
    """A store opened on the same directory has the same chunks and removes unfinished files."""
    store = ChunkStore(state_dir / "chunks")
    digest, data = _chunk(13)
    store.put(digest, data)
    store.sync()
    store.close()
    (state_dir / "chunks" / "incoming" / "half").write_bytes(b"x")

    again = ChunkStore(state_dir / "chunks")

    assert os.pread(again.open(digest), CHUNK_BYTES, 0) == data
    assert list((state_dir / "chunks" / "incoming").iterdir()) == []
    assert again.statistics().chunks == 1
    again.close()


def test_a_damaged_index_is_made_again_from_the_files(state_dir: Path) -> None:
    """A store whose database is garbage opens, and its account is right after reconciling."""
    store = ChunkStore(state_dir / "chunks")
    digest, data = _chunk(14)
    store.put(digest, data)
    store.close()
    for leftover in (state_dir / "chunks").glob("cache.db*"):
        leftover.unlink()
    (state_dir / "chunks" / "cache.db").write_bytes(b"no database " * 1000)

    again = ChunkStore(state_dir / "chunks")
    again.reconcile()

    assert again.statistics().chunks == 1
    assert again.statistics().size_bytes == CHUNK_BYTES
    assert not again.put(digest, data)
    again.close()


def test_reconciling_forgets_rows_without_files(chunks: ChunkStore) -> None:
    """The account drops a chunk whose file has vanished."""
    digest, data = _chunk(15)
    chunks.put(digest, data)
    chunks.path(digest).unlink()

    chunks.reconcile()

    assert chunks.statistics().chunks == 0


def test_the_index_has_no_pickles_and_evicts_nothing(chunks: ChunkStore, state_dir: Path) -> None:
    """diskcache's settings are ours, not its defaults, and rows hold names only."""
    digest, data = _chunk(16)
    chunks.put(digest, data)

    with sqlite3.connect(state_dir / "chunks" / "cache.db") as database:
        settings = dict(database.execute("SELECT key, value FROM Settings"))
        rows = list(database.execute("SELECT key, raw, mode, value, expire_time FROM Cache"))
    database.close()

    assert settings["eviction_policy"] == "none"
    assert settings["cull_limit"] == 0
    assert settings["size_limit"] == 2**62
    assert rows == [(digest, 1, diskcache.core.MODE_BINARY, None, None)]


@pytest.mark.parametrize("reopened", [True, False])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE Cache SET key = NULL WHERE rowid = 2",
        "UPDATE Cache SET key = 5 WHERE rowid = 2",
        "UPDATE Cache SET key = 'a text' WHERE rowid = 2",
        "UPDATE Cache SET key = x'00ff' WHERE rowid = 2",
        "UPDATE Cache SET size = NULL WHERE rowid = 2",
        "UPDATE Settings SET value = NULL WHERE key = 'size'",
        "UPDATE Settings SET value = 'many' WHERE key = 'count'",
    ],
)
def test_rows_that_cannot_be_ours_are_damage(
    state_dir: Path, statement: str, reopened: bool
) -> None:
    """Rot that leaves a well-formed database behind is noticed as well: the index is made again."""
    pieces = [_chunk(seed, 500 + seed) for seed in range(5)]
    store = ChunkStore(state_dir / "chunks")
    store.put_all(pieces)
    if reopened:
        store.close()
    with closing(sqlite3.connect(state_dir / "chunks" / "cache.db")) as index, index:
        index.execute(statement)
    if reopened:
        store = ChunkStore(state_dir / "chunks")
    store.reconcile()
    statistics = store.statistics()
    assert (statistics.chunks, statistics.size_bytes) == (5, sum(500 + seed for seed in range(5)))
    assert store.remove({pieces[0][0]}) == 1
    assert store.statistics().chunks == 4
    store.close()


@pytest.mark.parametrize("reopened", [True, False])
def test_an_index_that_rots_anywhere_costs_nothing(state_dir: Path, reopened: bool) -> None:
    """Whichever page of the index is hurt, below an open store or a closed one, chunks can be put
    and removed, and the account is that of the files."""
    pieces = [_chunk(seed, 500 + seed) for seed in range(60)]
    index = state_dir / "chunks" / "cache.db"
    store = ChunkStore(state_dir / "chunks")
    store.put_all(pieces)
    store.close()
    whole = index.read_bytes()
    hurt = [whole[:0], whole[:5000], os.urandom(len(whole))]
    for page in range(0, len(whole), 4096):
        for content in (os.urandom(4096), bytes(4096), whole[:4096]):
            hurt.append(whole[:page] + content + whole[page + 4096 :])
    for number, content in enumerate(hurt):
        fresh = _chunk(1000 + number, 600)
        if reopened:
            index.write_bytes(content)
        store = ChunkStore(state_dir / "chunks")
        if not reopened:
            index.write_bytes(content)
        store.reconcile()
        assert store.put(*fresh)
        assert store.statistics().chunks == len(_files(state_dir)) == 61
        assert store.remove({fresh[0]}) == 1
        store.reconcile()
        assert store.statistics().chunks == len(_files(state_dir)) == 60
        store.close()
        index.write_bytes(whole)
        for leftover in ("cache.db-wal", "cache.db-shm"):
            (state_dir / "chunks" / leftover).unlink(missing_ok=True)
