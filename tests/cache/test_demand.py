"""Chunks on demand: right bytes or an error, one request for each, whatever an origin does."""

import hashlib
import random
import threading
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing
import zstandard
from support.lazy import LazyHost, entry_of, index_of, manifest_of, some_image
from support.nginx import Nginx
from support.origins import Fault, OriginServer, Resource

from stratocache.cache.chunk_origins import Unavailable
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.completion import Completion
from stratocache.cache.configuration import FetchSettings
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.endorsed_index import read_index
from stratocache.cache.entry import EndorsedIndex
from stratocache.cache.errors import NoSpace, NotVerified, OriginFailed, StratocacheError
from stratocache.cache.origin import Backoff
from stratocache.cache.room import CacheSpace
from stratocache.cache.traffic import reading_for

IMAGE = some_image(12, tail_bytes=70001, zero=(3, 4))
DIGESTS = manifest_of(IMAGE)


@pytest.fixture
def host(state_dir: Path) -> Iterator[LazyHost]:
    """A host without a chunk."""
    host = LazyHost(state_dir)
    yield host
    host.close()


def _store_of(image: bytes, origin: OriginServer, path: str = "/image.castr") -> str:
    """Serve a casync store of an image; return the URL that its index would have."""
    manifest = manifest_of(image)
    for index in range(manifest.chunk_count):
        name = manifest.digest(index).hex()
        data = image[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        packed = zstandard.ZstdCompressor().compress(data)
        origin.add(f"{path}/{name[:4]}/{name}.cacnk", packed)
    return f"{origin.url}{path.removesuffix('.castr')}.caibx"


def _asked(origin: OriginServer, path: str = "/image") -> Counter[int]:
    """Return how often each chunk left a raw location."""
    asked: Counter[int] = Counter()
    for request in origin.log:
        if request.path == path and request.status == 206 and request.range is not None:
            start, end = (int(text) for text in request.range.removeprefix("bytes=").split("-"))
            asked.update(range(start // CHUNK_BYTES, end // CHUNK_BYTES + 1))
    return asked


def test_a_read_of_an_absent_chunk_fetches_that_chunk_alone(
    host: LazyHost, origin: OriginServer
) -> None:
    """A read costs the chunks that it touches, and gets the image's bytes."""
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", IMAGE)))

    async def script(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader(identifier)
        at = 2 * CHUNK_BYTES - 100
        assert await reader.read(at, 200) == IMAGE[at : at + 200]
        tail = len(IMAGE) - 5
        assert await reader.read(tail, 4096) == IMAGE[tail:]
        assert await reader.read(3 * CHUNK_BYTES, 2 * CHUNK_BYTES) == bytes(2 * CHUNK_BYTES)

    host.run(script)

    assert _asked(origin) == Counter([1, 2, 12])


def test_sixteen_readers_cost_one_request_for_each_chunk(
    host: LazyHost, origin: OriginServer
) -> None:
    """However many read the whole image at once, every chunk leaves the origin exactly once."""
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", IMAGE)))
    right: list[bool] = []

    async def script(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader(identifier)

        async def read(seed: int) -> None:
            offsets = list(range(0, len(IMAGE), 128 * 1024))
            random.Random(seed).shuffle(offsets)
            for offset in offsets:
                data = await reader.read(offset, 128 * 1024)
                right.append(data == IMAGE[offset : offset + 128 * 1024])

        completion = Completion(fetcher, host.images, attempts=3)
        async with trio.open_nursery() as nursery:
            for seed in range(16):
                nursery.start_soon(read, seed)
            nursery.start_soon(completion.complete, host.entries[identifier], [5], lambda *_: None)

    host.run(script)

    assert all(right) and len(right) == 16 * 49
    assert _asked(origin) == Counter(i for i in range(13) if i not in (3, 4))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, headers={"Retry-After": "0"}),
        Fault(status=429),
        Fault(status=416),
        Fault(status=404),
        Fault(cut_after_bytes=1000),
        Fault(ignore_range=True),
        Fault(corrupt=True),
        Fault(headers={"Content-Range": "bytes 0-524287/9999999"}),
        Fault(headers={"Content-Range": "bytes 7-524294/6361457"}),
    ],
    ids=["503", "429", "416", "404", "cut", "200", "corrupt", "other-size", "other-range"],
)
def test_a_failing_origin_gives_way_to_another(
    host: LazyHost, origin: OriginServer, fault: Fault
) -> None:
    """Whatever the first location does wrong, the reader gets right bytes from the second."""
    first = origin.add("/first", Resource(IMAGE, faults=deque([fault] * 50)))
    identifier = host.add(IMAGE, entry_of(IMAGE, first, origin.add("/image", IMAGE)))

    async def script(fetcher: ChunkFetcher) -> None:
        for index in (0, 7):
            await fetcher.fetch(identifier, index)

    host.run(script)

    data = host.images.reader(identifier).read_blocking(7 * CHUNK_BYTES, CHUNK_BYTES)
    assert data == IMAGE[7 * CHUNK_BYTES : 8 * CHUNK_BYTES]
    assert origin.log[0].path == "/first"


def test_an_origin_that_lied_is_left_alone(host: LazyHost, origin: OriginServer) -> None:
    """After a wrong chunk the next ones are asked of another location."""
    first = origin.add("/first", Resource(IMAGE, faults=deque([Fault(corrupt=True)])))
    identifier = host.add(IMAGE, entry_of(IMAGE, first, origin.add("/image", IMAGE)))

    async def script(fetcher: ChunkFetcher) -> None:
        for index in range(3):
            await fetcher.fetch(identifier, index)

    host.run(script)

    assert [request.path for request in origin.log] == ["/first", "/image", "/image", "/image"]


def test_every_accident_of_one_origin_is_survived(host: LazyHost, origin: OriginServer) -> None:
    """One origin that cuts, corrupts, refuses and ignores at random gives no reader a wrong byte."""
    accidents = (
        Fault(status=503), Fault(status=429, headers={"Retry-After": "0"}),
        Fault(cut_after_bytes=100_000), Fault(cut_after_bytes=0), Fault(status=500),
    )  # fmt: skip
    seed = random.SystemRandom().randrange(2**32)
    resource = Resource(
        IMAGE, chance=random.Random(seed), accidents=accidents, accident_rate=0.4,
        faults=deque([Fault(corrupt=True)]),
    )  # fmt: skip
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", resource)))

    async def script(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader(identifier)

        async def read(number: int) -> None:
            for offset in range(number * 4096, len(IMAGE), CHUNK_BYTES):
                assert await reader.read(offset, 4096) == IMAGE[offset : offset + 4096]

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(read, number)

    print(f"seed {seed}")
    host.run(script)


def test_a_dead_origin_costs_one_read_its_time_out(state_dir: Path, origin: OriginServer) -> None:
    """All who wait for a chunk that nobody gives get the error together, and others their bytes."""
    host = LazyHost(state_dir, demand_timeout_s=1.0)
    resource = Resource(IMAGE)
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", resource)))
    errors: list[str] = []

    async def script(fetcher: ChunkFetcher) -> None:
        await fetcher.fetch(identifier, 0)
        resource.faults.extend([Fault(status=503)] * 1000)
        reader = host.images.reader(identifier)

        async def read(offset: int) -> None:
            try:
                await reader.read(CHUNK_BYTES + offset, 10)
            except OriginFailed as error:
                errors.append(error.code)

        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(read, number)
            assert await reader.read(0, 100) == IMAGE[:100]
        assert trio.current_time() - started < 6
        resource.faults.clear()
        assert await reader.read(CHUNK_BYTES, 10) == IMAGE[CHUNK_BYTES:][:10]

    host.run(script)
    host.close()

    assert errors == ["chunk-unreachable"] * 8


def test_a_reader_that_waits_gets_the_only_origin_asked_again(
    state_dir: Path, origin: OriginServer
) -> None:
    """An origin that rests for minutes is asked all the same when a guest needs what it has."""
    host = LazyHost(state_dir, demand_timeout_s=8.0)  # it waits two quarters of that
    resource = Resource(IMAGE, faults=deque([Fault(status=404)] * 3))
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", resource)))

    async def script(fetcher: ChunkFetcher) -> None:
        location = f"{origin.url}/image"
        for _ in range(2):
            await fetcher.bring(identifier, [0])
            fetcher._health.forget(location)
        for _ in range(9):
            fetcher._health.failed(location, Unavailable("it lies", "wrong"))
        assert fetcher._health.rests_until(location) > trio.current_time() + 290
        await fetcher.fetch(identifier, 0)

    host.run(script)
    host.close()

    assert [request.status for request in origin.log] == [404, 404, 404, 206]


def test_a_read_given_up_leaves_the_others_their_chunk(
    host: LazyHost, origin: OriginServer
) -> None:
    """When the task that asked first is cancelled, whoever waits beside it still gets the chunk."""
    held = Fault(cut_after_bytes=1000, hold=threading.Event())
    resource = Resource(IMAGE, faults=deque([held]))
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", resource)))

    async def script(fetcher: ChunkFetcher) -> None:
        first = trio.CancelScope()

        async def give_up() -> None:
            with first:
                await fetcher.fetch(identifier, 0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.start_soon(fetcher.fetch, identifier, 0)
            await trio.testing.wait_all_tasks_blocked(0.05)
            first.cancel()
            assert held.hold is not None
            held.hold.set()

    host.run(script)

    assert _asked(origin) == Counter([0])
    assert host.images.reader(identifier).read_blocking(0, 9) == IMAGE[:9]


def test_chunks_come_from_the_store_beside_the_index(host: LazyHost, origin: OriginServer) -> None:
    """An image that is only compressed at its location is read chunk by chunk from its store."""
    url = _store_of(IMAGE, origin)
    entry = entry_of(
        IMAGE, "http://127.0.0.1:9/image.gz", compression="gz",
        index=EndorsedIndex(url=url, sha256="0" * 64),
    )  # fmt: skip
    identifier = host.add(IMAGE, entry)

    async def script(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader(identifier)
        assert await reader.read(0, len(IMAGE)) == IMAGE

    host.run(script)

    assert sorted(Counter(request.path for request in origin.log).values()) == [1] * 11


@pytest.mark.parametrize("fault", ["bomb", "other-chunk", "noise", "absent", "long"])
def test_a_store_is_believed_nothing(host: LazyHost, origin: OriginServer, fault: str) -> None:
    """A chunk file that is a bomb, another's, damaged or missing gives way to the raw location."""
    name = DIGESTS.digest(0).hex()
    packed = {
        "bomb": zstandard.ZstdCompressor().compress(bytes(256 * 1024**2)),
        "other-chunk": zstandard.ZstdCompressor().compress(IMAGE[CHUNK_BYTES : 2 * CHUNK_BYTES]),
        "noise": b"noise" * 100,
        "long": bytes(8 * 1024**2),
    }
    if fault in packed:
        origin.add(f"/image.castr/{name[:4]}/{name}.cacnk", packed[fault])
    index = EndorsedIndex(url=f"{origin.url}/image.caibx", sha256="0" * 64)
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", IMAGE), index=index))

    async def script(fetcher: ChunkFetcher) -> None:
        await fetcher.fetch(identifier, 0)

    host.run(script)

    assert host.images.reader(identifier).read_blocking(0, CHUNK_BYTES) == IMAGE[:CHUNK_BYTES]
    assert _asked(origin) == Counter([0])


def test_a_store_that_is_not_there_is_not_asked_for_every_chunk(
    host: LazyHost, origin: OriginServer
) -> None:
    """An index may lie beside a raw image alone: a few requests for a store find that out."""
    entry = entry_of(
        IMAGE, origin.add("/image", IMAGE),
        index=EndorsedIndex(url=f"{origin.url}/image.caibx", sha256="0" * 64),
    )  # fmt: skip
    identifier = host.add(IMAGE, entry)

    async def script(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader(identifier)
        for index in (12, 10, 8, 6, 2, 0):
            at = index * CHUNK_BYTES
            assert await reader.read(at, 9) == IMAGE[at : at + 9]

    host.run(script)

    assert [request.status for request in origin.log].count(404) == 3
    assert _asked(origin) == Counter([12, 10, 8, 6, 2, 0])


def test_a_damaged_chunk_is_fetched_again_while_the_reader_waits(
    host: LazyHost, origin: OriginServer
) -> None:
    """What bit rot did to the cache no reader sees: the file goes to quarantine and comes anew."""
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", IMAGE)))

    async def fill(fetcher: ChunkFetcher) -> None:
        for index in range(3):
            await fetcher.fetch(identifier, index)

    host.run(fill)
    for index, damage in ((0, b"rot"), (1, b"")):
        path = host.chunks.path(DIGESTS.digest(index))
        path.write_bytes(damage)
    host.close()
    host.open()

    async def read(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader(identifier)
        assert await reader.read(0, 3 * CHUNK_BYTES) == IMAGE[: 3 * CHUNK_BYTES]

    host.run(read)

    assert _asked(origin) == Counter([0, 1, 2, 0, 1])
    assert host.chunks.statistics().quarantined == 2


def test_a_chunk_is_found_by_its_digest_in_any_image(host: LazyHost, origin: OriginServer) -> None:
    """A manifest without an origin of its own, as a snapshot's, lives on those that share chunks."""
    host.add(IMAGE, entry_of(IMAGE, origin.add("/image", IMAGE)))
    part = IMAGE[2 * CHUNK_BYTES : 6 * CHUNK_BYTES]
    host.images.publish("snapshot", manifest_of(part))

    async def script(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader("snapshot")
        assert await reader.read(0, len(part)) == part
        with pytest.raises(NotVerified) as caught:
            await fetcher.fetch("snapshot", 0)
        assert caught.value.code == "chunk-missing"

    host.run(script)

    assert _asked(origin) == Counter([2, 5])


def test_a_full_cache_stops_the_background_not_a_guest(
    host: LazyHost, origin: OriginServer
) -> None:
    """What nobody waits for needs room below the cache's limit; what a guest reads comes at once."""
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", IMAGE)))

    def full(size_bytes: int) -> None:
        raise NoSpace("no-space", f"{size_bytes} bytes are too many.")

    host.room = CacheSpace(host.state_dir, 0, limit=full)

    async def script(fetcher: ChunkFetcher) -> None:
        with pytest.raises(NoSpace):
            await fetcher.bring(identifier, [0, 1])
        assert await host.images.reader(identifier).read(0, 10) == IMAGE[:10]

    host.run(script)

    assert _asked(origin) == Counter([0])


def test_who_knows_another_way_asks_each_origin_once(host: LazyHost, origin: OriginServer) -> None:
    """An impatient request fails at once, and takes nothing from a guest that waits for the same."""
    resource = Resource(IMAGE, faults=deque([Fault(status=503)] * 2))
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", resource)))

    async def script(fetcher: ChunkFetcher) -> None:
        with pytest.raises(OriginFailed):
            await fetcher.fetch(identifier, 0, patient=False)
        assert [request.status for request in origin.log] == [503]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refused, fetcher, identifier)
            await trio.testing.wait_all_tasks_blocked()
            assert await host.images.reader(identifier).read(0, 10) == IMAGE[:10]

    host.run(script)

    assert [request.status for request in origin.log] == [503, 503, 206]


async def _refused(fetcher: ChunkFetcher, identifier: str) -> None:
    with pytest.raises(OriginFailed):
        await fetcher.fetch(identifier, 0, patient=False)


def test_completion_goes_on_where_a_process_died(host: LazyHost, origin: OriginServer) -> None:
    """What is in the store is not fetched again, and the whole is proven in the end."""
    resource = Resource(IMAGE)
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", resource)))
    seen: list[int] = []

    async def complete(fetcher: ChunkFetcher) -> None:
        completion = Completion(fetcher, host.images, attempts=2, backoff=Backoff(0.001, 0.01))
        found = await completion.complete(
            host.entries[identifier], [9, 1, 200], lambda done, _: seen.append(done)
        )
        assert found.sha256 == host.entries[identifier].digests["sha256"]

    async def begin(fetcher: ChunkFetcher) -> None:
        await fetcher.bring(identifier, [0, 1, 2])
        resource.faults.extend([Fault(status=503)] * 100)
        with pytest.raises(OriginFailed):
            await complete(fetcher)
        resource.faults.clear()

    host.run(begin)
    host.close()
    host.open()
    host.run(complete)

    assert _asked(origin) == Counter(i for i in range(13) if i not in (3, 4))
    assert seen[-1] == len(IMAGE) and seen[0] < len(IMAGE)
    first = next(r for r in origin.log if r.status == 206 and r.range and "4718592-" in r.range)
    assert origin.log.index(first) < max(
        number for number, r in enumerate(origin.log) if r.status == 206
    )


def test_a_whole_that_contradicts_its_index_is_rejected(
    host: LazyHost, origin: OriginServer
) -> None:
    """Chunks that are all as the index says do not make an image that the entry does not promise."""
    digests = {"sha1": "0" * 40, "sha256": "1" * 64}
    entry = entry_of(IMAGE, origin.add("/image", IMAGE), digests=digests)
    host.add(IMAGE, entry)

    async def script(fetcher: ChunkFetcher) -> None:
        with pytest.raises(NotVerified) as caught:
            await Completion(fetcher, host.images, attempts=2).complete(entry, [], lambda *_: None)
        assert caught.value.code == "image-rejected"

    host.run(script)


def test_the_background_waits_for_guests(host: LazyHost, origin: OriginServer) -> None:
    """While a guest waits for a chunk nothing is begun that nobody waits for."""
    held = Fault(cut_after_bytes=10, hold=threading.Event())
    resource = Resource(IMAGE, faults=deque([held]))
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", resource)))

    async def script(fetcher: ChunkFetcher) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.fetch, identifier, 0)
            while not origin.log:
                await trio.lowlevel.checkpoint()
            with trio.move_on_after(0.3) as patience:
                await fetcher.quiet()
            assert patience.cancelled_caught
            assert held.hold is not None
            held.hold.set()
        await fetcher.quiet()
        fetcher.expect_reads()
        with trio.move_on_after(0.3) as expecting:
            await fetcher.quiet()
        assert expecting.cancelled_caught

    host.run(script)


def test_traffic_is_counted_for_image_and_reader(host: LazyHost, origin: OriginServer) -> None:
    """Bytes moved and time waited are known of the image and of the disk that asked."""
    identifier = host.add(IMAGE, entry_of(IMAGE, origin.add("/image", IMAGE)))

    async def script(fetcher: ChunkFetcher) -> None:
        reader = host.images.reader(identifier)
        with reading_for("7"):
            await reader.read(0, 10)
        await reader.read(0, 10)
        of_image, of_disk = fetcher.traffic.images[identifier], fetcher.traffic.readers["7"]
        assert of_image.remote_bytes == of_disk.remote_bytes == CHUNK_BYTES
        assert of_image.wait_s == of_disk.wait_s > 0

    host.run(script)


def test_nginx_serves_ranges(host: LazyHost, tmp_path: Path) -> None:
    """A real web server gives every chunk once, in ranges."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "image").write_bytes(IMAGE)
    with Nginx(tmp_path / "nginx", tmp_path / "www") as nginx:
        identifier = host.add(IMAGE, entry_of(IMAGE, f"{nginx.url}/image"))

        async def script(fetcher: ChunkFetcher) -> None:
            await fetcher.fetch(identifier, 6)
            completion = Completion(fetcher, host.images, attempts=2)
            await completion.complete(host.entries[identifier], [], lambda *_: None)

        host.run(script)
        asked = nginx.requests()

    assert {request.status for request in asked} == {206}
    stored = len(IMAGE) - 2 * CHUNK_BYTES
    assert sum(request.end - request.start for request in asked) == stored
    assert host.images.reader(identifier).read_blocking(0, len(IMAGE)) == IMAGE


def test_nginx_without_ranges_gives_no_single_chunk(state_dir: Path, tmp_path: Path) -> None:
    """From a server that answers 200 to a range nothing is taken, and little is moved."""
    host = LazyHost(state_dir, demand_timeout_s=1.0)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "image").write_bytes(IMAGE)
    with Nginx(tmp_path / "nginx", tmp_path / "www", limit_rate="256k", ranges=False) as nginx:
        identifier = host.add(IMAGE, entry_of(IMAGE, f"{nginx.url}/image"))

        async def script(fetcher: ChunkFetcher) -> None:
            with pytest.raises(OriginFailed):
                await fetcher.fetch(identifier, 6)

        host.run(script)
        host.close()

    assert {request.status for request in nginx.requests()} == {200}
    assert nginx.sent_bytes() < len(IMAGE)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_forged_index_is_refused(
    host: LazyHost, origin: OriginServer, tmp_path: Path, scheme: str
) -> None:
    """An index of other length, digest, chunk size, order, tail or image size is not believed."""
    good = index_of(IMAGE, tmp_path)
    other = index_of(IMAGE[:-1], tmp_path)
    item = 64 + 40 * 5
    forged = {
        "good": good,
        "longer": good + bytes(40),
        "shorter": good[:-40],
        "constants": good[:8] + bytes(8) + good[16:],
        "sha512": good[:16] + (0xB000000000000000).to_bytes(8, "little") + good[24:],
        "chunk-size": good[:24] + (65536).to_bytes(8, "little") * 3 + good[48:],
        "unordered": good[:item] + (4096).to_bytes(8, "little") + good[item + 8 :],
        "tail": good[:-8] + bytes(8),
        "image-size": other,
        "empty": b"",
    }

    async def read(content: bytes, sha256: str) -> str:
        if scheme == "http":
            url = origin.add("/image.caibx", content)
        else:
            (tmp_path / "image.caibx").write_bytes(content)
            url = (tmp_path / "image.caibx").as_uri()
        entry = entry_of(IMAGE, index=EndorsedIndex(url=url, sha256=sha256))
        try:
            async with httpx.AsyncClient() as client:
                manifest = await read_index(entry, client, FetchSettings(attempts=1))
        except StratocacheError as error:
            return error.code
        return "" if manifest == DIGESTS else "wrong"

    codes = {
        name: trio.run(read, content, hashlib.sha256(content).hexdigest())
        for name, content in forged.items()
    }

    assert codes.pop("good") == ""
    assert set(codes.values()) == {"index-mismatch", "manifest-invalid"}
    assert trio.run(read, good, "0" * 64) == "index-mismatch"
