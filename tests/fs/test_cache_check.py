"""`cache check` on what rot leaves of the chunk index."""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.fs import cache_check
from stratocache.fs.state import Database

CHUNKS = 40


@pytest.fixture
def configuration(tmp_path: Path) -> Configuration:
    """A host with chunks that no image needs."""
    configuration = Configuration(state_dir=tmp_path / "state", run_dir=tmp_path / "run")
    configuration.state_dir.mkdir()
    database = Database(configuration.database)
    database.migrate()
    database.close()
    store = ChunkStore(configuration.state_dir / "chunks")
    pieces = [bytes([number + 1]) * 1000 for number in range(CHUNKS)]
    store.put_all([(hashlib.sha256(data).digest(), data) for data in pieces])
    store.close()
    return configuration


@pytest.mark.parametrize(
    "rotten", ["NULL", "7", "'a text'", "x'00ff'"], ids=["nothing", "number", "text", "short"]
)
def test_rows_that_cannot_be_chunks_are_left_out(configuration: Configuration, rotten: str) -> None:
    """Every file is accounted for, whatever a row's key has become."""
    index = configuration.state_dir / "chunks" / "cache.db"
    with closing(sqlite3.connect(index)) as connection, connection:
        connection.execute(f"UPDATE Cache SET key = {rotten} WHERE rowid = 3")

    _assert_accounted_for(configuration)


@pytest.mark.parametrize("content", [bytes(4096), b"\x0d" * 4096], ids=["blank", "other"])
def test_any_rotten_page_of_the_index_is_survived(
    configuration: Configuration, content: bytes
) -> None:
    """The index tells nothing that the files do not: without a page of it all is accounted for."""
    index = configuration.state_dir / "chunks" / "cache.db"
    whole = index.read_bytes()
    for offset in range(0, len(whole), 4096):
        index.write_bytes(whole[:offset] + content + whole[offset + 4096 :])
        _assert_accounted_for(configuration)


def _assert_accounted_for(configuration: Configuration) -> None:
    report = cache_check.check(configuration, repair=False, deep=False)
    assert len(report.leaks) == CHUNKS
    assert report.bytes["orphan-chunks"] == CHUNKS * 1000
    assert report.faults == []
