"""Streams that serve what has flowed past: proven chunks at once, the others as they come."""

import bz2
import gzip
import lzma
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
import zstandard
from support.lazy import LazyHost, entry_of, some_image
from support.nginx import Nginx
from support.origins import Fault, OriginServer, Resource

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.completion import Completion
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.entry import EndorsedIndex
from stratocache.cache.errors import NoSpace, OriginFailed
from stratocache.cache.origin import Backoff
from stratocache.cache.room import CacheSpace

IMAGE = some_image(12, tail_bytes=70001, zero=(3, 4))
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, 1),
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": zstandard.ZstdCompressor(level=1).compress,
}
PACKED = PACKERS["zst"](IMAGE)
HALF = len(PACKED) // 2


@pytest.fixture
def host(state_dir: Path) -> Iterator[LazyHost]:
    """A host without a chunk."""
    host = LazyHost(state_dir)
    yield host
    host.close()


def _add(host: LazyHost, origin: OriginServer, *locations: str, compression: str = "zst") -> str:
    """Know an image that is compressed at its locations, with an index but no chunk store."""
    index = EndorsedIndex(url=f"{origin.url}/none.caibx", sha256="0" * 64)
    return host.add(IMAGE, entry_of(IMAGE, *locations, index=index, compression=compression))


