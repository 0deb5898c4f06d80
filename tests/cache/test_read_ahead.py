"""Read-ahead: what is fetched beyond what a reader has asked for, and that it is seldom too much."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.lazy import LazyHost, entry_of, some_image
from support.origins import OriginServer

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.errors import NoSpace
from stratocache.cache.read_ahead import AHEAD_MAX, ReadAhead
from stratocache.cache.room import CacheSpace

COUNT = 100
CHUNKS = 14
IMAGE = some_image(CHUNKS)


@pytest.fixture
def host(state_dir: Path) -> Iterator[LazyHost]:
    """A host without a chunk."""
    made = LazyHost(state_dir)
    yield made
    made.close()


def test_a_reader_in_order_gets_more_and_more_ahead() -> None:
    """The second chunk in order makes a stream; what it is given doubles up to the limit."""
    streams = ReadAhead(COUNT)
    assert [list(streams.wanted(place)) for place in range(10, 15)] == [
        [], [12], [13, 14], [15, 16, 17], list(range(18, 23))
    ]  # fmt: skip
    assert len(streams.wanted(15)) == 1
    assert list(streams.wanted(23)) == list(range(24, 24 + AHEAD_MAX))


@given(
    st.sets(st.integers(0, COUNT // 2 - 1)).flatmap(lambda found: st.permutations(sorted(found)))
)
def test_scattered_reads_fetch_nothing_more(places: list[int]) -> None:
    """Whoever never reads two neighbours gets nothing that was not asked for, in whatever order."""
    streams = ReadAhead(COUNT)
    assert [list(streams.wanted(2 * place)) for place in places] == [[]] * len(places)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=200))
def test_readers_in_order_waste_little(turns: list[tuple[int, int]]) -> None:
    """Of several readers, each in order and at its own pace, each makes what is fetched beyond it a
    limit's worth at most, and nothing is wanted twice."""
    streams = ReadAhead(COUNT)
    at = [0, 25, 50, 75]
    wanted: list[int] = []
    for reader, step in turns:
        at[reader] += step
        if at[reader] >= (reader + 1) * 25 - AHEAD_MAX - 1:
            continue
        found = list(streams.wanted(at[reader]))
        assert all(at[reader] < index <= at[reader] + AHEAD_MAX for index in found)
        wanted += found
    assert len(wanted) == len(set(wanted))


def test_a_boot_loader_does_not_wait_for_each_chunk(host: LazyHost, origin: OriginServer) -> None:
    """What a reader in order is about to want is there before it asks, and leaves the origin once;
    what it never comes near stays there."""
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", IMAGE)))

    async def script(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader(identifier)

        async def read_until_here(places: range, here: int) -> None:
            for index in places:
                at = index * CHUNK_BYTES
                assert bytes(await reader.read(at, 4096)) == IMAGE[at : at + 4096]
            with trio.fail_after(30):
                while await fetcher.missing(identifier) != list(range(here, CHUNKS)):  # noqa: ASYNC110
                    await trio.sleep(0.01)

        await read_until_here(range(2), 3)
        await read_until_here(range(2, 4), 6)
        await read_until_here(range(4, 7), 11)

    host.run(script)

    asked = [request.range or "" for request in origin.log if request.status == 206]
    ends = [text.removeprefix("bytes=").partition("-") for text in asked]
    assert sum(int(end) + 1 - int(start) for start, _, end in ends) == 11 * CHUNK_BYTES


def test_read_ahead_that_fails_is_not_noticed(host: LazyHost, origin: OriginServer) -> None:
    """Room that is refused to the background is no reader's business."""
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", IMAGE)))

    def full(size_bytes: int) -> None:
        raise NoSpace("no-space", f"{size_bytes} bytes are too many.")

    host.room = CacheSpace(host.state_dir, 0, limit=full)

    async def script(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader(identifier)
        for at in range(0, len(IMAGE), CHUNK_BYTES):
            assert bytes(await reader.read(at, CHUNK_BYTES)) == IMAGE[at : at + CHUNK_BYTES]

    host.run(script)
