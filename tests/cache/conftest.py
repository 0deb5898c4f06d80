"""Fixtures of the cache's tests: a server that fails on demand, stores on a real disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.origins import OriginServer, origin_server

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.images import ImageStore


@pytest.fixture
def origin() -> Iterator[OriginServer]:
    """A real HTTP server on loopback."""
    with origin_server() as server:
        yield server


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """An empty state directory."""
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


@pytest.fixture
def chunks(state_dir: Path) -> Iterator[ChunkStore]:
    """An empty chunk store."""
    store = ChunkStore(state_dir / "chunks")
    yield store
    store.close()


@pytest.fixture
def images(state_dir: Path, chunks: ChunkStore) -> ImageStore:
    """An empty image store."""
    return ImageStore(state_dir, chunks)