def _chunk(index: int) -> bytes:
    return IMAGE[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


async def _read(host: LazyHost, identifier: str, index: int) -> None:
    """Read a whole chunk as a guest does and compare it."""
    data = await host.images.reader(identifier).read(index * CHUNK_BYTES, CHUNK_BYTES)
    assert data == _chunk(index)


async def _complete(host: LazyHost, fetcher: ChunkFetcher, identifier: str) -> None:
    completion = Completion(fetcher, host.images, attempts=2, backoff=Backoff(0.001, 0.01))
    found = await completion.complete(host.entries[identifier], [], lambda *_: None)
    assert found.sha256 == host.entries[identifier].digests["sha256"]


def _bodies(origin: OriginServer, path: str = "/image") -> list[int]:
    """Return the bytes that each answer for a path brought."""
    return [request.sent_bytes for request in origin.log if request.path == path]


@pytest.mark.parametrize("compression", sorted(PACKERS))
def test_what_has_flowed_past_is_read_while_the_rest_is_on_its_way(
    host: LazyHost, origin: OriginServer, compression: str
) -> None:
    """A chunk that came is served though the stream stands still; a later one waits for it."""
    packed = PACKERS[compression](IMAGE)
    held = Fault(cut_after_bytes=len(packed) // 2, hold=threading.Event())
    url = origin.add("/image", Resource(packed, faults=deque([held])))
    identifier = _add(host, origin, url, compression=compression)
    waited: list[int] = []

    async def script(fetcher: ChunkFetcher) -> None:
        await _read(host, identifier, 0)
        async with trio.open_nursery() as nursery:

            async def wait(index: int) -> None:
                await _read(host, identifier, index)
                waited.append(index)

            for index in (11, 12):
                nursery.start_soon(wait, index)
            await _read(host, identifier, 2)
            await _read(host, identifier, 0)
            assert waited == []
            assert held.hold is not None
            held.hold.set()

    host.run(script)

    assert sorted(waited) == [11, 12]
    assert _bodies(origin) == [len(packed)]


def test_sixteen_readers_and_the_completion_share_one_stream(
    host: LazyHost, origin: OriginServer
) -> None:
    """However many read at once, the source leaves its origin once; nothing stays in the stage."""
    identifier = _add(host, origin, origin.add("/image", PACKED))

    async def script(fetcher: ChunkFetcher) -> None:
        async def read(seed: int) -> None:
            indexes = list(range(13))
            random.Random(seed).shuffle(indexes)
            for index in indexes:
                await _read(host, identifier, index)

        async with trio.open_nursery() as nursery:
            for seed in range(16):
                nursery.start_soon(read, seed)
            nursery.start_soon(_complete, host, fetcher, identifier)
        traffic = fetcher.traffic.images[identifier]
        assert traffic.remote_bytes == len(PACKED)
        assert traffic.arrived_bytes == len(IMAGE) - 2 * CHUNK_BYTES

    host.run(script)

    assert _bodies(origin) == [len(PACKED)]
    assert list((host.state_dir / "stage").iterdir()) == []


def test_a_stream_goes_on_where_a_process_died(host: LazyHost, origin: OriginServer) -> None:
    """What was downloaded is not asked for again, and what is in the store is read at once."""
    held = Fault(cut_after_bytes=HALF, hold=threading.Event())
    resource = Resource(PACKED, faults=deque([held]))
    identifier = _add(host, origin, origin.add("/image", resource))

    async def die(fetcher: ChunkFetcher) -> None:
        await _read(host, identifier, 2)

    host.run(die)
    assert held.hold is not None
    held.hold.set()
    kept_bytes = (host.state_dir / "stage" / identifier / "source.part").stat().st_size
    assert kept_bytes > HALF // 2
    origin.log.clear()
    host.close()
    host.open()
    blocked = resource.blocked = threading.Event()

    async def go_on(fetcher: ChunkFetcher) -> None:
        await _read(host, identifier, 2)
        blocked.set()
        await _complete(host, fetcher, identifier)

    host.run(go_on)

    [request] = [request for request in origin.log if request.path == "/image"]
    assert (request.range, request.status) == (f"bytes={kept_bytes}-", 206)
    assert request.sent_bytes == len(PACKED) - kept_bytes


@pytest.mark.parametrize(
    "first",
    [
        Resource(PACKERS["zst"](IMAGE[: 5 * CHUNK_BYTES] + bytes(len(IMAGE) - 5 * CHUNK_BYTES))),
        Resource(PACKED[:HALF]),
        Resource(PACKED[:HALF] + b"noise" * (HALF // 5)),
        Resource(PACKERS["zst"](bytes(64 * 1024**2))),
        Resource(PACKED, faults=deque([Fault(status=404)] * 9)),
        Resource(PACKED, faults=deque([Fault(cut_after_bytes=9)] * 9)),
    ],
    ids=["another-image", "short", "noise", "bomb", "absent", "cut"],
)
def test_a_stream_is_believed_nothing(
    host: LazyHost, origin: OriginServer, first: Resource
) -> None:
    """A location that streams anything else gives way to the next; no wrong byte is kept."""
    first.faults = deque(first.faults)
    locations = origin.add("/first", first), origin.add("/image", PACKED)
    identifier = _add(host, origin, *locations)

    async def script(fetcher: ChunkFetcher) -> None:
        async with trio.open_nursery() as nursery:
            for index in (12, 0, 6):
                nursery.start_soon(_read, host, identifier, index)
        await _complete(host, fetcher, identifier)

    host.run(script)

    assert _bodies(origin, "/first") and _bodies(origin) == [len(PACKED)]
    for path in (host.state_dir / "chunks").rglob("*"):
        if len(path.name) == 64:
            assert path.read_bytes() in IMAGE


def test_a_file_that_changes_under_its_reader_is_read_again(
    host: LazyHost, origin: OriginServer
) -> None:
    """When the server has another file after a cut, the stream begins anew and ends right."""
    other = PACKERS["zst"](some_image(3) + IMAGE[3 * CHUNK_BYTES : -1] + b"!")
    cut = Fault(cut_after_bytes=len(other) // 2, hold=threading.Event())
    resource = Resource(other, etag='"old"', faults=deque([cut]))
    identifier = _add(host, origin, origin.add("/image", resource))

    async def script(fetcher: ChunkFetcher) -> None:
        await _read(host, identifier, 0)
        resource.data, resource.etag = PACKED, '"new"'
        resource.faults.append(Fault(cut_after_bytes=1000))
        assert cut.hold is not None
        cut.hold.set()
        await _complete(host, fetcher, identifier)

    host.run(script)


def test_a_stream_that_stands_still_costs_a_read_its_time_out(
    state_dir: Path, origin: OriginServer
) -> None:
    """Who waits for what does not come gets an error in time; what came is read, and later all."""
    host = LazyHost(state_dir, demand_timeout_s=2.0)
    go_on = threading.Event()
    silent = [Fault(cut_after_bytes=0, hold=go_on)] * 50
    faults = deque([Fault(cut_after_bytes=HALF, hold=go_on), *silent])
    identifier = _add(host, origin, origin.add("/image", Resource(PACKED, faults=faults)))

    async def script(fetcher: ChunkFetcher) -> None:
        await _read(host, identifier, 0)
        started = trio.current_time()
        with pytest.raises(OriginFailed) as caught:
            await _read(host, identifier, 12)
        assert caught.value.code == "chunk-unreachable"
        assert trio.current_time() - started < 12
        await _read(host, identifier, 1)
        go_on.set()
        await _complete(host, fetcher, identifier)

    host.run(script)
    host.close()


def test_a_stream_that_falls_silent_is_asked_again_for_the_rest(
    state_dir: Path, origin: OriginServer
) -> None:
    """A reader that waits gets its chunk from a second request, which begins where the first ended."""
    host = LazyHost(state_dir, demand_timeout_s=6.0)
    silent = Fault(cut_after_bytes=HALF, hold=threading.Event())
    url = origin.add("/image", Resource(PACKED, faults=deque([silent])))
    identifier = _add(host, origin, url)

    async def script(fetcher: ChunkFetcher) -> None:
        await _read(host, identifier, 12)

    host.run(script)
    host.close()
    assert silent.hold is not None
    silent.hold.set()

    ranges = [request.range for request in origin.log if request.path == "/image"]
    assert ranges == [None, f"bytes={HALF}-"]


def test_a_full_cache_lets_a_stream_bring_what_guests_wait_for(
    host: LazyHost, origin: OriginServer
) -> None:
    """Chunks that nobody waits for go by; a guest's comes, again without a second download."""
    identifier = _add(host, origin, origin.add("/image", PACKED))

    def full(size_bytes: int) -> None:
        raise NoSpace("no-space", f"{size_bytes} bytes are too many.")

    host.room = CacheSpace(host.state_dir, 0, limit=full)

    async def script(fetcher: ChunkFetcher) -> None:
        await _read(host, identifier, 11)
        await _read(host, identifier, 2)
        with pytest.raises(NoSpace):
            await _complete(host, fetcher, identifier)

    host.run(script)

    chunks = [path for path in (host.state_dir / "chunks").rglob("*") if len(path.name) == 64]
    assert len(chunks) == 2
    assert _bodies(origin) == [len(PACKED)]


@pytest.mark.parametrize("compression", ["none", "xz"])
def test_a_server_without_ranges_serves_as_it_flows(
    state_dir: Path, tmp_path: Path, compression: str
) -> None:
    """A real nginx that knows no ranges, slower than a reader: the first chunk comes long before
    the last, and all of them come once."""
    image = some_image(40)
    packed = image if compression == "none" else PACKERS[compression](image)
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "image").write_bytes(packed)
    host = LazyHost(state_dir)
    with Nginx(tmp_path / "nginx", folder, limit_rate="12m", ranges=False) as nginx:
        index = EndorsedIndex(url=f"{nginx.url}/none.caibx", sha256="0" * 64)
        entry = entry_of(image, f"{nginx.url}/image", index=index, compression=compression)
        identifier = host.add(image, entry)
        times: list[float] = []

        async def script(fetcher: ChunkFetcher) -> None:
            reader = host.images.reader(identifier)
            started = trio.current_time()
            for at in (0, 39):
                data = await reader.read(at * CHUNK_BYTES, CHUNK_BYTES)
                assert data == image[at * CHUNK_BYTES :][:CHUNK_BYTES]
                times.append(trio.current_time() - started)
            await _complete(host, fetcher, identifier)

        host.run(script)
        [asked] = [
            line for line in nginx.requests() if line.path == "/image" and line.sent_bytes > 2**20
        ]
    host.close()

    assert asked.sent_bytes == len(packed)
    assert times[0] * 2 < times[1]
